"""What the classifier refuses, and what is left where a class fails."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.exceptions import NotFittedError
from small_classifier import SCORING, TRAINING, bank_of, make, shots_of

from fewshot_diti import Backbone, Bank, DiTiClassifier, PredictionConfig, ScoringConfig, TrainingConfig, TrainingError
from fewshot_diti import training as training_module
from fewshot_diti.config import Label
from fewshot_diti.data.images import ImageGeometry
from fewshot_diti.encoding import Encoder, PreparedImage
from fewshot_diti.prompts import Prompts
from fewshot_diti.training import ClassShots

ONE_STEP = replace(TRAINING, steps=1)


def poison(monkeypatch: pytest.MonkeyPatch, is_bad: Callable[[Label, int], bool]) -> None:
    """Makes the shots infinite where `is_bad` (label, number of shots) says so."""
    class_shots = training_module.class_shots

    def infinite(
        encoder: Encoder, label: Label, images: Sequence[PreparedImage], prompts: Prompts, training: TrainingConfig
    ) -> ClassShots:
        shots = class_shots(encoder, label, images, prompts, training)
        return replace(shots, mean=shots.mean + float("inf")) if is_bad(label, len(images)) else shots

    monkeypatch.setattr(training_module, "class_shots", infinite)


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
    scoring = replace(SCORING, weighting="auto", temperature="fit", folds=3)
    classifier = make(backbone, training=ONE_STEP, scoring=scoring)
    with pytest.raises(TrainingError, match="'dc-9'"):
        classifier.fit(*shots_of(pictures, ["a320", "dc-9"], 3))
    assert classifier.classes_.tolist() == ["a320", "dc-9"]
    assert not classifier.complete_ and classifier.calibration_.accuracy is None
    assert set(classifier.calibration_.weights) == {1.0}  # uncalibrated: all trials count the same
    expected = classifier.errors(tests).double().mean(2)
    torch.testing.assert_close(classifier.scores(tests), expected)
    alone = make(backbone, training=ONE_STEP).fit(*shots_of(pictures, ["a320", "dc-9"], 3))
    torch.testing.assert_close(bank_of(classifier).rows, bank_of(alone).rows, rtol=0, atol=1e-4)


def test_a_class_that_fails_is_named_even_where_another_fails_in_a_fold(
    backbone: Backbone, pictures: dict[str, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, lambda label, count: label == "dc-9" or (label == "a320" and count < 3))
    classifier = make(backbone, scoring=replace(SCORING, weighting="auto", temperature="fit", folds=3))
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
    assert Bank.from_pretrained(tmp_path).labels == ("a320", "tu-154")
    with pytest.raises(TrainingError, match="'dc-9'"):
        classifier.add_classes(*shots_of(pictures, ["dc-9", "747"]))
    assert classifier.classes_.tolist() == ["747", "a320", "tu-154"]


@pytest.mark.usefixtures("poisoned")
def test_the_failure_is_named_where_a_single_class_is_left(backbone: Backbone, pictures: dict[str, list[Path]]) -> None:
    classifier = make(backbone, training=TRAINING, scoring=replace(SCORING, weighting="spread"))
    with pytest.raises(TrainingError, match="'dc-9'"):
        classifier.fit(*shots_of(pictures, ["a320", "dc-9"]))
    assert classifier.classes_.tolist() == ["a320"]


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        ((0, 1), ["x"], "2 images but 1 labels"),
        ((), [], "No images were passed"),
        ((0, 1), "xy", "labels='xy' is one text"),
        ((0, 1), ["x", "x"], r"two classes or more, got \['x'\]"),
        ((0, 1), ["x", 1], r"all str, all int or all bool, got \['int', 'str'\]"),
        ((0, 1), [1.0, 2.0], r"all str, all int or all bool, got \['float'\], label 0 being 1\.0"),
        ((0, 1, 0), ["x", "y", "y"], r"One picture \(.+\) is given as 'x' and as 'y'"),
    ],
)
def test_fit_says_what_is_wrong_with_images_and_labels(
    backbone: Backbone, pictures: dict[str, list[Path]], rows: tuple[int, ...], labels: list, message: str
) -> None:
    classifier = make(backbone)
    with pytest.raises(ValueError, match=message):
        classifier.fit([Image.open(pictures["a320"][row]) for row in rows], labels)
    assert classifier.bank_ is None
    with pytest.raises(NotFittedError, match="no class tokens yet; call fit"):
        classifier.predict(pictures["a320"][0])


def test_images_that_cannot_be_read_are_all_named(
    backbone: Backbone, pictures: dict[str, list[Path]], tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    images = [pictures["a320"][0], tmp_path / "nothing.png", tmp_path / "broken.png"]
    with pytest.raises((FileNotFoundError, ValueError)) as raised:
        make(backbone).fit(images, ["x", "y", "z"])
    assert "nothing.png" in str(raised.value) and "broken.png" in str(raised.value)


def test_added_classes_and_scores_say_what_is_wrong(fitted: DiTiClassifier, pictures: dict[str, list[Path]]) -> None:
    a, b = pictures["a320"][:2]
    with pytest.raises(ValueError, match=r"Classes \['dc-9'\] are in the bank already; call remove_classes first"):
        fitted.add_classes([a], ["dc-9"])
    with pytest.raises(ValueError, match="Labels are str in the bank, got"):
        fitted.add_classes([a], [4])
    with pytest.raises(ValueError, match="No images were passed"):
        fitted.predict([])
    with pytest.raises(ValueError, match="2 images but 1 labels"):
        fitted.score([a, b], ["a320"])
    with pytest.raises(ValueError, match="Labels are str in the bank, got int"):
        fitted.score([a, b], [1, 2])


def test_one_image_where_many_belong_is_one_clear_error(
    fitted: DiTiClassifier, pictures: dict[str, list[Path]]
) -> None:
    path = pictures["a320"][0]
    for image in (path, str(path), Image.open(path), path.read_bytes()):
        for ask in (fitted.decide, fitted.scores, fitted.errors):
            with pytest.raises(ValueError, match=r"One image was passed where a list is needed .*; pass \[image\]"):
                ask(image)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="One image was passed where a list is needed"):
            make(fitted.backbone_).fit(image, ["x"])  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="One image was passed where a list is needed"):
            fitted.score(image, ["a320"])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"geometry": ImageGeometry(size=(20, 20))}, "multiples of 16 pixels"),
        ({"scoring": replace(SCORING, timesteps=(0, 2000))}, r"scoring with timesteps=\(0, 2000\) exceeds .* 1000"),
        ({"training": replace(TRAINING, timesteps=(0, 2000))}, r"training with timesteps=\(0, 2000\) exceeds .* 1000"),
        ({"scoring": replace(SCORING, weighting="window(0, 1200)")}, r"window\(0, 1200\)' exceeds the backbone's 1000"),
        ({"prediction": PredictionConfig(schedule="published")}, r"must end with \(5, 1\)"),
        (
            {
                "prediction": PredictionConfig(schedule="published", stages=((2, 2), (5, 1))),
                "scoring": replace(SCORING, density="importance"),
            },
            "Published stages need an even grid",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused_before_training(
    backbone: Backbone,
    pictures: dict[str, list[Path]],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict,
    message: str,
) -> None:
    monkeypatch.setattr(training_module, "train_class_tokens", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(ValueError, match=message):
        make(backbone, **changes).fit(*shots_of(pictures, ["a320", "dc-9"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": 0}, "trials=0"),
        ({"timesteps": (9, 9)}, "timesteps="),
        ({"density": "odd"}, "density='odd'; pass one of"),
        ({"weighting": "auto"}, "pass folds=2 or more"),
        ({"temperature": "fit"}, "pass folds=2 or more"),
        ({"temperature": 0.0}, "temperature=0"),
        ({"folds": 1}, "folds=1; pass 2 or more, or 0"),
        ({"folds": -1}, "folds=-1"),
        ({"weighting": "window(900, 1000)", "timesteps": (0, 900)}, "lies inside window"),
        ({"weighting": "nonsense"}, "no such weighting"),
        ({"witnesses": ("features",), "witness_weights": (-1,)}, "witness_weights="),
    ],
)
def test_a_scoring_config_names_the_value_that_is_out_of_range(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScoringConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": "guess"}, "schedule='guess'; pass one of"),
        ({"confidence": 1.0}, "confidence=1.0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"shortlist": 1}, "shortlist=1"),
    ],
)
def test_a_prediction_config_names_the_value_that_is_out_of_range(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PredictionConfig(**changes)


def test_a_bank_whose_backbone_has_moved_says_which_and_what_to_pass(
    backbone_folder: Path, pictures: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # where backbones were seen
    moved = Path(shutil.copytree(backbone_folder, tmp_path / "sd"))
    make(Backbone.from_pretrained(moved)).fit(*shots_of(pictures, ["a320", "dc-9"])).save_pretrained(tmp_path / "bank")
    moved.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"Backbone 'sd' with hash \w+ is not there; pass backbone= "):
        DiTiClassifier.from_pretrained(tmp_path / "bank")
    again = DiTiClassifier.from_pretrained(tmp_path / "bank", tmp_path / "elsewhere")
    assert again.classes_.tolist() == ["a320", "dc-9"]
