"""The three configurations of a classifier: filled by the preset, fixed by fit, or read at every prediction."""

from __future__ import annotations

import json
import warnings
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from small_classifier import PREDICTION, SCORING, TRAINING, make, shots_of

from fewshot_diti import Backbone, DiTiClassifier, PredictionConfig, ScoringConfig, TrainingConfig, presets
from fewshot_diti.data import ImageGeometry
from fewshot_diti.presets import PRESETS, complete, interpolate_steps, kind_of, published, recommended

ONE_STEP = replace(TRAINING, steps=1)


@pytest.fixture
def small(backbone: Backbone, pictures: dict[str, list[Path]]) -> DiTiClassifier:
    return make(backbone, training=ONE_STEP).fit(*shots_of(pictures, ["a320", "dc-9"]))


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny backbone counts as one of Stable Diffusion's kind."""
    monkeypatch.setattr(presets, "LARGE_UNET", 0)


@pytest.mark.parametrize("kind", ["pocket", "stable-diffusion"])
def test_fields_that_are_not_given_have_the_values_of_the_preset(kind: presets.Kind) -> None:
    preset = PRESETS[kind]
    settings = complete(kind, 4, TrainingConfig(rank=3), ScoringConfig(seed=1), PredictionConfig(confidence=0.8))
    plain = recommended(4, kind)
    assert settings.scoring == replace(plain.scoring, seed=1)
    assert settings.training == replace(plain.training, rank=3)
    assert settings.prediction == replace(plain.prediction, confidence=0.8)
    for config, values in (
        (plain.training, {**preset.training, "steps": preset.steps[2], "blocks": preset.blocks[2]}),
        (plain.scoring, preset.scoring),
        (plain.prediction, preset.prediction),
    ):
        assert {name: getattr(config, name) for name in values} == dict(values)
        unset = {f.name for f in fields(config) if getattr(config, f.name) is None}
        assert unset <= {"alpha", "target_modules", "shortlist"}  # where None is a value


def test_every_preset_is_whole_and_goes_with_the_schedule_of_stable_diffusion() -> None:
    for kind in PRESETS:
        for shots in (1, 2, 3, 16, 24):
            recommended(shots, kind).check(1000)
    for shots in presets.PUBLISHED_SHOTS:
        published(shots).check(1000)
    assert [kind_of(n) for n in (30_000_000, presets.LARGE_UNET, 860_000_000)] == [
        "pocket",
        "pocket",
        "stable-diffusion",
    ]


def test_steps_are_interpolated_between_the_published_numbers_of_shots() -> None:
    steps = (60, 100, 200, 700, 1000)
    assert [interpolate_steps(n, steps) for n in (1, 2, 3, 4, 6, 8, 12, 16, 24)] == [
        *(60, 100, 150, 200, 450, 700, 850, 1000, 1000)
    ]
    with pytest.raises(ValueError, match="num_shots=0"):
        interpolate_steps(0, steps)


def test_a_scoring_that_is_changed_after_fit_is_refused_and_the_fields_are_named(
    small: DiTiClassifier, tests: list[Path], tmp_path: Path
) -> None:
    expected = small.predict(tests).tolist()
    small.scoring = replace(SCORING, trials=7, seed=3)
    for ask in (
        lambda: small.predict(tests),
        lambda: small.predict_proba(tests),
        lambda: small.errors(tests),
        lambda: small.save_pretrained(tmp_path),
    ):
        with pytest.raises(ValueError, match=r"changed after fit \(trials=7, 5 at fit, seed=3, 0 at fit\)"):
            ask()
    small.scoring = small.settings_.scoring
    assert small.predict(tests).tolist() == expected


def test_a_prediction_that_is_changed_after_fit_takes_effect_at_once(small: DiTiClassifier, tests: list[Path]) -> None:
    exhaustive = small.decide(tests)
    assert {d.evaluations for d in exhaustive} == {2 * SCORING.trials}
    small.prediction = PredictionConfig(schedule="racing", confidence=0.01)
    raced = small.decide(tests)
    assert all(d.evaluations < 2 * SCORING.trials for d in raced)
    small.prediction = PredictionConfig(schedule="published", stages=((2, 1), (5, 1)))
    assert {d.evaluations for d in small.decide(tests)} == {2 * 2 + 3}
    small.prediction = PredictionConfig(schedule="published", stages=((2, 1), (4, 1)))
    with pytest.raises(ValueError, match=r"must end with \(5, 1\)"):
        small.decide(tests)
    small.prediction = PREDICTION
    assert [d.scores.tolist() for d in small.decide(tests)] == [d.scores.tolist() for d in exhaustive]


