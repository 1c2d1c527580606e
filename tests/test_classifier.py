"""The classifier: labels come back as they went in, sources agree, and nothing but pixels decides."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_tiny_backbone
from PIL import Image
from sklearn.metrics import accuracy_score

from fewshot_diti import Backbone, Bank, DiTiClassifier, ScoringConfig, TrainingConfig, TrainingError
from fewshot_diti.data.images import ImageGeometry, ImageSource
from fewshot_diti.learning import Groups, Learner
from fewshot_diti.training import ClassShots, Label

TRAINING = TrainingConfig(
    steps=3, rank=2, lr_unet=5e-2, lr_text_encoder=5e-2, shots_per_step=2, prior_weight=0.0, colour_variants=2
)
SCORING = ScoringConfig(trials=5, temperature=0.01)
COLOURS = {"a320": (220, 40, 40), "dc-9": (40, 200, 60), "tu-154": (60, 60, 230), "747": (200, 200, 30)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Four pictures a class: noise of the class's colour, of various sizes."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    out: dict[str, list[Path]] = {}
    for label, colour in COLOURS.items():
        for i in range(4):
            pixels = np.clip(np.array(colour) + rng.normal(0, 40, (20 + i, 37, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{label} {i}.png")
            out.setdefault(label, []).append(folder / f"{label} {i}.png")
    return out


def shots_of(pictures: dict[str, list[Path]], labels: Sequence[str], count: int = 2) -> tuple[list[Path], list[str]]:
    return [p for x in labels for p in pictures[x][:count]], [x for x in labels for _ in range(count)]


def make(backbone: Backbone, **changes: object) -> DiTiClassifier:
    return DiTiClassifier(backbone, **{"training": TRAINING, "scoring": SCORING, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def fitted(backbone: Backbone, pictures: dict[str, list[Path]]) -> DiTiClassifier:
    return make(backbone).fit(*shots_of(pictures, ["tu-154", "a320", "dc-9"]))


@pytest.fixture(scope="module")
def tests(pictures: dict[str, list[Path]]) -> list[Path]:
    return [pictures[x][3] for x in ("a320", "dc-9", "tu-154")]


def test_predictions_are_labels_and_probabilities_sum_to_one(fitted: DiTiClassifier, tests: list[Path]) -> None:
    assert fitted.classes_.tolist() == ["a320", "dc-9", "tu-154"]
    probabilities = fitted.predict_proba(tests)
    assert probabilities.shape == (3, 3)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-12)
    labels = fitted.predict(tests)
    assert labels.tolist() == fitted.classes_[probabilities.argmax(1)].tolist()
    truth = ["a320", "dc-9", "tu-154"]
    assert accuracy_score(truth, labels) == fitted.score(tests, truth)


def test_one_image_gives_one_label_and_one_row(fitted: DiTiClassifier, tests: list[Path]) -> None:
    label = fitted.predict(tests[0])
    assert type(label) is str
    assert label == fitted.predict(tests)[0]
    np.testing.assert_array_equal(fitted.predict_proba(tests[0]), fitted.predict_proba(tests)[0])


def test_paths_pil_images_arrays_and_bytes_of_one_picture_agree(fitted: DiTiClassifier, tests: list[Path]) -> None:
    path = tests[0]
    image = Image.open(path)
    array = np.asarray(image)
    expected = fitted.predict_proba(path)
    for source in (str(path), image, array, path.read_bytes()):
        fitted._errors.clear()
        np.testing.assert_array_equal(fitted.predict_proba(source), expected)
    for many in (np.stack([array, array]), np.array([str(path)] * 2), (path, image)):
        np.testing.assert_array_equal(fitted.predict_proba(many), np.stack([expected] * 2))


def test_neither_file_names_nor_order_nor_neighbours_change_an_error_by_a_bit(
    fitted: DiTiClassifier, tests: list[Path], tmp_path: Path
) -> None:
    fitted._errors.clear()
    expected = fitted.errors(tests)
    renamed = [Path(shutil.copy(p, tmp_path / f"{i} is surely a dc-9.png")) for i, p in enumerate(reversed(tests))]
    fitted._errors.clear()
    assert torch.equal(fitted.errors(renamed).flip(0), expected)
    for i, path in enumerate(tests):
        fitted._errors.clear()
        assert torch.equal(fitted.errors([path])[0], expected[i])


def test_a_removed_class_is_gone_and_the_others_score_as_before(
    backbone: Backbone, pictures: dict[str, list[Path]], tests: list[Path]
) -> None:
    classifier = make(backbone).fit(*shots_of(pictures, ["tu-154", "a320", "dc-9"]))
    before = classifier.errors(tests)
    assert classifier.remove(["dc-9"]).classes_.tolist() == ["a320", "tu-154"]
    torch.testing.assert_close(classifier.errors(tests), before[:, [0, 2]], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="dc-9"):
        classifier.remove(["dc-9"])


@pytest.mark.parametrize("labels", [("b", "a"), (7, -3), (True, False), (np.int64(7), np.int64(9))])
def test_labels_come_back_with_their_type(
    backbone: Backbone, pictures: dict[str, list[Path]], tmp_path: Path, labels: tuple
) -> None:
    images, _ = shots_of(pictures, ["a320", "dc-9"], 1)
    classifier = make(backbone, training=replace(TRAINING, steps=1)).fit(images, labels)
    plain = sorted(x.item() if isinstance(x, np.generic) else x for x in labels)
    assert classifier.classes_.tolist() == plain
    one = classifier.predict(images[0])
    assert type(one) is type(plain[0])
    classifier.save_pretrained(tmp_path)
    again = DiTiClassifier.from_pretrained(tmp_path, backbone)
    assert [type(x) for x in again.classes_.tolist()] == [type(x) for x in plain]
    assert classifier.score(images, labels) in (0.0, 0.5, 1.0)
    assert accuracy_score(list(labels), classifier.predict(images)) == classifier.score(images, labels)


def test_a_label_array_and_a_repeated_picture_are_taken(backbone: Backbone, pictures: dict[str, list[Path]]) -> None:
    images, labels = shots_of(pictures, ["a320", "dc-9"])
    twice = make(backbone).fit([*images, Image.open(images[0])], np.array([*labels, labels[0]]))
    assert twice.bank_ is not None
    assert [t.num_shots for t in twice.bank_.tokens] == [2, 2]
    assert torch.equal(twice.bank_.rows, _bank(make(backbone).fit(images, labels)).rows)


def test_partial_fit_leaves_the_other_classes_and_the_calibration_alone(
    backbone: Backbone, pictures: dict[str, list[Path]], tests: list[Path]
) -> None:
    start = make(backbone).fit(*shots_of(pictures, ["a320", "dc-9"]))
    before, errors, calibration = _bank(start), start.errors(tests), start.calibration_
    start.partial_fit(*shots_of(pictures, ["tu-154"], 3)).partial_fit(*shots_of(pictures, ["747"], 1))
    assert start.classes_.tolist() == ["747", "a320", "dc-9", "tu-154"]
    assert torch.equal(_bank(start).rows[1:3], before.rows)
    assert start.calibration_ == calibration
    torch.testing.assert_close(start.errors(tests)[:, 1:3], errors, rtol=0, atol=1e-5)

    other = make(backbone).fit(*shots_of(pictures, ["a320", "dc-9"]))
    other.partial_fit(*shots_of(pictures, ["747"], 1)).partial_fit(*shots_of(pictures, ["tu-154"], 3))
    assert other.calibration_ == calibration
    assert _bank(other).tokens == _bank(start).tokens
    assert torch.equal(_bank(other).rows, _bank(start).rows)


def test_classes_added_later_equal_those_trained_with_the_first(
    backbone: Backbone, pictures: dict[str, list[Path]], fitted: DiTiClassifier
) -> None:
    later = make(backbone).fit(*shots_of(pictures, ["a320", "dc-9"])).partial_fit(*shots_of(pictures, ["tu-154"]))
    # in fp32, Adam turns the rounding of a gradient near zero into a part of a step; in float64 see test_training
    assert (_bank(later).rows - _bank(fitted).rows).norm() < 1e-4 * _bank(fitted).rows.norm()


def test_a_classifier_comes_back_with_the_same_predictions(
    fitted: DiTiClassifier, backbone: Backbone, tests: list[Path], tmp_path: Path
) -> None:
    fitted.save_pretrained(tmp_path)
    again = DiTiClassifier.from_pretrained(tmp_path, backbone)
    np.testing.assert_array_equal(again.predict_proba(tests), fitted.predict_proba(tests))
    assert torch.equal(again.errors(tests), fitted.errors(tests))
    for name in ("calibration_", "scoring", "training", "geometry", "concept", "prompt_template", "generic_prompt"):
        assert getattr(again, name) == getattr(fitted, name), name
    assert Bank.load(tmp_path).labels == ("a320", "dc-9", "tu-154")


def test_what_does_not_belong_together_is_not_loaded(
    fitted: DiTiClassifier, backbone: Backbone, tmp_path: Path
) -> None:
    _bank(fitted).save(tmp_path / "bank")
    with pytest.raises(FileNotFoundError, match=r"names no classifier\.json"):
        DiTiClassifier.from_pretrained(tmp_path / "bank", backbone)
    fitted.save_pretrained(tmp_path / "all")
    other = Backbone.from_pretrained(save_tiny_backbone(tmp_path / "sd", seed=1), dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="was trained on backbone"):
        DiTiClassifier.from_pretrained(tmp_path / "all", other)
    settings = tmp_path / "all" / "classifier.json"
    settings.write_text(settings.read_text().replace("0.01", "0.02"))
    with pytest.raises(ValueError, match=r"classifier\.json.* is not the file"):
        DiTiClassifier.from_pretrained(tmp_path / "all", backbone)


@pytest.mark.parametrize(
    "weighting",
    ["uniform", "window(0, 400)", "pdae", "pdae(0.2)", "tif", "tif(10)", "tif_released(10)", "tif_released", "spread"],
)
def test_every_weighting_runs(
    backbone: Backbone, pictures: dict[str, list[Path]], tests: list[Path], weighting: str
) -> None:
    scoring = replace(SCORING, weighting=weighting)
    training = replace(TRAINING, steps=1)
    classifier = make(backbone, training=training, scoring=scoring).fit(*shots_of(pictures, ["a320", "dc-9"], 1))
    weights = np.array(classifier.calibration_.weights)
    assert classifier.calibration_.timesteps == (100, 300, 500, 700, 900)
    assert (weights >= 0).all()
    assert weights.any()
    if weighting == "window(0, 400)":
        assert weights.tolist() == [2.5, 2.5, 0, 0, 0]
    assert weights.mean() == pytest.approx(1)
    assert set(classifier.predict(tests)) <= {"a320", "dc-9"}
    assert classifier.calibration_.accuracy is None


@pytest.mark.parametrize("weighting", ["auto", "spread", "uniform"])
def test_folds_hold_every_shot_out_once_though_there_are_fewer_shots_than_folds(
    backbone: Backbone, pictures: dict[str, list[Path]], weighting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [*pictures["a320"][:3], *pictures["dc-9"][:2]]
    labels = ["a320"] * 3 + ["dc-9"] * 2
    scoring = replace(SCORING, weighting=weighting, temperature=None, folds=5)
    seen: list[tuple[str, list[int]]] = []

    train = Learner.train

    def recorded(self: Learner, groups: Groups, *, desc: str = "class tokens") -> object:
        seen.append((desc, [len(groups[x]) for x in sorted(groups)]))
        return train(self, groups, desc=desc)

    monkeypatch.setattr(Learner, "train", recorded)
    classifier = make(backbone, training=replace(TRAINING, steps=1), scoring=scoring).fit(images, labels)
    assert seen == [
        ("class tokens", [3, 2]),
        ("fold 1 of 3", [2, 1]),
        ("fold 2 of 3", [2, 1]),
        ("fold 3 of 3", [2, 2]),
    ]
    calibration = classifier.calibration_
    assert calibration.accuracy in [n / 5 for n in range(6)]
    assert calibration.temperature > 0
    if weighting == "auto":
        assert len(set(calibration.weights) - {0.0}) == 1


def test_one_shot_falls_back_to_what_is_recommended_and_says_so(
    backbone: Backbone, pictures: dict[str, list[Path]]
) -> None:
    scoring = replace(SCORING, weighting="auto", temperature=None, folds=3)
    classifier = make(backbone, training=replace(TRAINING, steps=1), scoring=scoring)
    with pytest.warns(UserWarning, match=r"Classes \['dc-9'\] have one shot, .* folds=3 is ignored"):
        classifier.fit([*pictures["a320"][:2], pictures["dc-9"][0]], ["a320", "a320", "dc-9"])
    assert classifier.calibration_.accuracy is None
    assert classifier.calibration_.temperature > 0


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
    torch.testing.assert_close(_bank(classifier).rows, _bank(alone).rows, rtol=0, atol=1e-4)
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


def test_prior_images_of_the_generic_prompt_are_made_once(
    backbone: Backbone, pictures: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    training = replace(TRAINING, steps=1, prior_weight=1.0, prior_images=2)
    classifier = make(backbone, training=training, concept="engine part").fit(*shots_of(pictures, ["a320", "dc-9"], 1))
    assert classifier.generic_prompt == "a photo of an engine part"
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


def test_prompts_name_class_and_concept(backbone: Backbone) -> None:
    assert make(backbone).learner.class_prompt("A320") == "a photo of a hta A320, a type of aircraft."
    assert make(backbone, concept="car").generic_prompt == "a photo of a car"
    assert make(backbone, prompt_template="a picture of {}.").learner.class_prompt(3) == "a picture of 3."


def test_a_bank_remembers_its_geometry(backbone: Backbone, pictures: dict[str, list[Path]], tmp_path: Path) -> None:
    geometry = ImageGeometry(size=(16, 16), resize="squash")
    classifier = make(backbone, training=replace(TRAINING, steps=1), geometry=geometry)
    classifier.fit(*shots_of(pictures, ["a320", "dc-9"], 1)).save_pretrained(tmp_path)
    again = DiTiClassifier.from_pretrained(tmp_path, backbone)
    assert again.geometry == geometry
    assert again.predict(pictures["a320"][3]) in ("a320", "dc-9")


def test_errors_say_what_is_wrong(
    backbone: Backbone, fitted: DiTiClassifier, pictures: dict[str, list[Path]], tmp_path: Path
) -> None:
    a, b = pictures["a320"][:2]
    new = make(backbone)
    with pytest.raises(ValueError, match="2 images but 1 labels"):
        new.fit([a, b], ["x"])
    with pytest.raises(ValueError, match="0 images but 0 labels"):
        new.fit([], [])
    with pytest.raises(ValueError, match=r"two classes or more, got \['x'\]"):
        new.fit([a, b], ["x", "x"])
    with pytest.raises(ValueError, match=r"all str, all int or all bool, got \['int', 'str'\]"):
        new.fit([a, b], ["x", 1])
    with pytest.raises(ValueError, match=r"all str, all int or all bool, got \['float'\]"):
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
    with pytest.raises(ValueError, match=r"timesteps=\(0, 2000\) exceeds the 1000 time-steps"):
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
    ],
)
def test_a_scoring_config_is_checked_before_anything_is_trained(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScoringConfig(**changes)


def _bank(classifier: DiTiClassifier) -> Bank:
    assert classifier.bank_ is not None
    return classifier.bank_
