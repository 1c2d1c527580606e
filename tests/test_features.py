"""The U-Net's own features beside the class tokens: offsets to scores, and a shortlist."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from fewshot_diti.held_out import fit_temperature, split_folds
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax
from sklearn.covariance import ledoit_wolf
from sklearn.preprocessing import normalize
from small_classifier import SCORING, bank_of, make, shots_of
from torch import Tensor

from fewshot_diti import Backbone, DiTiClassifier, ScoringConfig
from fewshot_diti.elimination import eliminate, exhaustive, racing
from fewshot_diti.features import VIEWS, Discriminant, block_features, fit_discriminant, score_offsets

CLASSES = ["747", "a320", "dc-9", "tu-154"]
WITH_FEATURES = replace(SCORING, features_weight=0.02)


@pytest.fixture(scope="module")
def classifier(backbone: Backbone, pictures: dict[str, list[Path]]) -> DiTiClassifier:
    return make(backbone, scoring=WITH_FEATURES).fit(*shots_of(pictures, CLASSES, 1))


def expected_offsets(classifier: DiTiClassifier, pictures: dict[str, list[Path]], tests: list[Path]) -> Tensor:
    """The formula, from images: -weight x log-probabilities."""
    learner, backbone = classifier.learner, classifier.backbone
    images, labels = shots_of(pictures, CLASSES, 1)
    text = backbone.encode_text(backbone.tokenize(["a photo of an aircraft"]))
    shots, asked = (block_features(backbone, learner.encode(x), text)[0] for x in (images, tests))
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
    added = again.remove(["dc-9"]).partial_fit(*shots_of(pictures, ["dc-9"], 1))
    torch.testing.assert_close(added.scores(tests), classifier.scores(tests), rtol=0, atol=1e-4)

    without = make(backbone).fit(*shots_of(pictures, ["a320", "dc-9"]))
    without.scoring = WITH_FEATURES
    for ask in (lambda: without.predict(tests), lambda: without.partial_fit(*shots_of(pictures, ["747"]))):
        with pytest.raises(ValueError, match=r"features_weight=0.02.*not those of every class"):
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


def test_cross_validation_asks_features_of_the_other_shots_alone(
    backbone: Backbone, pictures: dict[str, list[Path]]
) -> None:
    scoring = replace(WITH_FEATURES, folds=2, shortlist=3, temperature=None)
    classifier = make(backbone, scoring=scoring).fit(*shots_of(pictures, CLASSES, 3))
    learner, groups = classifier.learner, {x: pictures[x][:3] for x in CLASSES}
    grid = torch.tensor(classifier.calibration_.timesteps)
    errors, truth = learner.held_out(groups, 2, partial(learner.shared_errors, grid=grid))
    log_p = []
    for kept, held in split_folds({x: list(f) for x, f in learner.shot_features(groups).items()}, 2):
        judge = fit_discriminant({x: torch.stack(f) for x, f in kept.items()})
        log_p.append(judge.log_probabilities(torch.stack([views[0] for _, views in held])))
    scores = errors.double().mean(2) + score_offsets(torch.cat(log_p), 0.02)
    listed = score_offsets(torch.cat(log_p), 0.02, 3).isfinite()
    calibration = classifier.calibration_
    assert calibration.temperature == pytest.approx(fit_temperature(scores, truth), rel=1e-3)
    assert calibration.shortlist_recall == pytest.approx(listed[range(12), truth].double().mean())
    right = scores.masked_fill(~listed, torch.inf).argmin(1) == truth
    assert calibration.accuracy == pytest.approx(right.double().mean())


def test_auto_chooses_on_errors_and_judges_with_features(backbone: Backbone, pictures: dict[str, list[Path]]) -> None:
    scoring = replace(WITH_FEATURES, trials=10, folds=3, temperature=None, weighting="auto")
    images = shots_of(pictures, CLASSES, 3)
    alone, both = (
        make(backbone, scoring=replace(scoring, features_weight=w)).fit(*images).calibration_ for w in (0.0, 1e9)
    )
    assert alone.timesteps == both.timesteps and alone.weights == both.weights
    assert alone.temperature != both.temperature
    features = make(backbone, scoring=WITH_FEATURES).learner.shot_features({x: pictures[x][:3] for x in CLASSES})
    right = []  # at such a weight the features decide
    for kept, held in split_folds({x: list(f) for x, f in features.items()}, 3):
        judge = fit_discriminant({x: torch.stack(f) for x, f in kept.items()})
        right += [judge.log_probabilities(views[:1]).argmax().item() == c for c, views in held]
    assert both.accuracy == pytest.approx(np.mean(right))


def test_features_left_out_for_a_while_are_not_saved_in_part(
    backbone: Backbone, pictures: dict[str, list[Path]], tests: list[Path], tmp_path: Path
) -> None:
    classifier = make(backbone, scoring=WITH_FEATURES).fit(*shots_of(pictures, ["a320", "dc-9"]))
    classifier.scoring = SCORING
    classifier.partial_fit(*shots_of(pictures, ["747"])).save_pretrained(tmp_path)
    assert torch.equal(DiTiClassifier.from_pretrained(tmp_path, backbone).scores(tests), classifier.scores(tests))


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


@pytest.mark.parametrize("counts", [(1, 1, 1), (2, 2, 2), (1, 5, 2), (1, 16, 16), (6, 6)])
def test_the_discriminant_is_the_formula_at_one_temperature(counts: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    centres = rng.normal(0, 1, (len(counts), 40))
    draw = lambda c, n: torch.from_numpy(centres[c] + rng.normal(0, 1, (n, 40))).float()  # noqa: E731
    shots = {f"class {c}": draw(c, n) for c, n in enumerate(counts)}
    judge = fit_discriminant({x: features[:, None] for x, features in shots.items()})
    asked = torch.cat([draw(c, 50) for c in range(len(counts))])
    log_p = judge.log_probabilities(asked)
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(len(asked)).double())
    truth = torch.arange(len(counts)).repeat_interleave(50)
    right = (log_p.argmax(1) == truth).view(len(counts), 50).double().mean(1)
    assert right.min() > 0.5  # also of a class with one shot among many

    # the same in the dimensions that the shots span, Mahalanobis distances written out
    x, labels = torch.cat(list(shots.values())).double().numpy(), np.repeat(np.arange(len(counts)), counts)
    middle = np.mean([x[labels == c].mean(0) for c in range(len(counts))], axis=0)
    directions, there = (normalize(y - middle) for y in (x, asked.double().numpy()))
    basis = np.linalg.svd(directions, full_matrices=False)[2][: len(x) - 1]
    directions, there = directions @ basis.T, there @ basis.T
    means = np.stack([directions[labels == c].mean(0) for c in range(len(counts))])
    if max(counts) == 1:
        expected = log_softmax(there @ means.T / 0.1, axis=1)
        np.testing.assert_allclose(log_p, expected, atol=1e-5)
    else:
        covariance = ledoit_wolf(directions - means[labels], assume_centered=True)[0] * len(x) / (len(x) - len(counts))
        distances = np.stack([mahalanobis_squares(there, mean, covariance) for mean in means], 1)
        scatter = (directions - means[labels]).T @ (directions - means[labels]) / (len(x) - len(counts))
        distances -= np.trace(np.linalg.inv(covariance) @ scatter) / np.array(counts)
        plain, found = (y - y.mean(1, keepdims=True) for y in (-distances / 2, log_p.numpy()))
        ratio = (plain * found).sum() / (found * found).sum()  # the temperature
        np.testing.assert_allclose(plain, ratio * found, rtol=1e-3, atol=1e-3 * np.abs(plain).max())
        assert ratio > 0


def test_a_discriminant_is_fitted_on_all_views_and_asked_about_the_shots() -> None:
    rng = np.random.default_rng(3)
    colour, shape = torch.eye(20)[0], torch.eye(20)[1:4]
    noise = lambda *size: torch.from_numpy(rng.normal(0, 0.2, (*size, 20))).float()  # noqa: E731
    # every class has a shape, and shots whose colours say the class too; copies have all colours, as those asked for
    paint = torch.tensor([[-2.0, -2, -2], [0, 0, 0], [2, 2, 2]])
    shots = {c: (shape[c] + paint[c][:, None] * colour + noise(3))[:, None] for c in range(3)}
    anew = lambda *size: torch.from_numpy(rng.normal(0, 2, (*size, 1))).float() * colour  # noqa: E731
    views = {c: torch.cat([x, shape[c] + anew(3, 6) + noise(3, 6)], 1) for c, x in shots.items()}
    asked, truth = torch.cat([shape[c] + anew(100) + noise(100) for c in range(3)]), torch.arange(3)
    plain, of_views = (
        (fit_discriminant(x).log_probabilities(asked).argmax(1) == truth.repeat_interleave(100)).double().mean()
        for x in (shots, views)
    )
    assert plain < 0.6 < 0.9 < of_views
    # where a class has one shot copies are left out, and all classes have as many as the one with the fewest
    for counts, kept in (((1, 1, 1), 1), ((1, 3, 3), 1), ((2, 3, 3), 7)):
        some = {c: x[:n] for (c, x), n in zip(views.items(), counts, strict=True)}
        same = fit_discriminant({c: x[:, :kept] for c, x in some.items()}).log_probabilities(asked)
        torch.testing.assert_close(fit_discriminant(some).log_probabilities(asked), same)
    fewer = fit_discriminant(views | {0: views[0][:, :2]}).log_probabilities(asked)
    torch.testing.assert_close(
        fewer, fit_discriminant({c: x[:, :2] for c, x in views.items()}).log_probabilities(asked)
    )


def test_shots_held_out_are_no_less_likely_than_others_where_a_class_has_two() -> None:
    rng = np.random.default_rng(4)
    centres = rng.normal(0, 1, (12, 300))
    shots = {c: torch.from_numpy(x + rng.normal(0, 2, (2, 4, 300))).float() for c, x in enumerate(centres)}
    asked = torch.from_numpy(np.concatenate([x + rng.normal(0, 2, (50, 300)) for x in centres])).float()
    log_p = fit_discriminant(shots).log_probabilities(asked)
    assert abs(np.log(fit_temperature(-log_p, torch.arange(12).repeat_interleave(50)))) < np.log(3)  # log 1 is exact


def test_copies_in_the_colours_of_training_are_kept(backbone: Backbone, pictures: dict[str, list[Path]]) -> None:
    learner = make(backbone, scoring=WITH_FEATURES).learner
    groups = {x: pictures[x][:2] for x in CLASSES}
    kept = learner.shot_features(groups)
    copies = learner.class_shots("747", groups["747"], learner.config(groups)).mean
    assert kept["747"].dtype == torch.float16 and kept["747"].shape[:2] == (2, min(VIEWS, copies.shape[1]))
    for shot, views in enumerate(kept["747"]):
        torch.testing.assert_close(views.float(), learner.features(copies[shot, :VIEWS]), rtol=2e-3, atol=1e-3)


def mahalanobis_squares(points: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    apart = points - mean
    return (apart @ np.linalg.inv(covariance) * apart).sum(1)


def test_the_shortlist_holds_the_likeliest() -> None:
    log_p = torch.log_softmax(torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).double(), 1)
    torch.testing.assert_close(score_offsets(log_p, 0.5), -0.5 * log_p)
    listed = score_offsets(log_p, 0.0, 2).isfinite()
    assert (listed.sum(1) == 2).all() and (log_p[listed].view(7, 2).amin(1) > log_p[~listed].view(7, 3).amax(1)).all()
    assert score_offsets(log_p, 0.5, 9).isfinite().all()


def test_a_discriminant_is_as_sure_as_held_out_shots_allow_and_refuses_shots_that_are_all_the_same() -> None:
    rng = np.random.default_rng(2)
    centres = 0.4 * rng.normal(0, 1, (3, 30))
    shots, asked = (
        {c: torch.from_numpy(centres[c] + rng.normal(0, 1, (n, 30))).float() for c in range(3)} for n in (8, 300)
    )
    truth = torch.arange(3).repeat_interleave(300)
    log_p = fit_discriminant({c: x[:, None] for c, x in shots.items()}).log_probabilities(torch.cat([*asked.values()]))
    plain = Discriminant(torch.cat(list(shots.values())).numpy(), np.repeat(range(3), 8))
    unfitted = plain.log_probabilities(torch.cat(list(asked.values())))
    best = fit_temperature(-log_p, truth)
    assert abs(np.log(best)) < 0.5 * abs(np.log(fit_temperature(-unfitted, truth)))  # log 1 would be exact
    with pytest.raises(ValueError, match="of the shots of 1 are not finite"):
        fit_discriminant({0: torch.ones(2, 1, 3), 1: torch.full((2, 1, 3), torch.nan)})
    with pytest.raises(ValueError, match="of an image are not finite"):
        plain.log_probabilities(torch.full((1, 30), torch.inf))
    with pytest.raises(ValueError, match="look the same"):
        fit_discriminant({0: torch.ones(2, 1, 3), 1: torch.ones(2, 1, 3)})
    twice = fit_discriminant({0: torch.tensor([[[1.0, 0]]] * 2), 1: torch.tensor([[[0.0, 1]]] * 2)})  # no scatter
    assert twice.log_probabilities(torch.eye(2)).argmax(1).tolist() == [0, 1]


@given(st.lists(st.integers(2, 9), min_size=2, max_size=5), st.integers(2, 12))
def test_folds_hold_out_every_shot_once_and_keep_one_of_every_class(counts: list[int], folds: int) -> None:
    groups = {f"{c}": [(c, i) for i in range(n)] for c, n in enumerate(counts)}
    parts = list(split_folds(groups, folds))
    assert len(parts) == min(folds, max(counts))
    everything = [shot for shots in groups.values() for shot in shots]
    assert sorted(shot for _, held in parts for _, shot in held) == everything
    for kept, held in parts:
        assert all(kept.values()) and all(shot[0] == c for c, shot in held)
        assert sorted([*(s for shots in kept.values() for s in shots), *(s for _, s in held)]) == everything
