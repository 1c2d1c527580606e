"""`train` and `score` from the command line, run in-process on a tiny backbone and a tiny folder of images."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import save_tiny_backbone
from PIL import Image

from fewshot_diti import Bank, DiTiClassifier, backbone, cli
from fewshot_diti.commands import score as score_command
from fewshot_diti.commands import train as train_module
from fewshot_diti.cost import training_evaluations
from fewshot_diti.data import image_id
from fewshot_diti.learning import Learner
from fewshot_diti.recommended import ScoringConfig
from fewshot_diti.training import TrainingConfig

CLASSES = ("bolt", "gear", "nut")
TRAINING = TrainingConfig(steps=4, rank=2, lr_unet=0.05, lr_text_encoder=0.05, prior_weight=0.0, colour_variants=2)
SCORING = ScoringConfig(trials=3, weighting="uniform", calibration_images=3, features_weight=0.001)


def save_image(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (16, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def save_classes(folder: Path, count: int, seed: int = 0) -> Path:
    for c, name in enumerate(CLASSES):
        for i in range(count):
            save_image(folder / name / f"{i}.png", seed + 100 * c + i)
    return folder


@pytest.fixture(autouse=True, scope="module")
def small_settings() -> Iterator[None]:
    """Recommended settings that take a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "recommended_training", lambda num_shots, small: TRAINING)
        patch.setattr(train_module, "recommended_scoring", lambda small: SCORING)
        yield


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classes(tmp_path_factory.mktemp("shots"), 3)


