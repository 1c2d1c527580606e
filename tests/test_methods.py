"""Rows of a few-shot table, each computed a second way from the same draw."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_grid import QUIET, SCORING, TRAINING

from fewshot_diti import Backbone, DiTiClassifier, PredictionConfig
from fewshot_diti.baselines import ClipLora, LogisticProbe, TipAdapter
from fewshot_diti.baselines.base import KeptFeatures
from fewshot_diti.commands.evaluate import EvalConfig, evaluate
from fewshot_diti.data import ImageGeometry
from fewshot_diti.evaluation.grid import Grid
from fewshot_diti.evaluation.methods import LEARNED, METHODS
from fewshot_diti.evaluation.shipped import prepare_shipped
from fewshot_diti.folds import split_folds
from fewshot_diti.presets import recommended
from fewshot_diti.representation import DitiConfig, Representation, TcvaeConfig
from fewshot_diti.representation.subsets import even_sizes

pytestmark = pytest.mark.usefixtures("small_settings")


def test_the_trained_baselines_run(config: EvalConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClipLora, "_cross_validate", lambda *_: 2)
    few = replace(config, methods=("clip-lora", "finetune"), shots=(2,), against="finetune", training_share=0.01)
    assert evaluate(few, QUIET) == 0
    record = json.loads((few.folder / "clip-lora" / "2-1.json").read_text())
    assert record["chosen"] == {"steps_": 2}
    assert len(Grid(replace(few, training_share=0.02)).missing()) == 2


def test_test_labels_take_no_part_in_any_row(config: EvalConfig) -> None:
    names = tuple(name for name, method in METHODS.items() if not method.trains_a_network and name not in LEARNED)
    said: list[dict[str, np.ndarray]] = []
    for permuted in (False, True):
        grid = Grid(replace(config, methods=names, shots=(2,), output_dir=config.output_dir / str(permuted)))
        task = grid.task(2, 1)
        if permuted:
            labels = np.roll(task.test.labels, 1)
            assert (labels != task.test.labels).any()
            task = replace(task, test=replace(task.test, labels=labels))
        grid.bench.prepare(task)
        prepare_shipped(grid.bench, task)
        grid.bench.prepare_zero_shot(task.test)
        said.append({name: METHODS[name].run(grid.bench, task).probabilities for name in names})
    for name in names:
        np.testing.assert_array_equal(said[0][name], said[1][name], err_msg=name)


def test_rows_of_class_tokens_are_what_the_classifier_gives(config: EvalConfig) -> None:
    grid = Grid(replace(config, methods=("diti-all-t",), against="diti-all-t", shots=(2,)))
    assert grid.run_missing() == []
    task = grid.task(2, 1)
    classifier = DiTiClassifier(
        config.backbone,
        concept="part",
        training=replace(TRAINING, seed=1),
        scoring=replace(SCORING, trials=3, weighting="uniform", seed=1),
        prediction=PredictionConfig(schedule="exhaustive"),
    )
    classifier.fit(task.shot_images(), task.shot_labels())
    record = json.loads((grid.config.folder / "diti-all-t" / "2-1.json").read_text())
    assert [p["label"] for p in record["predictions"]] == classifier.predict(task.test_images()).tolist()


def test_the_shipped_row_is_the_shipped_classifier(config: EvalConfig) -> None:
    exact = replace(config, dtype="float32")
    grid = Grid(replace(exact, methods=("fewshot-diti",), against="fewshot-diti", shots=(2,), trials=None))
    assert grid.run_missing() == []
    task = grid.task(2, 1)
    settings = recommended(2)
    classifier = DiTiClassifier(
        grid.bench.backbone,
        concept="part",
        training=replace(settings.training, seed=1),
        scoring=replace(settings.scoring, seed=1),
        prediction=settings.prediction,
    )
    classifier.fit(task.shot_images(), task.shot_labels())
    record = json.loads((grid.config.folder / "fewshot-diti" / "2-1.json").read_text())
    assert [p["label"] for p in record["predictions"]] == classifier.predict(task.test_images()).tolist()
    best = np.sort(classifier.predict_proba(task.test_images()), axis=1)[:, -2:]
    np.testing.assert_allclose([p["margin"] for p in record["predictions"]], best[:, 1] - best[:, 0], atol=1e-4)
    decisions = classifier.decide(task.test_images())
    assert record["evaluations_per_image"] == pytest.approx(np.mean([d.evaluations for d in decisions]))


def test_a_shipped_row_that_was_cut_short_goes_on_and_another_ones_folder_is_emptied(config: EvalConfig) -> None:
    few = replace(config, methods=("fewshot-diti",), against="fewshot-diti", shots=(1,), trials=None)
    grid = Grid(few)
    assert grid.run_missing() == []
    record = json.loads((few.folder / "fewshot-diti" / "1-1.json").read_text())
    kept = few.folder / "errors" / "shipped-1-1"
    bank = (kept / "bank" / "manifest.json").read_bytes()
    (few.folder / "errors" / "shipped-1-1.safetensors").unlink()
    (few.folder / "fewshot-diti" / "1-1.json").unlink()
    assert Grid(few).run_missing() == []
    assert (kept / "bank" / "manifest.json").read_bytes() == bank  # not trained again
    again = json.loads((few.folder / "fewshot-diti" / "1-1.json").read_text())
    assert again["predictions"] == record["predictions"]
    other = replace(few, concept="machine part")
    assert Grid(other).run_missing() == []
    assert (kept / "bank" / "manifest.json").read_bytes() != bank


def test_class_tokens_and_clip_are_mixed_as_sure_as_held_out_shots_allow(config: EvalConfig) -> None:
    grid = Grid(replace(config, methods=("diti+clip", "diti"), shots=(2,)))
    assert grid.run_missing() == []
    task, bench = grid.task(2, 1), grid.bench
    record, tokens = (json.loads((grid.config.folder / m / "2-1.json").read_text()) for m in ("diti+clip", "diti"))
    chosen = record["chosen"]
    errors = bench.diti(task)
    weights = 1 / errors.held_out.double().mean((0, 1))  # SCORING's
    scores = (errors.test.double() * weights / weights.mean()).mean(2).numpy()
    labels = np.array(task.shot_labels())
    groups = {name: np.flatnonzero(labels == name).tolist() for name in task.class_names}
    rows = [row for _, fold in split_folds(groups, 2) for _, row in fold]
    tip = TipAdapter(bench.clip, bench.templates, recolour=bench.recolour, seed=1)
    tip.fit([task.shot_images()[row] for row in rows], labels[rows].tolist())
    of_clip = np.log(tip.predict_proba(task.test_images())) / chosen["clip_temperature"]
    of_clip = of_clip[:, [tip.classes_.tolist().index(name) for name in task.class_names]]
    w = chosen["clip_weight"]
    mixed = -(1 - w) * scores / tokens["chosen"]["temperature"] + w * of_clip
    assert [p["label"] for p in record["predictions"]] == [task.class_names[c] for c in mixed.argmax(1)]


def test_rows_of_representations_are_logistic_regression_on_their_features(
    config: EvalConfig, backbone: Backbone, tmp_path: Path
) -> None:
    folders = []
    for method in (TcvaeConfig(dims=6), DitiConfig(sizes=even_sizes(64))):
        torch.manual_seed(0)
        learned = Representation(
            backbone,
            method,
            method.build(backbone),
            prompt="a part",
            geometry=ImageGeometry(size=backbone.image_size),
            history={},
        )
        learned.save_pretrained(tmp_path / method.name)
        folders.append(str(tmp_path / method.name))
    names = ("linear-tcvae", "linear-diti")
    few = replace(config, methods=names, against=names[0], shots=(2,), representations=tuple(folders))
    grid = Grid(few)
    assert grid.run_missing() == []
    task = grid.task(2, 1)
    tcvae = Representation.from_pretrained(folders[0], backbone)
    probe = LogisticProbe({"all": KeptFeatures(tcvae.features)}, recolour=grid.bench.recolour, seed=1)
    probe.fit(task.shot_images(), task.shot_labels())
    record = grid.record(grid.runs()[0])
    assert record is not None and record["chosen"] == {"chosen_": "all", "strength_": probe.strength_}
    truth = [task.class_names[label] for label in task.test.labels]
    right = probe.predict(task.test_images()) == truth
    assert record["accuracy"] == pytest.approx(right.mean())
    stages = grid.bench.learned_features("diti")
    whole, first = (stages[name](task.shot_images()) for name in ("all", "t 0 to 31"))
    assert whole.shape[1] == 64 and np.array_equal(first, whole[:, : first.shape[1]])
    assert sum(stages[name](task.shot_images()).shape[1] for name in stages if name != "all") == 64


def test_a_row_without_its_representation_is_refused(config: EvalConfig) -> None:
    with pytest.raises(ValueError, match=r"linear-simclr needs features .* --method simclr makes one"):
        replace(config, methods=("linear-simclr",), against="linear-simclr")
    assert not set(LEARNED) & set(EvalConfig().methods)