def test_the_batch_size_changes_no_score_beyond_rounding(small: DiTiClassifier, tests: list[Path]) -> None:
    expected = small.scores(tests)
    small.prediction = replace(PREDICTION, batch_size=3)
    torch.testing.assert_close(small.scores(tests), expected, rtol=0, atol=1e-5)


def test_what_was_not_given_at_fit_is_filled_in_and_saved(
    backbone: Backbone, pictures: dict[str, list[Path]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    few = {"trials": 4, "witnesses": ("features",)}
    quick = replace(PRESETS["pocket"], steps=(2,) * 5, scoring={**PRESETS["pocket"].scoring, **few})
    monkeypatch.setitem(PRESETS, "pocket", quick)
    images = shots_of(pictures, ["a320", "dc-9"], 1)
    classifier = DiTiClassifier(backbone, training=TrainingConfig(rank=2), scoring=ScoringConfig(seed=1)).fit(*images)
    expected = complete("pocket", 1, TrainingConfig(rank=2), ScoringConfig(seed=1))
    assert classifier.settings_ == expected
    assert (classifier.training, classifier.scoring) == (TrainingConfig(rank=2), ScoringConfig(seed=1))
    classifier.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "classifier.json").read_text())["settings"]
    assert saved["scoring"]["seed"] == 1 and saved["scoring"]["weighting"] == "relative"
    again = DiTiClassifier.from_pretrained(tmp_path, backbone)
    assert again.settings_ == expected and again.training == TrainingConfig(rank=2)
    # steps follow the number of shots of classes that are added
    monkeypatch.setitem(PRESETS, "pocket", replace(quick, steps=(2, 3, 3, 3, 3)))
    assert again.settings_for(2).training.steps == 3


