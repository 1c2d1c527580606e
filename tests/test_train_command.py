"""`fewshot-diti train`, run in-process on a tiny backbone and a tiny folder of images."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_commands import CLASSES, PRESET, SCORING, TRAINING, save_classes, save_image, train_command

from fewshot_diti import Bank, DiTiClassifier, cli, presets
from fewshot_diti import training as training_module
from fewshot_diti.cost import training_evaluations
from fewshot_diti.data import load_folder, sample_shots
from fewshot_diti.training import ClassShots, Trained

pytestmark = pytest.mark.usefixtures("quick_train")


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
    trained = Bank.from_pretrained(tmp_path / "my bank")
    assert trained.labels == CLASSES and {token.num_shots for token in trained.tokens} == {2}
    assert trained.tokens[0].prompt == "a photo of a hta bolt, a type of part."


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


def test_train_checks_the_images_first_where_it_is_asked_to(
    shots: Path, backbone_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(shots, tmp_path / "data")
    shutil.copy(data / CLASSES[0] / "0.png", data / CLASSES[0] / "copy.png")
    assert cli.main(train_command(data, backbone_folder, tmp_path / "bank", "--folds", "0", "--check")) == 0
    out = capsys.readouterr().out
    assert out.index("copy.png") < out.index("The bank is in")


def test_train_takes_witnesses_by_name_and_none(shots: Path, backbone_folder: Path, tmp_path: Path) -> None:
    for number, named in enumerate((("features",), ())):
        folder = tmp_path / str(number)
        assert cli.main(train_command(shots, backbone_folder, folder, "--folds", "0", "--witnesses", *named)) == 0
        assert DiTiClassifier.from_pretrained(folder).settings_.scoring.witnesses == named
        assert (folder / "witness-0.safetensors").exists() == bool(named)


def test_train_takes_a_manifest(shots: Path, backbone_folder: Path, tmp_path: Path) -> None:
    lines = [f"{path},{path.parent.name}" for path in sorted(shots.glob("*/[01].png"))]
    (tmp_path / "table.csv").write_text("\n".join(["path,label", *lines]))
    command = train_command(Path(), backbone_folder, tmp_path / "bank", "--folds", "0")
    command[1] = f"manifest:{tmp_path / 'table.csv'}@{shots}"
    assert cli.main(command) == 0
    assert Bank.from_pretrained(tmp_path / "bank").labels == CLASSES


def test_train_announces_the_time_of_a_large_backbone_on_the_cpu(
    shots: Path,
    backbone_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(presets, "LARGE_UNET", 0)
    monkeypatch.setitem(presets.PRESETS, "stable-diffusion", PRESET)
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


def fail_at(monkeypatch: pytest.MonkeyPatch, call: int, error: BaseException) -> None:
    """Makes the training that is the `call`-th from now on, counted from 1, raise an error."""
    whole, calls = training_module.train_class_tokens, 0

    def train(*arguments: Any, **options: Any) -> Trained:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return whole(*arguments, **options)

    monkeypatch.setattr(training_module, "train_class_tokens", train)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_an_interrupted_train_leaves_the_bank_that_was_there_to_the_bit(
    shots: Path,
    backbone_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "bank"
    assert cli.main(train_command(shots, backbone_folder, folder, "--folds", "0")) == 0
    before = contents(folder)
    fail_at(monkeypatch, 2, KeyboardInterrupt())  # in the first fold
    again = train_command(shots, backbone_folder, folder, "--folds", "2", "--seed", "5")
    with pytest.warns(UserWarning, match="what was trained before it stopped is in .*bank_incomplete"):
        assert cli.main(again) == 130
    assert f"the bank in {folder} is as it was" in capsys.readouterr().out
    assert contents(folder) == before
    incomplete = tmp_path / "bank_incomplete"
    with pytest.warns(UserWarning, match="was saved when its training was interrupted or failed"):
        found = DiTiClassifier.from_pretrained(incomplete)
    assert not found.complete_ and found.classes_.tolist() == list(CLASSES)
    assert Bank.from_pretrained(incomplete) != Bank.from_pretrained(folder)  # another seed
    monkeypatch.undo()
    assert cli.main(again) == 0
    assert contents(folder) != before
    assert Bank.from_pretrained(folder) == found.bank_
    assert DiTiClassifier.from_pretrained(folder).complete_


def test_a_train_that_is_interrupted_before_there_is_a_bank_leaves_none(
    shots: Path,
    backbone_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fail_at(monkeypatch, 1, KeyboardInterrupt())
    assert cli.main(train_command(shots, backbone_folder, tmp_path / "bank", "--folds", "0")) == 130
    assert "there is no bank yet" in capsys.readouterr().out
    assert not contents(tmp_path / "bank")


def poison_gear(monkeypatch: pytest.MonkeyPatch) -> None:
    original: Callable[..., ClassShots] = training_module.class_shots

    def poisoned(encoder: Any, label: str, *rest: Sequence[Any]) -> ClassShots:
        made = original(encoder, label, *rest)
        return replace(made, mean=made.mean * np.nan) if label == "gear" else made

    monkeypatch.setattr(training_module, "class_shots", poisoned)


def test_train_names_the_class_that_failed_and_saves_the_others_beside_the_output(
    shots: Path,
    backbone_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    poison_gear(monkeypatch)
    with pytest.warns(UserWarning, match="what was trained before it stopped is in .*bank_incomplete"):
        assert cli.main(train_command(shots, backbone_folder, tmp_path / "bank", "--folds", "0")) == 2
    assert "error: The loss of 'gear'" in capsys.readouterr().err
    assert not (tmp_path / "bank" / "manifest.json").exists()
    assert Bank.from_pretrained(tmp_path / "bank_incomplete").labels == ("bolt", "nut")
    with pytest.warns(UserWarning, match="was saved when its training was interrupted or failed"):
        assert not DiTiClassifier.from_pretrained(tmp_path / "bank_incomplete").complete_


def test_train_takes_a_list_of_shots(shots: Path, backbone_folder: Path, tmp_path: Path) -> None:
    drawn = sample_shots(load_folder(shots), 2, 7)
    drawn.save(tmp_path / "shots.json")
    listed = train_command(shots, backbone_folder, tmp_path / "listed", "--folds", "0")
    assert cli.main([*listed, "--shots_file", str(tmp_path / "shots.json")]) == 0
    assert cli.main([*listed[:3], str(tmp_path / "all"), *listed[4:]]) == 0
    banks = [Bank.from_pretrained(tmp_path / name) for name in ("listed", "all")]
    assert [{token.num_shots for token in bank.tokens} for bank in banks] == [{2}, {3}]


def test_train_keeps_what_is_not_its_own_and_says_what_it_replaces(
    shots: Path, backbone_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "README.md").write_text("mine")
    assert cli.main(train_command(shots, backbone_folder, tmp_path / "project")) == 2
    assert "holds files and no whole bank" in capsys.readouterr().err
    assert (tmp_path / "project" / "README.md").read_text() == "mine"
    (tmp_path / "bank").mkdir()
    (tmp_path / "bank" / ".DS_Store").touch()  # of the system, no reason to refuse the folder
    for _ in range(2):
        assert cli.main(train_command(shots, backbone_folder, tmp_path / "bank", "--folds", "0")) == 0
    assert capsys.readouterr().out.count("is replaced when this one is done") == 1
