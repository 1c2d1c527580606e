"""The U-Net's own features beside the class tokens: offsets to scores, and a shortlist."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from small_classifier import PREDICTION, SCORING, TRAINING, bank_of, make, shots_of
from torch import Tensor

from fewshot_diti import Backbone, DiTiClassifier
from fewshot_diti.discriminant import fit_discriminant
from fewshot_diti.elimination import eliminate, exhaustive
from fewshot_diti.features import block_features
from fewshot_diti.folds import Fit, judge_held_out, shared_errors, split_folds
from fewshot_diti.presets import PRESETS
from fewshot_diti.racing import racing
from fewshot_diti.temperature import fit_temperature
from fewshot_diti.training import class_shots
from fewshot_diti.witnesses import score_offsets

CLASSES = ["747", "a320", "dc-9", "tu-154"]
WITH_FEATURES = replace(SCORING, witnesses=("features",), witness_weights=(2.0,))
SHORT = replace(PREDICTION, shortlist=2)
VIEWS = PRESETS["pocket"].features.views


@pytest.fixture(scope="module")
def classifier(backbone: Backbone, pictures: dict[str, list[Path]]) -> DiTiClassifier:
    return make(backbone, scoring=WITH_FEATURES).fit(*shots_of(pictures, CLASSES, 1))


def latents_of(classifier: DiTiClassifier, images: list[Path]) -> Tensor:
    return classifier.encoder_.latents([classifier.encoder_.prepare(x) for x in images])


def expected_offsets(classifier: DiTiClassifier, pictures: dict[str, list[Path]], tests: list[Path]) -> Tensor:
    """The formula, from images: -weight x log-probabilities."""
    backbone = classifier.backbone_
    images, labels = shots_of(pictures, CLASSES, 1)
    text = backbone.encode_text(backbone.tokenize(["a photo of an aircraft"]))
    shots, asked = (block_features(backbone, latents_of(classifier, x), text)[0] for x in (images, tests))
    groups = {x: shots[[i for i, label in enumerate(labels) if label == x]][:, None] for x in CLASSES}
    return -0.02 * fit_discriminant(groups).log_probabilities(asked)


def test_scores_are_weighted_errors_less_what_the_features_say(
    classifier: DiTiClassifier, pictures: dict[str, list[Path]], tests: list[Path]
) -> None:
    added = expected_offsets(classifier, pictures, tests)
    tokens = classifier.errors(tests).double().mean(2)
    torch.testing.assert_close(classifier.scores(tests), tokens + added, rtol=0, atol=1e-5)
    assert added.std(1).min() > 5e-4  # not lost in the tolerance
    assert {d.evaluations for d in classifier.decide(tests)} == {SCORING.trials * 4 + 1}
    labels = classifier.predict(tests)
    assert labels.tolist() == classifier.classes_[classifier.scores(tests).argmin(1).numpy()].tolist()


def test_features_are_saved_with_the_bank_follow_its_classes_and_are_not_made_up(
    classifier: DiTiClassifier, pictures: dict[str, list[Path]], tests: list[Path], backbone: Backbone, tmp_path: Path
) -> None:
    classifier.save_pretrained(tmp_path / "bank")
    again = DiTiClassifier.from_pretrained(tmp_path / "bank", backbone)
    assert torch.equal(again.scores(tests), classifier.scores(tests))
    added = again.remove_classes(["dc-9"]).add_classes(*shots_of(pictures, ["dc-9"], 1))
    torch.testing.assert_close(added.scores(tests), classifier.scores(tests), rtol=0, atol=1e-4)

    without = make(backbone).fit(*shots_of(pictures, ["a320", "dc-9"]))
    without.prediction = SHORT
    for ask in (lambda: without.predict(tests), lambda: without.add_classes(*shots_of(pictures, ["747"]))):
        with pytest.raises(ValueError, match="shortlist=2 is drawn up by witnesses, and there are none"):
            ask()
    bank_of(classifier).save_pretrained(tmp_path / "bank alone")
    with pytest.warns(UserWarning, match="without a classifier's settings"):
        alone = DiTiClassifier.from_pretrained(tmp_path / "bank alone", backbone)
    assert alone.predict(tests).tolist() == alone.classes_[alone.scores(tests).argmin(1).numpy()].tolist()


def test_one_class_left_and_one_shot_per_class_can_be_scored(
    backbone: Backbone, pictures: dict[str, list[Path]], tests: list[Path]
) -> None:
    one_shot = make(backbone, scoring=WITH_FEATURES).fit(*shots_of(pictures, ["a320", "dc-9"], 1))
    assert one_shot.scores(tests).isfinite().all()
    assert one_shot.remove_classes(["dc-9"]).predict(tests).tolist() == ["a320"] * 3


def test_a_shortlist_saves_the_trials_of_the_other_classes(
    backbone: Backbone, pictures: dict[str, list[Path]], tests: list[Path]
) -> None:
    classifier = make(backbone, scoring=WITH_FEATURES).fit(*shots_of(pictures, CLASSES, 1))
    everything, offsets = classifier.scores(tests), expected_offsets(classifier, pictures, tests)
    classifier.prediction = SHORT
    short = classifier.scores(tests)
    assert {d.evaluations for d in classifier.decide(tests)} == {SCORING.trials * 2 + 1}
    kept = offsets.argsort(1).argsort(1) < 2
    assert torch.equal(short.isfinite(), kept)
    torch.testing.assert_close(short[kept], everything[kept], rtol=0, atol=1e-5)
    assert (classifier.predict_proba(tests)[~kept.numpy()] == 0).all()


def test_cross_validation_asks_features_of_the_other_shots_alone(
    backbone: Backbone, pictures: dict[str, list[Path]]
) -> None:
    scoring = replace(WITH_FEATURES, folds=2, temperature="fit")
    classifier = make(backbone, scoring=scoring, prediction=replace(PREDICTION, shortlist=3))
    classifier.fit(*shots_of(pictures, CLASSES, 3))
    encoder, calibration = classifier.encoder_, classifier.calibration_
    groups = {x: [encoder.prepare(path) for path in pictures[x][:3]] for x in CLASSES}
    fit = Fit(encoder=encoder, prompts=classifier.prompts_, settings=classifier.settings_, groups=groups)
    errors, truth = judge_held_out(fit, partial(shared_errors, fit, grid=torch.tensor(calibration.timesteps)))
    log_p = []
    for kept, held in split_folds({x: list(encoder.shot_features(g, TRAINING)) for x, g in groups.items()}, 2):
        judge = fit_discriminant({x: torch.stack(f) for x, f in kept.items()})
        log_p.append(judge.log_probabilities(torch.stack([views[0] for _, views in held])))
    tokens = errors.double().mean(2)
    alone = fit_temperature(tokens, truth)
    assert calibration.token_temperature == pytest.approx(alone, rel=1e-3)
    scores = tokens + score_offsets([torch.cat(log_p)], [2.0 * alone])
    listed = score_offsets([torch.cat(log_p)], [0.0], 3).isfinite()
    assert calibration.temperature == pytest.approx(fit_temperature(scores, truth), rel=1e-3)
    assert calibration.shortlist_recall == pytest.approx(listed[range(12), truth].double().mean())
    right = scores.masked_fill(~listed, torch.inf).argmin(1) == truth
    assert calibration.accuracy == pytest.approx(right.double().mean())


def test_auto_chooses_on_errors_and_judges_with_features(backbone: Backbone, pictures: dict[str, list[Path]]) -> None:
    scoring = replace(WITH_FEATURES, trials=10, folds=3, temperature="fit", weighting="auto")
    images = shots_of(pictures, CLASSES, 3)
    without, with_them = (
        make(backbone, scoring=replace(scoring, witness_weights=(w,))).fit(*images) for w in (0.0, 1e9)
    )
    alone, both = without.calibration_, with_them.calibration_
    assert alone.timesteps == both.timesteps and alone.weights == both.weights
    assert alone.temperature != both.temperature
    encoder = with_them.encoder_
    features = {x: encoder.shot_features([encoder.prepare(p) for p in pictures[x][:3]], TRAINING) for x in CLASSES}
    right = []  # at such a weight the features decide
    for kept, held in split_folds({x: list(f) for x, f in features.items()}, 3):
        judge = fit_discriminant({x: torch.stack(f) for x, f in kept.items()})
        right += [judge.log_probabilities(views[:1]).argmax().item() == c for c, views in held]
    assert both.accuracy == pytest.approx(np.mean(right))


def test_features_that_a_prediction_leaves_out_for_a_while_are_kept_and_saved(
    backbone: Backbone, pictures: dict[str, list[Path]], tests: list[Path], tmp_path: Path
) -> None:
    classifier = make(backbone, scoring=WITH_FEATURES).fit(*shots_of(pictures, ["a320", "dc-9"]))
    classifier.prediction = replace(PREDICTION, use_witnesses=False)
    torch.testing.assert_close(classifier.scores(tests), classifier.errors(tests).double().mean(2))
    classifier.add_classes(*shots_of(pictures, ["747"])).save_pretrained(tmp_path)
    again = DiTiClassifier.from_pretrained(tmp_path, backbone)
    assert torch.equal(again.scores(tests), classifier.scores(tests))
    again.prediction = PREDICTION
    always = make(backbone, scoring=WITH_FEATURES).fit(*shots_of(pictures, ["a320", "dc-9"]))
    expected = always.add_classes(*shots_of(pictures, ["747"])).scores(tests)
    assert torch.equal(again.scores(tests), expected)


def test_copies_in_the_colours_of_training_are_kept(
    classifier: DiTiClassifier, pictures: dict[str, list[Path]]
) -> None:
    encoder = classifier.encoder_
    shots = [encoder.prepare(path) for path in pictures["747"][:2]]
    kept = encoder.shot_features(shots, TRAINING)
    copies = class_shots(encoder, "747", shots, classifier.prompts_, TRAINING).mean
    assert kept.dtype == torch.float16 and kept.shape[:2] == (2, min(VIEWS, copies.shape[1]))
    for shot, views in enumerate(kept):
        torch.testing.assert_close(views.float(), encoder.features(copies[shot, :VIEWS]), rtol=2e-3, atol=1e-3)


@pytest.mark.parametrize("stages", [exhaustive(24), racing(24, confidence=0.99)])
def test_offsets_move_the_scores_and_leave_the_race_its_noise(stages) -> None:
    g = torch.Generator().manual_seed(0)
    errors = 1 + 0.02 * torch.randn(20, 6, 24, generator=g)
    offsets = 0.1 * torch.randn(20, 6, generator=g).double()
    offsets[:, 4] = torch.inf

    def errors_fn(pairs, positions):
        assert 4 not in pairs[:, 1]
        return errors[pairs[:, 0], pairs[:, 1]][:, positions]

    found = eliminate(errors_fn, 20, 6, stages, torch.ones(24), offsets)
    exact = errors.double().mean(2) + offsets
    assert [f.position for f in found] == exact.argmin(1).tolist()
    assert all(f.scores[4] == torch.inf for f in found)
    if len(stages) == 1:
        torch.testing.assert_close(torch.stack([f.scores for f in found])[:, :4], exact[:, :4])
    else:  # most offsets are clear beside the noise
        assert np.mean([f.evaluations for f in found]) < 24 * 5 / 2
    with pytest.raises(ValueError, match="image 0 without a class"):
        eliminate(errors_fn, 20, 6, stages, torch.ones(24), torch.full((20, 6), torch.inf))
