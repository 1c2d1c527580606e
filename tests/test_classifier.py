"""The classifier: labels come back as they went in, sources agree, and nothing but pixels decides."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save_tiny_backbone
from PIL import Image
from sklearn.metrics import accuracy_score
from small_classifier import PREDICTION, SCORING, TRAINING, bank_of, make, shots_of

from fewshot_diti import Backbone, Bank, DiTiClassifier, PredictionConfig
from fewshot_diti.config import Label
from fewshot_diti.data.images import ImageGeometry
from fewshot_diti.presets import PRESETS
from fewshot_diti.weighting import fixed_weights

RACING = PredictionConfig(schedule="racing", confidence=0.99)


def test_predictions_are_labels_and_probabilities_sum_to_one(fitted: DiTiClassifier, tests: list[Path]) -> None:
    assert fitted.classes_.tolist() == ["a320", "dc-9", "tu-154"]
    probabilities = fitted.predict_proba(tests)
    assert probabilities.shape == (3, 3)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-12)
    labels = fitted.predict(tests)
    assert labels.tolist() == fitted.classes_[probabilities.argmax(1)].tolist()


def test_probabilities_are_the_softmax_of_scores_over_the_temperature(
    fitted: DiTiClassifier, tests: list[Path]
) -> None:
    powers = np.exp(-fitted.scores(tests).numpy() / fitted.calibration_.temperature)
    assert fitted.calibration_.temperature == 0.01
    np.testing.assert_allclose(fitted.predict_proba(tests), powers / powers.sum(1, keepdims=True), rtol=1e-9)


def test_the_score_is_the_share_of_right_labels_and_may_be_weighted(fitted: DiTiClassifier, tests: list[Path]) -> None:
    labels = fitted.predict(tests).tolist()
    wrong = ["a320" if label != "a320" else "dc-9" for label in labels]
    assert fitted.score(tests, labels) == 1
    assert fitted.score(tests, wrong) == 0
    some = [labels[0], *wrong[1:]]
    assert fitted.score(tests, some) == accuracy_score(some, labels) == pytest.approx(1 / 3)
    assert fitted.score(tests, some, sample_weight=[2, 1, 1]) == 0.5


def test_one_image_gives_one_label_and_one_row(fitted: DiTiClassifier, tests: list[Path]) -> None:
    label = fitted.predict(tests[0])
    assert type(label) is str
    assert label == fitted.predict(tests)[0]
    np.testing.assert_array_equal(fitted.predict_proba(tests[0]), fitted.predict_proba(tests)[0])


def test_paths_pil_images_arrays_and_bytes_of_one_picture_agree(fitted: DiTiClassifier, tests: list[Path]) -> None:
    path = tests[0]
    image = Image.open(path)
    array = np.asarray(image)
    expected = fitted.errors([path])  # which are computed each time
    for source in (str(path), image, array, path.read_bytes()):
        assert torch.equal(fitted.errors([source]), expected)
    for many in (np.stack([array, array]), np.array([str(path)] * 2), (path, image)):
        assert torch.equal(fitted.errors(many), torch.cat([expected, expected]))
        np.testing.assert_array_equal(fitted.predict_proba(many), np.stack([fitted.predict_proba(path)] * 2))


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
    assert classifier.remove_classes(["dc-9"]).classes_.tolist() == ["a320", "tu-154"]
    torch.testing.assert_close(classifier.errors(tests), before[:, [0, 2]], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="dc-9"):
        classifier.remove_classes(["dc-9"])


@pytest.mark.parametrize("labels", [("b", "a"), (7, -3), (True, False), (np.int64(7), np.int64(9))])
def test_labels_come_back_with_their_type(
    backbone: Backbone, pictures: dict[str, list[Path]], tmp_path: Path, labels: tuple
) -> None:
    images, _ = shots_of(pictures, ["a320", "dc-9"], 1)
    classifier = make(backbone, training=replace(TRAINING, steps=1)).fit(images, labels)
    plain = sorted(x.item() if isinstance(x, np.generic) else x for x in labels)
    assert classifier.classes_.tolist() == plain
    chosen = [plain[c] for c in classifier.errors(images).mean(2).argmin(1)]
    assert classifier.predict(images).tolist() == chosen
    one = classifier.predict(images[0])
    assert one == chosen[0] and type(one) is type(plain[0])
    classifier.save_pretrained(tmp_path)
    again = DiTiClassifier.from_pretrained(tmp_path, backbone)
    assert again.predict(images).tolist() == chosen
    assert [type(x) for x in again.classes_.tolist()] == [type(x) for x in plain]
    assert again.score(images, labels) == np.mean([a == b for a, b in zip(chosen, labels, strict=True)])


def test_a_label_array_and_a_repeated_picture_are_taken(backbone: Backbone, pictures: dict[str, list[Path]]) -> None:
    images, labels = shots_of(pictures, ["a320", "dc-9"])
    twice = make(backbone).fit([*images, Image.open(images[0])], np.array([*labels, labels[0]]))
    assert [t.num_shots for t in bank_of(twice).tokens] == [2, 2]
    assert torch.equal(bank_of(twice).rows, bank_of(make(backbone).fit(images, labels)).rows)


def test_added_classes_leave_the_others_and_the_calibration_alone(
    backbone: Backbone, pictures: dict[str, list[Path]], tests: list[Path]
) -> None:
    start = make(backbone).fit(*shots_of(pictures, ["a320", "dc-9"]))
    before, errors, calibration = bank_of(start), start.errors(tests), start.calibration_
    start.add_classes(*shots_of(pictures, ["tu-154"], 3)).add_classes(*shots_of(pictures, ["747"], 1))
    assert start.classes_.tolist() == ["747", "a320", "dc-9", "tu-154"]
    assert torch.equal(bank_of(start).rows[1:3], before.rows)
    assert start.calibration_ == calibration
    torch.testing.assert_close(start.errors(tests)[:, 1:3], errors, rtol=0, atol=1e-5)

    other = make(backbone).fit(*shots_of(pictures, ["a320", "dc-9"]))
    other.add_classes(*shots_of(pictures, ["747"], 1)).add_classes(*shots_of(pictures, ["tu-154"], 3))
    assert other.calibration_ == calibration
    assert bank_of(other) == bank_of(start)


def test_classes_added_later_equal_those_trained_with_the_first(
    backbone: Backbone, pictures: dict[str, list[Path]], fitted: DiTiClassifier
) -> None:
    later = make(backbone).fit(*shots_of(pictures, ["a320", "dc-9"])).add_classes(*shots_of(pictures, ["tu-154"]))
    # in fp32, Adam turns the rounding of a gradient near zero into a part of a step; in float64 see test_training
    assert (bank_of(later).rows - bank_of(fitted).rows).norm() < 1e-4 * bank_of(fitted).rows.norm()


@pytest.mark.parametrize("weighting", ["relative", "window(100, 600)", "tif"])
def test_a_race_gives_the_labels_of_all_trials_for_fewer_evaluations(
    backbone: Backbone, pictures: dict[str, list[Path]], tests: list[Path], weighting: str
) -> None:
    scoring = replace(SCORING, trials=40, timesteps=(50, 950), density="importance", weighting=weighting)
    classifier = make(backbone, scoring=scoring, prediction=RACING)
    raced = classifier.fit(*shots_of(pictures, ["tu-154", "a320", "dc-9"]))
    times = np.array(raced.calibration_.timesteps)
    lo, hi = (100, 600) if weighting.startswith("window") else (50, 950)
    assert lo <= times.min() and times.max() < hi and (np.diff(times) >= 0).all()
    decisions = raced.decide(tests)
    spent = [d.evaluations for d in decisions]
    assert all(12 <= n <= 120 for n in spent) and sum(spent) < 3 * 120
    errors = raced.errors(tests).double() * torch.tensor(raced.calibration_.weights)
    assert [d.position for d in decisions] == errors.mean(2).argmin(1).tolist()
    assert raced.predict(tests).tolist() == raced.classes_[raced.scores(tests).argmin(1).numpy()].tolist()


def test_a_classifier_comes_back_with_the_same_predictions(
    fitted: DiTiClassifier, backbone: Backbone, tests: list[Path], tmp_path: Path
) -> None:
    fitted.save_pretrained(tmp_path)
    again = DiTiClassifier.from_pretrained(tmp_path, backbone)
    np.testing.assert_array_equal(again.predict_proba(tests), fitted.predict_proba(tests))
    assert torch.equal(again.errors(tests), fitted.errors(tests))
    for name in ("calibration_", "settings_", "geometry_", "prompts_", "complete_", "concept", "training"):
        assert getattr(again, name) == getattr(fitted, name), name
    assert fitted.complete_
    assert Bank.from_pretrained(tmp_path).labels == ("a320", "dc-9", "tu-154")


def test_a_merged_bank_is_scored_uncalibrated_with_a_warning(
    fitted: DiTiClassifier, backbone: Backbone, tests: list[Path], tmp_path: Path
) -> None:
    bank = bank_of(fitted)
    bank.select(bank.labels[:1]).merge(bank.select(bank.labels[1:])).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"a bank without a classifier's settings.*uncalibrated"):
        merged = DiTiClassifier.from_pretrained(tmp_path, backbone)
    assert merged.classes_.tolist() == fitted.classes_.tolist() and not merged.complete_
    preset = PRESETS["pocket"]
    assert len(merged.calibration_.timesteps) == preset.scoring["trials"]
    assert set(merged.calibration_.weights) == {1.0}
    assert merged.calibration_.temperature == preset.temperature_of(2)
    merged.prediction = PredictionConfig(schedule="exhaustive")
    torch.testing.assert_close(merged.scores(tests), merged.errors(tests).double().mean(2))


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
def test_every_weighting_weighs_the_errors_that_decide(
    backbone: Backbone, pictures: dict[str, list[Path]], tests: list[Path], weighting: str
) -> None:
    scoring = replace(SCORING, weighting=weighting)
    training = replace(TRAINING, steps=1)
    classifier = make(backbone, training=training, scoring=scoring).fit(*shots_of(pictures, ["a320", "dc-9"], 1))
    weights = torch.tensor(classifier.calibration_.weights, dtype=torch.float64)
    times = classifier.calibration_.timesteps
    if weighting == "window(0, 400)":  # trials are spent where they count
        assert times == (40, 120, 200, 280, 360)
    elif weighting.startswith("tif_released"):
        assert times[0] > 100 and times == tuple(sorted(times))
    else:
        assert times == (100, 300, 500, 700, 900)
    assert (weights > 0).all()
    assert float(weights.mean()) == pytest.approx(1)
    if (fixed := fixed_weights(weighting, backbone.alphas_cumprod)) is not None:
        torch.testing.assert_close(weights, fixed[list(times)] / fixed[list(times)].mean())
    expected = (classifier.errors(tests).double() * weights).mean(2)
    torch.testing.assert_close(classifier.scores(tests), expected)
    assert classifier.predict(tests).tolist() == classifier.classes_[expected.argmin(1).numpy()].tolist()
    assert classifier.calibration_.accuracy is None


def test_prior_images_of_the_generic_prompt_are_made_once(
    backbone: Backbone, pictures: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    training = replace(TRAINING, steps=1, prior_weight=1.0, prior_images=2)
    for _ in range(2):
        classifier = make(backbone, training=training, concept="engine part")
        classifier.fit(*shots_of(pictures, ["a320", "dc-9"], 1))
        files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
        assert len(files) == 2
    assert classifier.prompts_.generic == "a photo of an engine part"
    assert files == {path: path.stat().st_mtime_ns for path in files}


def test_prompts_name_class_and_concept(
    fitted: DiTiClassifier, backbone: Backbone, pictures: dict[str, list[Path]]
) -> None:
    assert fitted.prompts_.of_class("A320") == "a photo of a hta A320, a type of aircraft."
    images = shots_of(pictures, ["a320", "dc-9"], 1)
    other = make(backbone, training=replace(TRAINING, steps=1), concept="car", prompt_template="a picture of {}.")
    other.fit(images[0], [3, 4])
    assert other.prompts_.generic == "a photo of a car"
    assert [token.prompt for token in bank_of(other).tokens] == ["a picture of 3.", "a picture of 4."]


def test_a_bank_remembers_its_geometry(backbone: Backbone, pictures: dict[str, list[Path]], tmp_path: Path) -> None:
    geometry = ImageGeometry(size=(16, 16), resize="squash")
    classifier = make(backbone, training=replace(TRAINING, steps=1), geometry=geometry)
    classifier.fit(*shots_of(pictures, ["a320", "dc-9"], 1)).save_pretrained(tmp_path)
    again = DiTiClassifier.from_pretrained(tmp_path, backbone)
    assert again.geometry_ == geometry
    image = pictures["a320"][3]
    assert torch.equal(again.errors([image]), classifier.errors([image]))
    assert again.encoder_.prepare(image).pixels_CHW.shape == (3, 16, 16)


def test_the_schedule_of_a_saved_classifier_is_kept(
    backbone: Backbone, pictures: dict[str, list[Path]], tests: list[Path], tmp_path: Path
) -> None:
    classifier = make(backbone, prediction=RACING).fit(*shots_of(pictures, ["a320", "dc-9"]))
    classifier.prediction = replace(PREDICTION, batch_size=7)
    classifier.save_pretrained(tmp_path)
    again = DiTiClassifier.from_pretrained(tmp_path, backbone)
    assert again.current_prediction() == classifier.current_prediction()
    assert torch.equal(again.scores(tests), classifier.scores(tests))


def test_what_is_called_after_each_step_gets_the_class_tokens_as_they_are_then(
    backbone: Backbone, pictures: dict[str, list[Path]]
) -> None:
    seen = {}

    def watch(step: int, losses: Mapping[Label, float], bank: Callable[[], Bank]) -> None:
        seen[step] = dict(losses), bank()

    shots = shots_of(pictures, ["tu-154", "a320"])
    whole = make(backbone).fit(*shots, on_step=watch)
    assert list(seen) == [1, 2, 3]
    assert all(list(losses) == ["a320", "tu-154"] and min(losses.values()) > 0 for losses, _ in seen.values())
    assert seen[3][1] == whole.bank_
    assert seen[2][1] == make(backbone, training=replace(TRAINING, steps=2)).fit(*shots).bank_