@pytest.fixture(scope="module")
def bank(shots: Path, backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank that the command trained."""
    folder = tmp_path_factory.mktemp("trained") / "bank"
    command = ["train", str(shots), "--output_dir", str(folder), "--concept", "machine part", "--folds", "0"]
    assert cli.main([*command, "--backbone", str(backbone_folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def tests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five pictures in six files: one is a copy."""
    folder = tmp_path_factory.mktemp("test-images")
    for i in range(5):
        save_image(folder / f"{i}.png", 1000 + i)
    save_image(folder / "deep" / "copy.png", 1001)
    return folder


def train_command(folder: Path, backbone: Path, output: Path, *more: str) -> list[str]:
    return ["train", str(folder), "--output_dir", str(output), "--concept", "part", "--backbone", str(backbone), *more]


def read_lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_commands_have_these_options_and_no_others(capsys: pytest.CaptureFixture[str]) -> None:
    expected = {
        "demo": "--output_dir --shots --test_images --trials --zero_shot_trials --backbone --dtype --seed",
        "train": "--output_dir --concept --backbone --shots --folds --resize --banner_rows --split --val_split --dtype"
        " --shortlist --batch_size --seed",
        "score": "--bank --output --backbone --dtype --batch_size",
        "eval": "--dataset --backbone --dtype --clip --network --siblings --methods --shots --seeds --concept --trials"
        " --max_test_images --shift --group --output_dir --quick --dry_run --against",
    }
    for command, options in expected.items():
        with pytest.raises(SystemExit) as exit_:
            cli.main([command, "--help"])
        assert exit_.value.code == 0
        shown = re.findall(r"^[│ ]+(?:-h, )?(--\w+)", capsys.readouterr().out, re.MULTILINE)
        assert shown == ["--help", *options.split()]


def test_train_accepts_dashes_draws_shots_and_cross_validates(
    shots: Path, backbone_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = train_command(shots, backbone_folder, tmp_path / "my bank", "--shots", "2", "--folds", "5", "--seed", "3")
    assert cli.main([word.replace("output_dir", "output-dir") for word in command]) == 0
    out = capsys.readouterr().out
    found = re.search(r"accuracy on your shots: ([\d.]+) % \((\d) of 6; 95 % interval ([\d.]+) to ([\d.]+) %\)", out)
    assert found and "in 2 folds" in out and "3 classes, 2 shots each: bolt, gear, nut" in out
    assert f"fewshot-diti score --bank '{tmp_path / 'my bank'}' IMAGE_OR_DIR" in out
    assert "pocket" not in out
    trained = Bank.load(tmp_path / "my bank")
    assert trained.labels == CLASSES and {token.num_shots for token in trained.tokens} == {2}
    assert trained.tokens[0].prompt == "a photo of a hta bolt, a type of part."


def test_train_tells_the_recall_of_a_shortlist_and_score_leaves_the_other_classes_out(
    shots: Path, tests: Path, backbone_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = tmp_path / "bank", tmp_path / "out.jsonl"
    assert cli.main(train_command(shots, backbone_folder, folder, "--folds", "2", "--shortlist", "2")) == 0
    recall = DiTiClassifier.from_pretrained(folder).calibration_.shortlist_recall
    assert recall is not None
    assert f"The shortlist of 2 holds the class of {100 * recall:.1f} % of them" in capsys.readouterr().out
    assert cli.main(["score", "--bank", str(folder), str(tests), "--output", str(output)]) == 0
    for record in read_lines(output):
        assert sorted(record["probabilities"].values())[0] == 0 and record["evaluations"] == 2 * 3 + 1
        assert list(record["scores"].values()).count(None) == 1
    assert "Infinity" not in output.read_text()


def test_train_says_that_one_shot_cannot_be_cross_validated(
    shots: Path, backbone_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(train_command(shots, backbone_folder, tmp_path / "bank", "--shots", "1")) == 0
    assert "a class has one shot" in capsys.readouterr().out


def test_train_shows_the_validation_loss_of_each_class(
    backbone_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_classes(tmp_path / "data" / "train", 2)
    save_image(tmp_path / "data" / "val" / "gear" / "a.png", 77)
    assert cli.main(train_command(tmp_path / "data", backbone_folder, tmp_path / "bank", "--folds", "0")) == 0
    out = capsys.readouterr().out
    classifier = DiTiClassifier.from_pretrained(tmp_path / "bank")
    expected = classifier.errors([tmp_path / "data" / "val" / "gear" / "a.png"])[0, 1].mean()
    row = next(line for line in out.splitlines() if line.startswith("│ gear"))
    assert [cell.strip() for cell in row.split("│")][2:4] == ["1", f"{expected:.5f}"]


def test_train_takes_a_manifest(shots: Path, backbone_folder: Path, tmp_path: Path) -> None:
    lines = [f"{path},{path.parent.name}" for path in sorted(shots.glob("*/[01].png"))]
    (tmp_path / "table.csv").write_text("\n".join(["path,label", *lines]))
    command = train_command(Path(), backbone_folder, tmp_path / "bank", "--folds", "0")
    command[1] = f"manifest:{tmp_path / 'table.csv'}"
    assert cli.main(command) == 0
    assert Bank.load(tmp_path / "bank").labels == CLASSES


def test_train_announces_the_time_of_a_large_backbone_on_the_cpu(
    shots: Path,
    backbone_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backbone, "LARGE_UNET", 0)
    assert cli.main(train_command(shots, backbone_folder, tmp_path / "bank", "--folds", "0")) == 0
    # 4 steps x 3 classes, forward and backward; uniform weights need no shots
    assert "about 36 evaluations of training" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "scored"),
    [
        ({}, 0),
        ({"weighting": "tif_released", "calibration_images": 10_000}, 0),
        ({"weighting": "spread"}, 3 * 4 * 3),
        ({"density": "importance"}, 3 * 4 * 3),
        ({"weighting": "spread", "calibration_images": 10_000}, 20 * 4 * 3),
        ({"folds": 2, "weighting": "auto"}, 20 * 4 * 3 + 2 * 3 * 4 * 4),
    ],
)
def test_the_announced_cost_counts_what_calibration_scores(changes: dict[str, Any], scored: int) -> None:
    training = 3 * 4 * 4  # steps x classes, forward and backward
    assert training_evaluations(TRAINING, replace(SCORING, **changes), 20, 4) == training + scored


def test_train_names_the_class_that_failed_and_saves_the_others(
    shots: Path,
    backbone_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = Learner.class_shots

    def poisoned(self: Learner, label: str, *rest: object) -> object:
        made = original(self, label, *rest)  # type: ignore[arg-type]
        return replace(made, mean=made.mean * np.nan) if label == "gear" else made

    monkeypatch.setattr(Learner, "class_shots", poisoned)
    assert cli.main(train_command(shots, backbone_folder, tmp_path / "bank", "--folds", "0")) == 2
    assert capsys.readouterr().err.startswith("error: The loss of 'gear'")
    assert Bank.load(tmp_path / "bank").labels == ("bolt", "nut")


def test_score_says_what_the_classifier_says(
    bank: Path, tests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    # the named file comes first and once, although the folder holds it too
    command = ["score", "--bank", str(bank), str(tests / "3.png"), str(tests), "--output", str(tmp_path / "out.jsonl")]
    assert cli.main(command) == 0
    records = read_lines(tmp_path / "out.jsonl")
    names = ["3.png", "0.png", "1.png", "2.png", "4.png", "deep/copy.png"]
    assert [r["path"] for r in records] == [str(tests / name) for name in names]
    paths = [r["path"] for r in records]
    classifier = DiTiClassifier.from_pretrained(bank)
    assert [r["label"] for r in records] == classifier.predict(paths).tolist()
    assert [r["image_id"] for r in records] == [image_id(path) for path in paths]
    for record, scores, probabilities in zip(
        records, classifier.scores(paths).tolist(), classifier.predict_proba(paths).tolist(), strict=True
    ):
        assert record["scores"] == dict(zip(CLASSES, scores, strict=True))
        assert record["margin"] == sorted(scores)[1] - sorted(scores)[0]
        assert record["probabilities"] == dict(zip(CLASSES, probabilities, strict=True))
        assert list(record["probabilities"].values()) == sorted(probabilities, reverse=True)
    assert {**records[2], "path": ""} == {**records[5], "path": ""}
    out = capsys.readouterr().out
    assert records[0]["label"] in out and "margin" in out


def test_score_goes_on_where_it_was_cut_short(
    bank: Path, tests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["score", "--bank", str(bank), str(tests), "--output", str(tmp_path / "out.jsonl")]
    assert cli.main(command) == 0
    whole = read_lines(tmp_path / "out.jsonl")
    part = tmp_path / "out.jsonl.parts" / "part-00000.jsonl"
    lines = part.read_text().splitlines(keepends=True)
    part.write_text(lines[0] + lines[1] + lines[2][:40])
    (tmp_path / "out.jsonl").unlink()
    scored: list[str] = []
    predictions = score_command._predictions
    monkeypatch.setattr(
        score_command, "_predictions", lambda classifier, paths: scored.extend(paths) or predictions(classifier, paths)
    )
    assert cli.main(command) == 0
    assert len(scored) == len(lines) - 2
    assert read_lines(tmp_path / "out.jsonl") == whole


def test_score_scores_the_rest_when_an_image_is_broken_and_names_it_at_the_end(
    bank: Path, tests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes((tests / "0.png").read_bytes()[:200])
    command = ["score", "--bank", str(bank), str(broken), str(tests / "1.png"), "--output", str(tmp_path / "o.jsonl")]
    assert cli.main(command) == 1
    assert [r["path"] for r in read_lines(tmp_path / "o.jsonl")] == [str(tests / "1.png")]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("not scored: ") and str(broken) in last


def test_score_replaces_its_own_output_alone_and_counts_what_it_passes_over(
    bank: Path, tests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    shutil.copy(tests / "0.png", folder)
    (folder / "notes.txt").write_text("")
    before = (folder / "0.png").read_bytes()
    assert cli.main(["score", "--bank", str(bank), str(folder), "--output", str(folder / "0.png")]) == 2
    assert (folder / "0.png").read_bytes() == before
    for _ in range(2):
        assert cli.main(["score", "--bank", str(bank), str(folder), "--output", str(tmp_path / "out.jsonl")]) == 0
    assert "1 files are passed over (1 .txt)" in capsys.readouterr().out


def test_two_processes_score_as_one_and_no_image_twice(
    bank: Path, tests: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["score", "--bank", str(bank), str(tests), "--output", str(tmp_path / "one.jsonl")]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = ["-m", "fewshot_diti", "score", "--bank", str(bank), str(tests), "--output", str(tmp_path / "two.jsonl")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*launch, *command], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("margin: second") == 1
    one, two = read_lines(tmp_path / "one.jsonl"), read_lines(tmp_path / "two.jsonl")
    parts = [read_lines(tmp_path / "two.jsonl.parts" / f"part-0000{rank}.jsonl") for rank in (0, 1)]
    ids = [r["image_id"] for part in parts for r in part]
    assert all(parts) and sorted(ids) == sorted({r["image_id"] for r in two})
    for a, b in zip(one, two, strict=True):
        assert (a["path"], a["image_id"]) == (b["path"], b["image_id"])
        assert a["label"] == b["label"] or a["margin"] <= 1e-4
        assert max(abs(a["scores"][name] - b["scores"][name]) for name in CLASSES) <= 1e-5


def test_errors_of_the_user_are_one_line_and_status_2(
    bank: Path, shots: Path, backbone_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    save_image(tmp_path / "single" / "bolt" / "0.png", 0)
    other = save_tiny_backbone(tmp_path / "other", seed=1)
    picture = str(shots / "bolt" / "0.png")
    classifier = DiTiClassifier.from_pretrained(bank)
    classifier.remove(CLASSES[1:]).save_pretrained(tmp_path / "one")
    classifier.remove(CLASSES[:1]).save_pretrained(tmp_path / "none")
    capsys.readouterr()
    expected = {
        "holds no class sub-folder with images": train_command(tmp_path / "empty", backbone_folder, tmp_path / "bank"),
        "There is no folder": train_command(tmp_path / "nowhere", backbone_folder, tmp_path / "bank"),
        "holds the classes ['bolt']": train_command(tmp_path / "single", backbone_folder, tmp_path / "bank"),
        "but 'bolt' has 3": train_command(shots, backbone_folder, tmp_path / "bank", "--shots", "9"),
        "has no splits": train_command(shots, backbone_folder, tmp_path / "bank", "--split", "train"),
        "The bank was trained on backbone": ["score", "--bank", str(bank), "--backbone", str(other), picture],
        "so no complete bank": ["score", "--bank", str(tmp_path), picture],
        "holds the classes ['bolt']; scoring takes two or more": ["score", "--bank", str(tmp_path / "one"), picture],
        "holds the classes []; scoring takes two or more": ["score", "--bank", str(tmp_path / "none"), picture],
        "holds no images": ["score", "--bank", str(bank), str(tmp_path / "empty")],
        "no image file or folder": ["score", "--bank", str(bank), str(tmp_path / "no.png")],
    }
    for text, command in expected.items():
        assert cli.main(command) == 2
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and text in captured.err
    assert not (tmp_path / "bank").exists()


def test_settings_out_of_range_are_refused_with_what_is_allowed(bank: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = ["train", "DIR", "--output_dir", "B", "--concept", "part"]
    expected = {
        "shots=0": [*part, "--shots", "0"],
        "folds=1": [*part, "--folds", "1"],
        "concept is empty": [*part[:-1], " "],
        "test_images=241": ["demo", "--test_images", "241"],
        "batch_size=0": [*part, "--batch_size", "0"],
        "No images": ["score", "--bank", str(bank)],
    }
    for text, command in expected.items():
        with pytest.raises(SystemExit) as exit_:
            cli.main(command)
        assert exit_.value.code == 2 and text in capsys.readouterr().err


def test_train_keeps_what_is_not_its_own_and_says_what_it_replaces(
    shots: Path, backbone_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "README.md").write_text("mine")
    assert cli.main(train_command(shots, backbone_folder, tmp_path / "project")) == 2
    assert "holds files and no whole bank" in capsys.readouterr().err
    assert (tmp_path / "project" / "README.md").read_text() == "mine"
    for _ in range(2):
        assert cli.main(train_command(shots, backbone_folder, tmp_path / "bank", "--folds", "0")) == 0
    assert capsys.readouterr().out.count("is replaced when this one is done") == 1


def test_score_names_an_image_below_the_banner_and_a_path_that_is_no_utf8(
    shots: Path, tests: Path, backbone_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = train_command(shots, backbone_folder, tmp_path / "bank", "--folds", "0", "--banner_rows", "5")
    assert cli.main(command) == 0
    Image.new("RGB", (32, 4)).save(tmp_path / "low.png")
    odd = tmp_path / os.fsdecode(b"caf\xe9.png")
    save_image(tmp_path / "plain.png", 1000).rename(odd)
    output = tmp_path / "out.jsonl"
    images = [str(tests / "1.png"), str(tmp_path / "low.png"), str(odd)]
    assert cli.main(["score", "--bank", str(tmp_path / "bank"), *images, "--output", str(output)]) == 1
    assert "low.png is 4 pixels high" in capsys.readouterr().out
    assert [line["path"] for line in read_lines(output)] == [images[0], images[2]]
    assert cli.main(["score", "--bank", str(tmp_path / "bank"), images[0], "--output", str(tmp_path)]) == 2
    assert "is there already and no output of score" in capsys.readouterr().err


def test_other_exceptions_keep_their_traceback(shots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "train", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", str(shots), "--output_dir", "B", "--concept", "part"])
