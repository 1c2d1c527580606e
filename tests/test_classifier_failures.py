"""What the classifier refuses, and what is left where a class fails."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fewshot_diti.learning import Learner
from PIL import Image
from small_classifier import SCORING, TRAINING, bank_of, make, shots_of

from fewshot_diti import Backbone, Bank, DiTiClassifier, ScoringConfig, TrainingConfig, TrainingError
from fewshot_diti.data.images import ImageGeometry, ImageSource
from fewshot_diti.training import ClassShots, Label


def poison(monkeypatch: pytest.MonkeyPatch, is_bad: Callable[[Label, int], bool]) -> None:
    """Makes the shots infinite where `is_bad` (label, number of shots) says so."""
    class_shots = Learner.class_shots

    def infinite(self: Learner, label: Label, images: Sequence[ImageSource], config: TrainingConfig) -> ClassShots:
        shots = class_shots(self, label, images, config)
        return replace(shots, mean=shots.mean + float("inf")) if is_bad(label, len(images)) else shots

    monkeypatch.setattr(Learner, "class_shots", infinite)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shots of the DC-9 are infinite."""
    poison(monkeypatch, lambda label, _: label == "dc-9")


def test_where_all_classes_fail_there_is_no_bank(
    backbone: Backbone, pictures: dict[str, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, lambda *_: True)
    classifier = make(backbone)
    with pytest.raises(TrainingError, match=r"'a320' \(step 1\), 'dc-9' \(step 1\)"):
        classifier.fit(*shots_of(pictures, ["a320", "dc-9"]))
    assert classifier.bank_ is None


def test_a_class_that_fails_in_a_fold_is_named_and_the_class_tokens_are_kept(
    backbone: Backbone, pictures: dict[str, list[Path]], tests: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, lambda label, count: label == "dc-9" and count < 3)
    scoring = replace(SCORING, weighting="auto", temperature=None, folds=3)
    classifier = make(backbone, training=replace(TRAINING, steps=1), scoring=scoring)
    with pytest.raises(TrainingError, match="'dc-9'"):
        classifier.fit(*shots_of(pictures, ["a320", "dc-9"], 3))
    assert classifier.classes_.tolist() == ["a320", "dc-9"]
    assert classifier.calibration_.accuracy is None
    assert set(classifier.predict(tests)) <= {"a320", "dc-9"}


def test_a_class_that_fails_is_named_even_where_another_fails_in_a_fold(
    backbone: Backbone, pictures: dict[str, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, lambda label, count: label == "dc-9" or (label == "a320" and count < 3))
    classifier = make(backbone, scoring=replace(SCORING, weighting="auto", temperature=None, folds=3))
    with pytest.raises(TrainingError, match="'dc-9'") as raised:
        classifier.fit(*shots_of(pictures, ["a320", "dc-9", "tu-154"], 3))
    assert "'a320'" in str(raised.value.__context__)
    assert classifier.classes_.tolist() == ["a320", "tu-154"]


@pytest.mark.parametrize("weighting", ["uniform", "spread"])
@pytest.mark.usefixtures("poisoned")
def test_a_class_that_fails_is_named_and_the_others_are_kept(
    backbone: Backbone, pictures: dict[str, list[Path]], tests: list[Path], tmp_path: Path, weighting: str
) -> None:
    scoring = replace(SCORING, weighting=weighting)
    classifier = make(backbone, training=TRAINING, scoring=scoring)
    with pytest.raises(TrainingError, match=r"The loss of 'dc-9' \(step 1\) was not finite"):
        classifier.fit(*shots_of(pictures, ["a320", "dc-9", "tu-154"]))
    alone = make(backbone, scoring=scoring).fit(*shots_of(pictures, ["a320", "tu-154"]))
    torch.testing.assert_close(bank_of(classifier).rows, bank_of(alone).rows, rtol=0, atol=1e-4)
    assert classifier.predict(tests).tolist() == alone.predict(tests).tolist()
    classifier.save_pretrained(tmp_path)
    assert Bank.load(tmp_path).labels == ("a320", "tu-154")
    with pytest.raises(TrainingError, match="'dc-9'"):
        classifier.partial_fit(*shots_of(pictures, ["dc-9", "747"]))
    assert classifier.classes_.tolist() == ["747", "a320", "tu-154"]


@pytest.mark.usefixtures("poisoned")
def test_the_failure_is_named_where_a_single_class_is_left(backbone: Backbone, pictures: dict[str, list[Path]]) -> None:
    classifier = make(backbone, training=TRAINING, scoring=replace(SCORING, weighting="spread"))
    with pytest.raises(TrainingError, match="'dc-9'"):
        classifier.fit(*shots_of(pictures, ["a320", "dc-9"]))
    assert classifier.classes_.tolist() == ["a320"]


def test_errors_say_what_is_wrong(
    backbone: Backbone, fitted: DiTiClassifier, pictures: dict[str, list[Path]], tmp_path: Path
) -> None:
    a, b = pictures["a320"][:2]
    new = make(backbone)
    with pytest.raises(ValueError, match="2 images but 1 labels"):
        new.fit([a, b], ["x"])
    with pytest.raises(ValueError, match="No images were passed"):
        new.fit([], [])
    with pytest.raises(ValueError, match=r"labels='xy' is one text"):
        new.fit([a, b], "xy")
    with pytest.raises(ValueError, match=r"One image was passed where a list is needed"):
        new.fit(a, ["x"])
    with pytest.raises(ValueError, match=r"two classes or more, got \['x'\]"):
        new.fit([a, b], ["x", "x"])
    with pytest.raises(ValueError, match=r"all str, all int or all bool, got \['int', 'str'\]"):
        new.fit([a, b], ["x", 1])
    with pytest.raises(ValueError, match=r"all str, all int or all bool, got \['float'\], label 0 being 1\.0"):
        new.fit([a, b], [1.0, 2.0])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"One picture \(.+\) is given as 'x' and as 'y'"):
        new.fit([a, b, Image.open(a)], ["x", "y", "y"])
    with pytest.raises(FileNotFoundError, match="no image file"):
        new.fit([a, tmp_path / "nothing.png"], ["x", "y"])
    with pytest.raises(ValueError, match="no class tokens yet; call fit"):
        new.predict(a)
    with pytest.raises(ValueError, match=r"Classes \['dc-9'\] are in the bank already"):
        fitted.partial_fit([a], ["dc-9"])
    with pytest.raises(ValueError, match="Labels are str in the bank, got"):
        fitted.partial_fit([a], [4])
    with pytest.raises(ValueError, match="No images were passed"):
        fitted.predict([])
    with pytest.raises(ValueError, match="multiples of 16 pixels"):
        make(backbone, geometry=ImageGeometry(size=(20, 20)))
    with pytest.raises(ValueError, match=r"timesteps=\(0, 2000\) exceeds the 1000 timesteps"):
        make(backbone, scoring=replace(SCORING, timesteps=(0, 2000)))
    with pytest.raises(ValueError, match=r"window\(0, 1200\) is empty or outside the schedule"):
        make(backbone, scoring=replace(SCORING, weighting="window(0, 1200)"))
    assert not hasattr(new, "classes_")
    with pytest.raises(ValueError):
        fitted.score([a, b], ["a320"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": 0}, "trials=0"),
        ({"timesteps": (9, 9)}, "timesteps="),
        ({"weighting": "auto"}, "pass folds=2 or more"),
        ({"temperature": None}, "pass folds=2 or more"),
        ({"temperature": 0.0}, "temperature=0"),
        ({"folds": 1}, "folds=1; pass 2 or more, or 0"),
        ({"folds": -1}, "folds=-1"),
        ({"weighting": "window(900, 1000)", "timesteps": (0, 900)}, "lies inside window"),
        ({"weighting": "nonsense"}, "no such weighting"),
        ({"decide": "guess"}, "decide='guess'; pass one of"),
        ({"decide": "published"}, r"must end with \(24, 1\)"),
        ({"decide": "published", "trials": 500, "density": "importance"}, "stand on an even grid"),
        ({"confidence": 1.0}, "confidence=1.0"),
    ],
)
def test_a_scoring_config_is_checked_before_anything_is_trained(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScoringConfig(**changes)


def test_a_bank_whose_backbone_has_moved_says_which_and_what_to_pass(
    backbone_folder: Path, pictures: dict[str, list[Path]], tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(backbone_folder, tmp_path / "sd"))
    make(Backbone.from_pretrained(moved)).fit(*shots_of(pictures, ["a320", "dc-9"])).save_pretrained(tmp_path / "bank")
    moved.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"backbone of the bank in .*bank is not there; pass backbone= .*/sd"):
        DiTiClassifier.from_pretrained(tmp_path / "bank")
    assert DiTiClassifier.from_pretrained(tmp_path / "bank", tmp_path / "elsewhere").classes_.tolist() == [
        "a320",
        "dc-9",
    ]