@pytest.mark.usefixtures("large")
def test_a_temperature_that_is_not_measured_is_warned_of_once(
    backbone: Backbone, pictures: dict[str, list[Path]], tests: list[Path]
) -> None:
    images = shots_of(pictures, ["a320", "dc-9"], 1)
    scoring = replace(SCORING, temperature=None)
    classifier = make(backbone, training=ONE_STEP, scoring=scoring, concept="aircraft").fit(*images)
    assert classifier.calibration_.temperature == PRESETS["stable-diffusion"].temperature_of(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classifier.predict(tests)  # labels do not depend on it
    with pytest.warns(UserWarning, match=r"was not measured|not measured") as told:
        classifier.predict_proba(tests)
    assert len(told) == 1 and "ScoringConfig(folds=3, temperature='fit')" in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classifier.predict_proba(tests)
        given = make(backbone, training=ONE_STEP, scoring=SCORING, concept="aircraft").fit(*images)
        given.predict_proba(tests)


def test_the_temperature_of_a_measured_preset_is_used_without_a_warning(
    backbone: Backbone, pictures: dict[str, list[Path]], tests: list[Path]
) -> None:
    scoring = replace(SCORING, temperature=None)
    classifier = make(backbone, training=ONE_STEP, scoring=scoring).fit(*shots_of(pictures, ["a320", "dc-9"], 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        classifier.predict_proba(tests)


@pytest.mark.usefixtures("large")
def test_only_the_pocket_knows_what_all_classes_are(backbone: Backbone, pictures: dict[str, list[Path]]) -> None:
    images = shots_of(pictures, ["a320", "dc-9"], 1)
    for changes in ({}, {"prompt_template": "a {}"}, {"generic_prompt": "a thing"}):
        with pytest.raises(ValueError, match=r"What are all classes\? .* pass concept"):
            make(backbone, training=ONE_STEP, **changes).fit(*images)
    named = make(backbone, training=ONE_STEP, concept="bird").fit(*images)
    assert named.prompts_.generic == "a photo of a bird"
    texts = {"prompt_template": "a {}", "generic_prompt": "a thing"}
    assert make(backbone, training=ONE_STEP, **texts).fit(*images).prompts_.generic == "a thing"


@pytest.mark.parametrize(
    ("field", "value"),
    [("concept", "bird"), ("training", None), ("scoring", SCORING), ("prediction", PREDICTION)],
)
def test_setting_a_parameter_does_nothing_but_set_it(backbone: Backbone, field: str, value: object) -> None:
    classifier = make(backbone)
    before = dict(vars(classifier))
    classifier.set_params(**{field: value})
    assert vars(classifier) == {**before, field: value}


def test_a_fit_that_is_refused_leaves_the_classifier_as_it_was(
    small: DiTiClassifier, pictures: dict[str, list[Path]], tests: list[Path], tmp_path: Path
) -> None:
    expected, images = small.scores(tests), shots_of(pictures, ["a320", "dc-9"])
    small.set_params(scoring=replace(SCORING, seed=9), geometry=ImageGeometry(size=(32, 64)))
    with pytest.raises(ValueError, match="two classes or more"):
        small.fit(images[0][:1], images[1][:1])
    small.prediction = PredictionConfig(schedule="published")
    with pytest.raises(ValueError, match="must end with"):
        small.fit(*images)
    fitted = replace(SCORING, witness_weights=())
    assert small.complete_ and small.settings_.scoring == fitted and small.geometry_.size == (16, 32)
    small.set_params(scoring=SCORING, prediction=PREDICTION)
    assert torch.equal(small.scores(tests), expected)
    with pytest.raises(ValueError, match="two classes or more"):
        make(small.backbone).fit(images[0][:1], images[1][:1]).predict(tests)


def test_features_are_kept_for_predictions_that_use_them_later(
    backbone: Backbone, pictures: dict[str, list[Path]], tests: list[Path], tmp_path: Path
) -> None:
    scoring = replace(SCORING, witnesses=("features",), witness_weights=(1.0,))
    without = PredictionConfig(use_witnesses=False)
    classifier = make(backbone, training=ONE_STEP, scoring=scoring, prediction=without)
    classifier.fit(*shots_of(pictures, ["a320", "dc-9"]))
    plain = classifier.scores(tests)
    classifier.add_classes(*shots_of(pictures, ["tu-154"]))
    classifier.save_pretrained(tmp_path)
    again = DiTiClassifier.from_pretrained(tmp_path, backbone)
    again.prediction = PREDICTION
    assert (again.scores(tests)[:, :2] != plain).all()


def test_features_that_do_not_count_do_not_change_the_calibration(
    backbone: Backbone, pictures: dict[str, list[Path]]
) -> None:
    images = shots_of(pictures, ["a320", "dc-9", "tu-154"])
    fits = [
        make(
            backbone,
            training=ONE_STEP,
            scoring=replace(SCORING, witnesses=("features",), witness_weights=(weight,), folds=2, temperature="fit"),
            prediction=PredictionConfig(schedule="exhaustive", shortlist=3, use_witnesses=False),
        ).fit(*images)
        for weight in (0.0, 1.0)
    ]
    calibrations = [replace(fit.calibration_, witness_weights=(), temperature=1.0) for fit in fits]
    assert calibrations[0] == calibrations[1]


def test_classes_can_be_added_after_all_were_removed(
    small: DiTiClassifier, pictures: dict[str, list[Path]], tests: list[Path]
) -> None:
    expected = small.scores(tests)
    small.remove_classes(["a320", "dc-9"]).add_classes(*shots_of(pictures, ["a320", "dc-9"]))
    assert torch.equal(small.scores(tests), expected)


def test_a_word_that_is_no_temperature_is_refused_and_stages_may_be_a_list() -> None:
    with pytest.raises(ValueError, match="temperature='auto'; pass a number above 0, or 'fit'"):
        ScoringConfig(temperature="auto")  # type: ignore[arg-type]
    assert PredictionConfig(stages=[[2, 2], [5, 1]]).stages == ((2, 2), (5, 1))  # type: ignore[arg-type, list-item]
