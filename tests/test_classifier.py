"""The classifier: labels come back as they went in, sources agree, and nothing but pixels decides."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_tiny_backbone
from PIL import Image
from sklearn.metrics import accuracy_score
from small_classifier import SCORING, TRAINING, bank_of, make, shots_of

from fewshot_diti import Backbone, Bank, DiTiClassifier, ScoringConfig
from fewshot_diti.data.images import ImageGeometry
from fewshot_diti.learning import Groups, Learner


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
        fitted._decisions.clear()
        np.testing.assert_array_equal(fitted.predict_proba(source), expected)
    for many in (np.stack([array, array]), np.array([str(path)] * 2), (path, image)):
        np.testing.assert_array_equal(fitted.predict_proba(many), np.stack([expected] * 2))


def test_neither_file_names_nor_order_nor_neighbours_change_an_error_by_a_bit(
    fitted: DiTiClassifier, tests: list[Path], tmp_path: Path
) -> None:
    expected = fitted.errors(tests)
    renamed = [Path(shutil.copy(p, tmp_path / f"{i} is surely a dc-9.png")) for i, p in enumerate(reversed(tests))]
    assert torch.equal(fitted.errors(renamed).flip(0), expected)
    for i, path in enumerate(tests):
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
    assert torch.equal(twice.bank_.rows, bank_of(make(backbone).fit(images, labels)).rows)


def test_partial_fit_leaves_the_other_classes_and_the_calibration_alone(
    backbone: Backbone, pictures: dict[str, list[Path]], tests: list[Path]
) -> None:
    start = make(backbone).fit(*shots_of(pictures, ["a320", "dc-9"]))
    before, errors, calibration = bank_of(start), start.errors(tests), start.calibration_
    start.partial_fit(*shots_of(pictures, ["tu-154"], 3)).partial_fit(*shots_of(pictures, ["747"], 1))
    assert start.classes_.tolist() == ["747", "a320", "dc-9", "tu-154"]
    assert torch.equal(bank_of(start).rows[1:3], before.rows)
    assert start.calibration_ == calibration
    torch.testing.assert_close(start.errors(tests)[:, 1:3], errors, rtol=0, atol=1e-5)

    other = make(backbone).fit(*shots_of(pictures, ["a320", "dc-9"]))
    other.partial_fit(*shots_of(pictures, ["747"], 1)).partial_fit(*shots_of(pictures, ["tu-154"], 3))
    assert other.calibration_ == calibration
    assert bank_of(other).tokens == bank_of(start).tokens
    assert torch.equal(bank_of(other).rows, bank_of(start).rows)


def test_classes_added_later_equal_those_trained_with_the_first(
    backbone: Backbone, pictures: dict[str, list[Path]], fitted: DiTiClassifier
) -> None:
    later = make(backbone).fit(*shots_of(pictures, ["a320", "dc-9"])).partial_fit(*shots_of(pictures, ["tu-154"]))
    # in fp32, Adam turns the rounding of a gradient near zero into a part of a step; in float64 see test_training
    assert (bank_of(later).rows - bank_of(fitted).rows).norm() < 1e-4 * bank_of(fitted).rows.norm()


@pytest.mark.parametrize("weighting", ["relative", "window(100, 600)", "tif"])
def test_a_race_gives_the_labels_of_all_trials_for_fewer_evaluations(
    backbone: Backbone, pictures: dict[str, list[Path]], tests: list[Path], weighting: str
) -> None:
    scoring = ScoringConfig(
        trials=40, timesteps=(50, 950), density="importance", decide="racing", confidence=0.99, weighting=weighting
    )
    raced = make(backbone, scoring=scoring).fit(*shots_of(pictures, ["tu-154", "a320", "dc-9"]))
    times = np.array(raced.calibration_.timesteps)
    lo, hi = (100, 600) if weighting.startswith("window") else (50, 950)
    assert lo <= times.min() and times.max() < hi and (np.diff(times) >= 0).all()
    decisions = raced.decide(tests)
    spent = [d.evaluations for d in decisions]
    assert all(12 <= n <= 120 for n in spent) and sum(spent) < 3 * 120
    errors = raced.errors(tests).double() * torch.tensor(raced.calibration_.weights)
    assert [d.label for d in decisions] == errors.mean(2).argmin(1).tolist()
    assert raced.predict(tests).tolist() == raced.classes_[raced.scores(tests).argmin(1).numpy()].tolist()


def test_cross_validation_judges_shots_by_the_race_that_judges_new_images(
    backbone: Backbone, pictures: dict[str, list[Path]]
) -> None:
    images, labels = shots_of(pictures, ["a320", "dc-9"])
    scoring = ScoringConfig(trials=12, decide="racing", density="importance", folds=2, temperature=None)
    calibration = make(backbone, scoring=scoring).fit(images, labels).calibration_
    assert calibration.accuracy in (0, 0.25, 0.5, 0.75, 1) and calibration.temperature > 0


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


def test_a_merged_bank_is_scored_uncalibrated_with_a_warning(
    fitted: DiTiClassifier, backbone: Backbone, tests: list[Path], tmp_path: Path
) -> None:
    bank = bank_of(fitted)
    bank.select(bank.labels[:1]).merge(bank.select(bank.labels[1:])).save(tmp_path)
    with pytest.warns(UserWarning, match=r"a bank without a classifier's settings.*uncalibrated"):
        merged = DiTiClassifier.from_pretrained(tmp_path, backbone)
    assert merged.classes_.tolist() == fitted.classes_.tolist()
    merged.scoring = replace(merged.scoring, decide="exhaustive")
    grid = torch.tensor(merged.calibration_.timesteps)
    expected = merged.learner.shared_errors(bank, tests, grid).double().mean(2)
    torch.testing.assert_close(merged.scores(tests), expected)


def test_what_does_not_belong_together_is_not_loaded(
    fitted: DiTiClassifier, backbone: Backbone, tmp_path: Path
) -> None:
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
    [
        "uniform",
        "window(0, 400)",
        "pdae",
        "pdae(0.2)",
        "tif",
        "tif(10)",
        "tif_released(10)",
        "tif_released",
        "spread",
        "relative",
    ],
)
def test_every_weighting_runs(
    backbone: Backbone, pictures: dict[str, list[Path]], tests: list[Path], weighting: str
) -> None:
    scoring = replace(SCORING, weighting=weighting)
    training = replace(TRAINING, steps=1)
    classifier = make(backbone, training=training, scoring=scoring).fit(*shots_of(pictures, ["a320", "dc-9"], 1))
    weights = np.array(classifier.calibration_.weights)
    times = classifier.calibration_.timesteps
    if weighting == "window(0, 400)":  # trials are spent where they count
        assert times == (40, 120, 200, 280, 360) and weights.tolist() == [1.0] * 5
    elif weighting.startswith("tif_released"):
        assert times[0] > 100 and times == tuple(sorted(times))
    else:
        assert times == (100, 300, 500, 700, 900)
    assert (weights > 0).all()
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
