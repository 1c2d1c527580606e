"""The U-Net's own features beside the class tokens: offsets to scores, and a shortlist."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import zscore
from small_classifier import SCORING, bank_of, make, shots_of
from torch import Tensor

from fewshot_diti import Backbone, DiTiClassifier, ScoringConfig
from fewshot_diti.elimination import eliminate, exhaustive, racing
from fewshot_diti.features import Discriminant, block_features, evidence, fit_discriminant, score_offsets
from fewshot_diti.learning import split_folds

CLASSES = ["747", "a320", "dc-9", "tu-154"]
WITH_FEATURES = replace(SCORING, features_weight=0.02)


@pytest.fixture(scope="module")
def classifier(backbone: Backbone, pictures: dict[str, list[Path]]) -> DiTiClassifier:
    return make(backbone, scoring=WITH_FEATURES).fit(*shots_of(pictures, CLASSES, 3))


def expected_offsets(classifier: DiTiClassifier, pictures: dict[str, list[Path]], tests: list[Path]) -> Tensor:
    """The formula, from images: -weight x log-probabilities in deviations over the classes."""
    learner, backbone = classifier.learner, classifier.backbone
    images, labels = shots_of(pictures, CLASSES, 3)
    shots, asked = (
        block_features(backbone, learner.encode(x), "a photo of an aircraft")[0].numpy() for x in (images, tests)
    )
    said = Discriminant(shots, np.array([CLASSES.index(x) for x in labels])).log_probabilities(asked)
    return torch.from_numpy(-0.02 * zscore(said, axis=1))


def test_scores_are_weighted_errors_less_what_the_features_say(
    classifier: DiTiClassifier, pictures: dict[str, list[Path]], tests: list[Path]
) -> None:
    added = expected_offsets(classifier, pictures, tests)
    tokens = classifier.errors(tests).double().mean(2)
    torch.testing.assert_close(classifier.scores(tests), tokens + added, rtol=0, atol=1e-3)
    assert added.abs().max() > 0.02
    assert {d.evaluations for d in classifier.decide(tests)} == {SCORING.trials * 4 + 1}
    labels = classifier.predict(tests)
    assert labels.tolist() == classifier.classes_[classifier.scores(tests).argmin(1).numpy()].tolist()


def test_features_are_saved_with_the_bank_follow_its_classes_and_are_not_made_up(
    classifier: DiTiClassifier, pictures: dict[str, list[Path]], tests: list[Path], backbone: Backbone, tmp_path: Path
) -> None:
    classifier.save_pretrained(tmp_path / "bank")
    again = DiTiClassifier.from_pretrained(tmp_path / "bank", backbone)
    assert torch.equal(again.scores(tests), classifier.scores(tests))
    added = again.remove(["dc-9"]).partial_fit(*shots_of(pictures, ["dc-9"], 3))
    torch.testing.assert_close(added.scores(tests), classifier.scores(tests), rtol=0, atol=1e-3)

    without = make(backbone).fit(*shots_of(pictures, ["a320", "dc-9"]))
    without.scoring = WITH_FEATURES
    for ask in (lambda: without.predict(tests), lambda: without.partial_fit(*shots_of(pictures, ["747"]))):
        with pytest.raises(ValueError, match=r"features_weight=0.02.*learned without"):
            ask()
    bank_of(classifier).save(tmp_path / "bank alone")
    with pytest.warns(UserWarning, match="without a classifier's settings"):
        alone = DiTiClassifier.from_pretrained(tmp_path / "bank alone", backbone)
    assert not alone.scoring.asks_features and len(alone.predict(tests)) == 3


def test_one_class_left_and_one_shot_a_class_can_be_scored(
    backbone: Backbone, pictures: dict[str, list[Path]], tests: list[Path]
) -> None:
    one_shot = make(backbone, scoring=WITH_FEATURES).fit(*shots_of(pictures, ["a320", "dc-9"], 1))
    assert one_shot.scores(tests).isfinite().all()
    assert one_shot.remove(["dc-9"]).predict(tests).tolist() == ["a320"] * 3


def test_a_shortlist_saves_the_trials_of_the_other_classes(
    classifier: DiTiClassifier, pictures: dict[str, list[Path]], tests: list[Path]
) -> None:
    everything, offsets = classifier.scores(tests), expected_offsets(classifier, pictures, tests)
    try:
        classifier.scoring = replace(WITH_FEATURES, shortlist=2)
        short = classifier.scores(tests)
        assert {d.evaluations for d in classifier.decide(tests)} == {SCORING.trials * 2 + 1}
        kept = offsets.argsort(1).argsort(1) < 2
        assert torch.equal(short.isfinite(), kept)
        torch.testing.assert_close(short[kept], everything[kept], rtol=0, atol=1e-5)
        assert (classifier.predict_proba(tests)[~kept.numpy()] == 0).all()
    finally:
        classifier.scoring = WITH_FEATURES
    with pytest.raises(ValueError, match="shortlist=1"):
        ScoringConfig(shortlist=1)
    with pytest.raises(ValueError, match="features_weight=-1"):
        ScoringConfig(features_weight=-1)


@pytest.mark.parametrize("weighting", ["uniform", "auto"])
def test_cross_validation_asks_features_of_the_other_shots_alone(
    backbone: Backbone, pictures: dict[str, list[Path]], weighting: str
) -> None:
    scoring = replace(WITH_FEATURES, folds=2, shortlist=3, temperature=None, weighting=weighting)
    classifier = make(backbone, scoring=scoring).fit(*shots_of(pictures, CLASSES, 3))
    features = classifier.learner.shot_features({x: pictures[x][:3] for x in CLASSES})
    inside = []
    for kept, held in split_folds({x: list(f) for x, f in features.items()}, 2):
        said = evidence(
            fit_discriminant({x: torch.stack(f) for x, f in kept.items()}), torch.stack([f for _, f in held])
        )
        inside += [c in row.argsort(descending=True)[:3] for (c, _), row in zip(held, said, strict=True)]
    assert classifier.calibration_.shortlist_recall == pytest.approx(np.mean(inside))
    assert 0 <= classifier.calibration_.accuracy <= classifier.calibration_.shortlist_recall


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
    assert [f.label for f in found] == exact.argmin(1).tolist()
    assert all(f.scores[4] == torch.inf for f in found)
    if len(stages) == 1:
        torch.testing.assert_close(torch.stack([f.scores for f in found])[:, :4], exact[:, :4])
    else:  # most offsets are clear beside the noise
        assert np.mean([f.evaluations for f in found]) < 24 * 5 / 2
    with pytest.raises(ValueError, match="image 0 without a class"):
        eliminate(errors_fn, 20, 6, stages, torch.ones(24), torch.full((20, 6), torch.inf))


def test_evidence_is_in_deviations_and_offsets_in_units_of_the_score() -> None:
    rng = np.random.default_rng(0)
    shots = {c: torch.from_numpy(rng.normal(c, 1, (4, 5))).half() for c in range(3)}
    said = evidence(fit_discriminant(shots), torch.from_numpy(rng.normal(1, 1, (7, 5))).half())
    np.testing.assert_allclose(said.mean(1), 0, atol=1e-12)
    np.testing.assert_allclose(said.std(1, correction=0), 1)
    torch.testing.assert_close(score_offsets(said, 0.5), -0.5 * said)
    listed = score_offsets(said, 0.0, 2)
    assert (listed.isfinite().sum(1) == 2).all() and (said[~listed.isfinite()] == said.amin(1)).all()
