"""The few-shot table at tiny size: what is there is not run again, failures are reported, processes share the work."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import run_together
from rich.console import Console
from small_grid import QUIET

from fewshot_diti.baselines import presets
from fewshot_diti.baselines.imagenet import TuningSettings
from fewshot_diti.baselines.tip_adapter import TipSettings
from fewshot_diti.commands.evaluate import EvalConfig, evaluate, plan
from fewshot_diti.evaluation import bench as bench_module
from fewshot_diti.evaluation.class_tokens import tip_adapter
from fewshot_diti.evaluation.grid import Grid
from fewshot_diti.evaluation.methods import LEARNED, METHODS
from fewshot_diti.presets import PRESETS, FeatureConfig, Kind
from fewshot_diti.witnesses import linear, network

SHIPPED_PRESETS = dict(PRESETS)  # `small_settings` replaces one

pytestmark = pytest.mark.usefixtures("small_settings")


def times(folder: Path) -> dict[str, int]:
    return {str(f): f.stat().st_mtime_ns for f in folder.rglob("*-*.json")}


def test_every_method_leaves_a_record_and_a_second_run_does_nothing(
    config: EvalConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = {"finetune", "clip-lora", *LEARNED}
    fast = replace(config, methods=tuple(m for m in METHODS if m not in slow))
    assert evaluate(fast, Console(width=200, markup=False)) == 0
    printed = capsys.readouterr().out
    assert "accuracy in %" in printed and "accuracy of fewshot-diti minus" in printed
    assert "matched" not in printed and "[bold]" not in printed
    folder = Grid(fast).config.folder
    record = json.loads((folder / "diti" / "2-1.json").read_text())
    assert record["status"] == "ok" and record["evaluations_per_image"] == 9
    assert 0 <= record["interval"][0] <= record["accuracy"] <= record["interval"][1] <= 1
    assert len(record["predictions"]) == 6
    assert set(record["predictions"][0]) == {"image_id", "true_label", "label", "probability", "margin"}
    right = np.mean([p["label"] == p["true_label"] for p in record["predictions"]])
    assert right == record["accuracy"]
    assert len(record["shots"]["image_ids"]) == 6
    for name in ("table.md", "table.tex", "table.csv", "accuracy.png", "comparisons.json"):
        assert (folder / name).stat().st_size > 0
    before = times(folder)
    assert len(before) == 2 * len(fast.methods)
    assert evaluate(fast, QUIET) == 0
    assert times(folder) == before
    took = {"training_seconds": 600.0, "seconds_per_image": 100.0, "seconds": 0.1}  # of six images
    shipped = json.loads((folder / "fewshot-diti" / "2-1.json").read_text())
    del shipped["checksum"]  # which is not that of other times
    (folder / "fewshot-diti" / "2-1.json").write_text(json.dumps(shipped | took))
    (folder / "fewshot-diti" / "1-1.json").unlink()
    assert "fewshot-diti/1-1.json  about 1200 s" in plan(Grid(fast))
    assert evaluate(fast, QUIET) == 0
    (folder / "ncm-sd" / "1-1.json").unlink()
    (folder / "diti" / "1-1.json").write_text((folder / "diti" / "1-1.json").read_text().replace("ok", "failed", 1))
    assert {(r.method, r.num_shots) for r in Grid(fast).missing()} == {("ncm-sd", 1), ("diti", 1)}
    stale = {r.method for r in Grid(replace(fast, trials=2)).missing()}
    assert stale == {m for m in fast.methods if "diti" in m or m == "zeroshot-sd"} | {"ncm-sd"}
    shorter = {r.method for r in Grid(replace(fast, training_share=0.5)).missing()}
    assert shorter == {m for m in fast.methods if "diti" in m} | {"ncm-sd"}
    assert replace(fast, max_test_images=1).folder != fast.folder  # a quick look leaves the full table alone


@pytest.mark.parametrize("kind", ["pocket", "stable-diffusion"])
def test_rows_of_class_tokens_score_by_the_presets_that_ship(
    config: EvalConfig, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    monkeypatch.setitem(PRESETS, "pocket", SHIPPED_PRESETS[kind])
    scoring = Grid(config).bench.scoring(seed=3)
    assert (scoring.witnesses, scoring.witness_weights, scoring.seed) == ((), (), 3)
    assert scoring.trials == 3 and scoring.weighting == "uniform"


def test_a_record_is_stale_when_the_package_or_a_setting_of_its_method_changes(
    config: EvalConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = replace(config, methods=("tip-adapter", "zeroshot-clip", "nn-latents"), against="nn-latents", shots=(1,))
    assert evaluate(few, QUIET) == 0
    assert Grid(few).missing() == []
    record = json.loads((few.folder / "tip-adapter" / "1-1.json").read_text())
    assert record["made_by"]["version"] == metadata.version("fewshot-diti")
    assert record["made_by"]["settings"]["tip"] == {
        "one_shot": [50.0, 3.5],
        "views": 10,
        "steps": 500,
        "least_epochs": 20,
        "lr": 1e-3,
    }
    with monkeypatch.context() as patch:
        other = replace(presets.PRESETS["small"], tip=TipSettings(views=9))
        patch.setitem(presets.PRESETS, "small", other)
        assert [run.method for run in Grid(few).missing()] == ["tip-adapter"]
    installed = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.0.0" if name == "fewshot-diti" else installed(name))
    assert len(Grid(few).missing()) == 3


def test_what_decides_a_row_names_its_constants(config: EvalConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    witnesses = {"witnesses": ("features", "network:test_resnet", "linear-network:test_resnet")}
    preset = replace(PRESETS["pocket"], scoring={**PRESETS["pocket"].scoring, **witnesses, "witness_weights": (1,) * 3})
    monkeypatch.setitem(PRESETS, "pocket", preset)

    def described(method: str) -> str:
        return json.dumps(METHODS[method].settings(Grid(config).bench, 1, 1), default=str)

    before = {method: described(method) for method in ("fewshot-diti", "lda-sd", "linear-sd", "ncm-sd")}
    assert before == {method: described(method) for method in before}
    with monkeypatch.context() as patch:
        patch.setitem(PRESETS, "pocket", replace(preset, features=FeatureConfig(timestep=0.2)))
        assert all(described(method) != before[method] for method in before)
    with monkeypatch.context() as patch:
        patch.setitem(PRESETS, "pocket", replace(preset, overlap=0.123))
        assert described("fewshot-diti") != before["fewshot-diti"]
    for module, name, value in ((network, "TEMPERATURE", 0.9), (linear, "COPIES", 2)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            assert described("fewshot-diti") != before["fewshot-diti"]
    with monkeypatch.context() as patch:
        small = replace(presets.PRESETS["small"], tuning=TuningSettings(steps=7))
        patch.setitem(presets.PRESETS, "small", small)
        assert described("fewshot-diti") != before["fewshot-diti"]


def test_a_large_model_beside_a_small_backbone_has_the_published_settings(
    config: EvalConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = Grid(config)
    assert grid.bench.backbone.kind == "pocket"
    task, small = grid.task(2, 1), METHODS["clip-lora"].settings(grid.bench, 2, 1)["lora"]
    assert (small["rank"], small["candidates"]) == (16, (200, 1000))
    assert METHODS["finetune"].settings(grid.bench, 2, 1)["network"].endswith("at (112, 224)")
    monkeypatch.setattr(presets, "SMALL", 0)  # every model is large
    grid = Grid(config)
    large = METHODS["clip-lora"].settings(grid.bench, 2, 1)["lora"]
    assert (large["rank"], large["lr"], large["candidates"], large["views"]) == (2, 2e-4, (), None)
    assert METHODS["finetune"].settings(grid.bench, 2, 1)["network"].endswith("at (224, 448)")
    assert tip_adapter(grid.bench, task).settings == TipSettings()


def test_a_failed_run_is_recorded_and_the_others_go_on(config: EvalConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("out of paint")

    monkeypatch.setitem(METHODS, "nn-latents", replace(METHODS["nn-latents"], run=broken))
    few = replace(config, methods=("nn-latents", "ncm-sd"), against="ncm-sd", shots=(1,))
    assert evaluate(few, QUIET) == 1
    failed = json.loads((few.folder / "nn-latents" / "1-1.json").read_text())
    assert failed["status"] == "failed" and failed["error"] == "RuntimeError: out of paint"
    assert json.loads((few.folder / "ncm-sd" / "1-1.json").read_text())["status"] == "ok"
    assert [r.method for r in Grid(few).missing()] == ["nn-latents"]


def test_where_every_run_fails_the_reasons_are_printed(
    config: EvalConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(METHODS, "nn-latents", replace(METHODS["nn-latents"], run=lambda *_: 1 / 0))
    alone = replace(config, methods=("nn-latents",), against="nn-latents", shots=(1,))
    assert evaluate(alone, Console(width=200)) == 1
    assert "1-1.json: ZeroDivisionError: division by zero" in capsys.readouterr().out


def test_where_class_tokens_fail_their_rows_say_why(config: EvalConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("no paint left")

    monkeypatch.setattr(bench_module.Bench, "prepare", broken)
    few = replace(config, methods=("diti", "nn-latents"), shots=(1,))
    assert evaluate(few, QUIET) == 1
    failed = json.loads((few.folder / "diti" / "1-1.json").read_text())
    assert failed["error"] == "ValueError: no paint left" and "in broken" in failed["traceback"]
    assert json.loads((few.folder / "nn-latents" / "1-1.json").read_text())["status"] == "ok"


def test_a_draw_is_done_before_the_next_begins(config: EvalConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    prepare, draws = bench_module.Bench.prepare, []

    def killed_at_the_second(self: Any, task: Any) -> None:
        draws.append(task.num_shots)
        if len(draws) > 1:
            raise Killed
        prepare(self, task)

    monkeypatch.setattr(bench_module.Bench, "prepare", killed_at_the_second)
    few = replace(config, methods=("diti", "diti-all-t"))
    with pytest.raises(Killed):
        evaluate(few, QUIET)
    assert draws == [1, 2] and {(r.method, r.num_shots) for r in Grid(few).missing()} == {
        ("diti", 2),
        ("diti-all-t", 2),
    }


def test_a_damaged_record_is_made_again(config: EvalConfig) -> None:
    few = replace(config, methods=("ncm-sd",), against="ncm-sd", shots=(1,))
    assert evaluate(few, QUIET) == 0
    for damage in ("{", "{}"):
        (few.folder / "ncm-sd" / "1-1.json").write_text(damage)
        assert len(Grid(few).missing()) == 1


def test_a_dry_run_says_what_is_missing_and_runs_nothing(
    config: EvalConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    few = replace(config, methods=("ncm-sd", "nn-latents"), against="ncm-sd", shots=(1,))
    assert evaluate(replace(few, methods=("ncm-sd",)), QUIET) == 0
    before = times(few.folder)
    assert evaluate(replace(few, shots=(1, 2), dry_run=True), Console(width=200)) == 0
    printed = capsys.readouterr().out
    assert "nn-latents/2-1.json  time unknown" in printed and "3 runs to do, 1 done" in printed
    assert times(few.folder) == before
    assert evaluate(replace(few, methods=("diti",), against="diti", dry_run=True), Console(width=200)) == 0
    assert "class tokens at 1 shot per class, seed 1  about" in capsys.readouterr().out


def test_data_that_no_table_can_be_made_of_are_refused(config: EvalConfig, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"What are all classes of folder:.*such as bird"):
        EvalConfig(dataset="folder:skin")
    with pytest.raises(ValueError, match="pass it or group='hospital'"):
        EvalConfig(shift="livery", group="hospital")
    with pytest.raises(ValueError, match=r"has no splits.*folders train/CLASS and test/CLASS"):
        Grid(replace(config, dataset=f"folder:{data / 'train'}"))
    for split in ("train", "test"):
        shutil.copytree(data / split / "nut", tmp_path / "one" / split / "nut")
    with pytest.raises(ValueError, match=r"has the class \['nut'\] alone"):
        Grid(replace(config, dataset=f"folder:{tmp_path / 'one'}"))


def test_two_processes_make_the_same_table(config: EvalConfig, tmp_path: Path) -> None:
    # bfloat16 rounds differently with the classes that share a batch
    exact = replace(config, dtype="float32")
    few = replace(exact, methods=("fewshot-diti", "diti-all-t", "ncm-sd"), against="ncm-sd", shots=(2,))
    run_together(lambda: evaluate(replace(few, output_dir=tmp_path / "two"), QUIET))
    assert evaluate(few, QUIET) == 0
    for method in few.methods:
        one, two = (
            json.loads((c.folder / method / "2-1.json").read_text())
            for c in (few, replace(few, output_dir=tmp_path / "two"))
        )
        assert [p["label"] for p in one["predictions"]] == [p["label"] for p in two["predictions"]]
        margins = [torch.tensor([p["margin"] for p in r["predictions"]]) for r in (one, two)]
        torch.testing.assert_close(*margins, rtol=0, atol=1e-4)


def test_shots_of_one_livery_are_matched_by_some_test_images_and_not_by_others(config: EvalConfig) -> None:
    few = replace(
        config, dataset="bundled", shift="livery", methods=("nn-latents",), against="nn-latents", shots=(2, 8)
    )
    assert evaluate(few, QUIET) == 0
    grid = Grid(few)
    task = grid.task(2, 1)
    for c, name in enumerate(grid.test.class_names):
        worn = {task.shots.attributes["airline"][i] for i in np.flatnonzero(task.shots.labels == c)}
        others = {grid.test.attributes["airline"][i] for i in np.flatnonzero(grid.test.labels != c)}
        assert len(worn) == 1 and (worn <= others or name == "747-8")  # nobody else wears the 747-8's
    record = json.loads((few.folder / "nn-latents" / "2-1.json").read_text())
    known = np.array(grid.test.attributes["airline"]) != ""
    assert record["matched"]["images"] + record["shifted"]["images"] == known.sum() < len(grid.test)
    assert record["matched"]["images"] < 60 and record["shots_of_one_value"]
    worn = set(zip(task.shots.labels, task.shots.attributes["airline"], strict=True))
    wearers = list(zip(task.test.labels, task.test.attributes["airline"], strict=True))
    misled = [(c, v) not in worn and any((other, v) in worn for other in range(12)) for c, v in wearers]
    assert 0 < record["misleading"]["images"] == sum(misled) < record["shifted"]["images"]
    eight = json.loads((few.folder / "nn-latents" / "8-1.json").read_text())
    assert not eight["shots_of_one_value"]
    assert len({grid.task(8, 1).shots.attributes["airline"][i] for i in range(8)}) > 1  # no livery has eight images
    page = (few.folder / "shift.md").read_text()
    assert "bootstrap over airline" in page and "drop of accuracy" in page
    assert (
        page.count("| nn-latents |") == 4
        and "8 shots are drawn as usual: some class has too few images of any airline" in page
    )
    with pytest.raises(ValueError, match=r"no attribute 'colour' in its split train and test; pass group with one of"):
        Grid(replace(few, shift="none", group="colour"))


def test_shots_of_a_file_take_the_place_of_a_draw(config: EvalConfig, tmp_path: Path) -> None:
    few = replace(config, methods=("ncm-sd",), shots=(1,))
    Grid(few).draw(1, 7).save(tmp_path / "shots.json")
    listed = Grid(replace(few, shots_file=tmp_path / "shots.json"))
    assert listed.task(1, 1).shots.ids == Grid(few).task(1, 7).shots.ids != Grid(few).task(1, 1).shots.ids
    with pytest.raises(ValueError, match="has other numbers per class"):
        Grid(replace(few, shots=(2,), shots_file=tmp_path / "shots.json")).task(2, 1)
    with pytest.raises(ValueError, match="is one draw; pass one number of shots"):
        replace(few, shots=(1, 2), shots_file=tmp_path / "shots.json")


def test_unknown_methods_are_refused() -> None:
    with pytest.raises(ValueError, match=r"methods \['magic'\]; pass some of fewshot-diti"):
        EvalConfig(methods=("magic",))
    with pytest.raises(ValueError, match=r"siblings needs a network .*siblings=local-dir:FOLDER"):
        EvalConfig(backbone="some/other", methods=("diti", "siblings"))
    assert "siblings" in EvalConfig().methods and "siblings" not in EvalConfig(backbone="some/other").methods
    for wrong, text in (
        ({"shots": (0,)}, r"shots=\(0,\)"),
        ({"seeds": (1, 1)}, "each once"),
        ({"trials": 0}, "trials=0"),
    ):
        with pytest.raises(ValueError, match=text):
            EvalConfig(**wrong)
    with pytest.raises(ValueError, match="has 24 train images, 100 are needed; pass fewer shots"):
        Grid(EvalConfig(shots=(100,)))
    with pytest.raises(ValueError, match="against='diti'; pass one of the methods ncm-sd"):
        EvalConfig(methods=("ncm-sd",), against="diti")
    assert EvalConfig(methods=("ncm-sd", "nn-latents")).reference == "ncm-sd"
    assert EvalConfig().reference == "fewshot-diti"
