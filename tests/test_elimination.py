"""Decision schedules against the published counts; eliminate against scoring everything."""

import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewshot_diti.elimination import (
    Look,
    Stage,
    chances_of_least,
    count_evaluations,
    eliminate,
    exhaustive,
    final_means,
    nested_order,
    proportional_stages,
    published_stages,
    racing,
)
from fewshot_diti.timesteps import weighted_mean
from fewshot_diti.trials import even_grid

SHAPES = {"seed": st.integers(0, 2**31), "C": st.integers(1, 12), "S": st.integers(1, 20)}


def random_image(seed, C, S):
    generator = torch.Generator().manual_seed(seed)
    errors_CS = torch.rand(C, S, generator=generator, dtype=torch.float64)
    return errors_CS, torch.rand(S, generator=generator, dtype=torch.float64) + 0.01, generator


def lookup(errors_NCS):
    return lambda pairs, positions: errors_NCS[pairs[:, 0], pairs[:, 1]][:, positions]


def classify(errors_CS, stages, weights_S):
    """One image."""
    return eliminate(lookup(errors_CS[None]), 1, errors_CS.shape[0], stages, weights_S)[0]


def halving(C, S):
    return published_stages(C, trials=S, stages=[((S + 1) // 2, max(1, C // 2)), (S, 1)] if S > 1 else [(1, 1)])


def test_the_published_stages_add_20_50_80_and_350_trials_and_cost_5550_evaluations():
    stages = published_stages(100)
    assert [len(stage.trial_positions) for stage in stages] == [20, 50, 80, 350]
    assert [stage.keep for stage in stages] == [20, 10, 5, 1]
    assert count_evaluations(stages, 100) == 5550
    assert sorted(p for stage in stages for p in stage.trial_positions) == list(range(500))
    timesteps = even_grid(500, 0, 1000)[list(stages[0].trial_positions)]
    assert timesteps.tolist() == list(range(25, 1000, 50))


def test_twelve_classes_cost_3390_evaluations_as_published_900_in_proportion_6000_exhaustively():
    assert count_evaluations(published_stages(12), 12) == 3390
    assert [stage.keep for stage in proportional_stages(12)] == [3, 2, 1, 1]
    assert count_evaluations(proportional_stages(12), 12) == 900
    assert count_evaluations(exhaustive(500), 12) == 6000
    assert proportional_stages(100) == published_stages(100)


@pytest.mark.parametrize("stages", [((128, 4), (256, 2), (500, 1)), ((32, 50), (128, 20), (256, 5), (500, 1))])
def test_schedules_that_do_not_divide_500_do_the_published_number_of_trials(stages):
    done: set[int] = set()
    for (n, _), stage in zip(stages, published_stages(8, stages=stages), strict=True):
        step = 500 // n
        published = [p for p in list(range(500))[step // 2 :: step][:n] if p not in done]
        assert list(stage.trial_positions) == published
        done.update(published)
    assert done == set(range(500))


def test_a_schedule_that_cannot_be_run_is_refused():
    with pytest.raises(ValueError, match="600 trials does not fit"):
        published_stages(10, stages=[(600, 1)])
    with pytest.raises(ValueError, match="no trial"):
        published_stages(10, stages=[(500, 5), (20, 1)])
    for positions, keep in [((), 1), ((1, 1), 1), ((-1,), 1), ((0,), 0)]:
        with pytest.raises(ValueError, match=r"trial_positions|keep"):
            Stage(trial_positions=positions, keep=keep)
    one = Stage(trial_positions=(0,), keep=1)
    for stages, weights in [((), torch.ones(1)), ((one, one), torch.ones(1)), (exhaustive(3), torch.ones(2))]:
        with pytest.raises(ValueError, match="stages"):
            classify(torch.rand(4, 3), stages, weights)


@given(**SHAPES)
@settings(max_examples=30, deadline=None)
def test_the_exhaustive_stage_gives_the_smallest_score_and_the_scores_of_all_classes(seed, C, S):
    errors_CS, weights_S, _ = random_image(seed, C, S)
    scores = weighted_mean(errors_CS[None], weights_S)[0]
    result = classify(errors_CS, exhaustive(S), weights_S)
    assert result.label == scores.argmin().item() and result.evaluations == C * S
    torch.testing.assert_close(result.scores, scores, rtol=1e-13, atol=0)


@pytest.mark.parametrize("make", [halving, lambda C, S: racing(S, confidence=0.9)])
@given(**SHAPES)
@settings(max_examples=30, deadline=None)
def test_permuting_the_classes_permutes_the_result(make, seed, C, S):
    errors_CS, weights_S, generator = random_image(seed, C, S)
    permutation = torch.randperm(C, generator=generator)
    plain = classify(errors_CS, make(C, S), weights_S)
    permuted = classify(errors_CS[permutation], make(C, S), weights_S)
    assert permutation[permuted.label].item() == plain.label
    torch.testing.assert_close(permuted.scores, plain.scores[permutation], rtol=1e-13, atol=0)
    assert (permuted.evaluations, permuted.decided) == (plain.evaluations, plain.decided)


@pytest.mark.parametrize("make", [halving, lambda C, S: racing(S, confidence=0.9)])
@given(**SHAPES, N=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_images_go_through_a_schedule_together_as_each_would_alone(make, seed, C, S, N):
    generator = torch.Generator().manual_seed(seed)
    errors_NCS = torch.rand(N, C, S, generator=generator)
    weights_S = torch.rand(S, generator=generator) + 0.01
    stages = make(C, S)
    together = eliminate(lookup(errors_NCS), N, C, stages, weights_S)
    for errors_CS, result in zip(errors_NCS, together, strict=True):
        alone = classify(errors_CS, stages, weights_S)
        assert torch.equal(alone.scores, result.scores) and alone.label == result.label
        assert (alone.evaluations, alone.decided) == (result.evaluations, result.decided)


@given(**SHAPES)
@settings(max_examples=30, deadline=None)
def test_only_classes_still_in_are_asked_for_and_the_count_of_evaluations_is_met(seed, C, S):
    errors_CS, weights_S, _ = random_image(seed, C, S)
    asked = []

    def errors_fn(pairs, trial_positions):
        asked.append((pairs[:, 1].tolist(), trial_positions.tolist()))
        return errors_CS[pairs[:, 1]][:, trial_positions]

    stages = halving(C, S)
    result = eliminate(errors_fn, 1, C, stages, weights_S)[0]
    assert sum(len(classes) * len(positions) for classes, positions in asked) == count_evaluations(stages, C)
    assert result.evaluations == count_evaluations(stages, C)
    for (before, _), (after, _), stage in zip(asked, asked[1:], stages, strict=False):
        assert set(after) <= set(before) and len(after) == stage.keep
    done = [p for stage in stages for p in stage.trial_positions]
    survivors = asked[-1][0]
    expected = (errors_CS[survivors][:, done] * weights_S[done]).mean(dim=1)
    torch.testing.assert_close(result.scores[result.label], expected.min(), rtol=1e-12, atol=0)
    assert result.label == survivors[expected.argmin()] == result.scores.argmin()


def test_the_label_is_a_class_index_and_no_place_among_the_survivors():
    errors_CS = torch.ones(100, 500)
    errors_CS[97] = 0.5
    assert classify(errors_CS, published_stages(100), torch.ones(500)).label == 97
    assert classify(errors_CS, racing(64, confidence=0.9), torch.ones(500)).label == 97


def test_ties_go_to_the_lower_class_index():
    for stages in (published_stages(30), racing(500, confidence=0.9)):
        result = classify(torch.ones(30, 500), stages, torch.ones(500))
        assert result.label == 0 and torch.equal(result.scores, torch.ones(30, dtype=torch.float64))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_broken_class_token_raises_by_class_index_also_in_a_late_stage(value):
    errors_CS = torch.ones(30, 500)
    errors_CS[23] = 0.5
    errors_CS[23, published_stages(30)[2].trial_positions[7]] = value
    with pytest.raises(ValueError, match="class index 23 "):
        classify(errors_CS, published_stages(30), torch.ones(500))


def test_a_stage_without_any_weight_raises_instead_of_dropping_classes_blindly():
    weights_S = (even_grid(500, 0, 1000) < 20).double()
    with pytest.raises(ValueError, match="20 trials up to stage 1 have weight 0"):
        classify(torch.rand(30, 500), published_stages(30), weights_S)
    classify(torch.rand(30, 500), exhaustive(500), weights_S)


def test_errors_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(4, 1\) for 4 pairs x 3 trials"):
        eliminate(lambda pairs, positions: torch.rand(4, 1), 1, 4, exhaustive(3), torch.ones(3))


@given(trials=st.integers(1, 300))
@settings(max_examples=40, deadline=None)
def test_every_beginning_of_the_nested_order_is_spread_evenly(trials):
    order = nested_order(trials)
    assert sorted(order) == list(range(trials))
    for n in (4, 8, 16, 32):
        if n <= trials:
            inside = torch.tensor(order[:n]).mul(4).div(trials, rounding_mode="floor").bincount(minlength=4)
            assert inside.max() - inside.min() <= 2
    means = [sum(nested_order(64)[:n]) / n for n in (4, 8, 16, 32)]
    assert all(abs(mean - 31.5) < 6 for mean in means)


def test_a_race_does_all_trials_in_growing_rounds_and_stops_when_one_class_is_left():
    looks = racing(40, confidence=0.9)
    assert [len(look.trial_positions) for look in looks] == [2, 2, 2, 2, 4, 6, 8, 12, 2]
    assert [look.error_rate for look in looks[:-1]] == pytest.approx([0.1 / 8] * 8)
    errors_CS = torch.rand(12, 40, generator=torch.Generator().manual_seed(0)) * 0.01
    errors_CS[1:] += torch.arange(1, 12)[:, None]
    result = classify(errors_CS, looks, torch.ones(40))
    assert (result.label, result.evaluations, result.decided) == (0, 24, True)
    close = classify(torch.rand(12, 40, generator=torch.Generator().manual_seed(1)), looks, torch.ones(40))
    assert not close.decided and close.evaluations > 350


@pytest.mark.parametrize("classes", [3, 30])
def test_a_race_misses_the_label_of_all_trials_no_more_often_than_its_confidence_allows(classes):
    """Errors as `Look` assumes them, most images undecided."""
    N, S = 1500, 64
    g = torch.Generator().manual_seed(0)
    means = 0.15 * torch.randn(N, classes, 1, generator=g)
    errors_NCS = means + torch.randn(N, classes, S, generator=g) + 5 * torch.rand(1, 1, S, generator=g)
    results = eliminate(lookup(errors_NCS), N, classes, racing(S, confidence=0.8), torch.ones(S))
    labels = torch.tensor([r.label for r in results])
    missed = (labels != errors_NCS.mean(2).argmin(1)).double().mean()
    assert missed < 0.2
    assert sum(r.evaluations for r in results) < 0.8 * N * classes * S


@pytest.mark.parametrize("classes", [2, 3, 12])
@pytest.mark.parametrize("done", [2, 4, 8])
@pytest.mark.parametrize(("ahead", "behind"), [(0.0, 0.0), (0.3, 0.0), (0.0, 20.0)])
def test_one_look_drops_the_class_of_all_trials_no_more_often_than_its_error_rate(classes, done, ahead, behind):
    N, S, rate = 4000, 64, 0.05
    look = Look(trial_positions=tuple(range(done)), trials=S, error_rate=rate)
    g = torch.Generator().manual_seed(classes * done)
    errors_NCS = torch.randn(N, classes, S, generator=g, dtype=torch.float64)
    errors_NCS[:, 0] -= ahead
    errors_NCS[:, -1] += behind  # a class that is out of the question says nothing of the others
    best_N = errors_NCS.mean(2).argmin(1)
    kept_NC = torch.stack([look.survivors(e[:, :done], torch.arange(done)) for e in errors_NCS])
    dropped = float((~kept_NC[torch.arange(N), best_N]).double().mean())
    assert dropped < rate + 3 * (rate / N) ** 0.5
    if classes == 12 and not ahead:  # the rate is used, not undercut
        assert dropped > 0.4 * rate


@pytest.mark.parametrize("freedom", [1.0, 11.0])
def test_chances_of_least_are_shares_of_drawn_races(freedom):
    expected_A, N = torch.tensor([0.0, 0.1, 0.4, 0.4, 3.0], dtype=torch.float64), 200_000
    chances_A = chances_of_least(expected_A, 0.5, freedom)
    drawn_NA = expected_A + 0.5 * torch.from_numpy(
        np.random.default_rng(0).standard_t(freedom, size=(N, len(expected_A)))
    )
    shares_A = drawn_NA.argmin(1).bincount(minlength=5) / N
    assert torch.allclose(chances_A, shares_A.double(), atol=0.004)
    assert float(chances_A.sum()) == pytest.approx(1, abs=0.005)
    far_A = chances_of_least(torch.tensor([0.0, 0.0, 1e6], dtype=torch.float64), 0.5, freedom)
    assert far_A.tolist() == pytest.approx([0.5, 0.5, 0], abs=1e-4)
    assert torch.equal(
        chances_of_least(torch.tensor([2.0, 1.0, 1.0]), 0.0, freedom), torch.tensor([0.0, 0.5, 0.5]).double()
    )


@pytest.mark.parametrize("between", [0.0, 0.5])
def test_final_means_are_expected_where_they_come_to_lie(between):
    classes, done, S = 2000, 4, 32
    g = torch.Generator().manual_seed(0)
    true_A = between * torch.randn(classes, generator=g, dtype=torch.float64)
    errors_AS = true_A[:, None] + torch.randn(classes, S, generator=g, dtype=torch.float64)
    expected_A, deviation = final_means(errors_AS[:, :done].mean(1), 1.0, 600.0, done, S)
    residuals_A = errors_AS.mean(1) - expected_A
    assert abs(residuals_A.mean()) < 3 * deviation / classes**0.5
    assert residuals_A.std() == pytest.approx(deviation, rel=0.15)
    assert (
        torch.corrcoef(torch.stack([residuals_A, expected_A]))[0, 1].abs() < 0.2
    )  # neither too far apart nor too near


def test_a_race_that_cannot_be_run_is_refused():
    with pytest.raises(ValueError, match=r"confidence = 1"):
        racing(8, confidence=1.0)
    with pytest.raises(ValueError, match="error_rate = 0"):
        Look(trial_positions=(0,), trials=2, error_rate=0)
    one = Look(trial_positions=(0,), trials=2, error_rate=0.1)
    with pytest.raises(ValueError, match="2 or more"):
        classify(torch.rand(3, 2), (one,), torch.ones(2))


def test_the_scorer_has_no_place_for_a_true_label():
    assert list(inspect.signature(eliminate).parameters) == [
        "errors_fn",
        "num_images",
        "num_classes",
        "stages",
        "weights_S",
        "offsets_NC",
    ]
