"""Decision schedules against the published counts; eliminate against scoring everything."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewshot_diti.elimination import (
    Stage,
    count_evaluations,
    eliminate,
    exhaustive,
    proportional_stages,
    published_stages,
)
from fewshot_diti.racing import racing
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
    assert result.position == scores.argmin().item() and result.evaluations == C * S
    torch.testing.assert_close(result.scores, scores, rtol=1e-13, atol=0)


@pytest.mark.parametrize("make", [halving, lambda C, S: racing(S, confidence=0.9)])
@given(**SHAPES)
@settings(max_examples=30, deadline=None)
def test_permuting_the_classes_permutes_the_result(make, seed, C, S):
    errors_CS, weights_S, generator = random_image(seed, C, S)
    permutation = torch.randperm(C, generator=generator)
    plain = classify(errors_CS, make(C, S), weights_S)
    permuted = classify(errors_CS[permutation], make(C, S), weights_S)
    assert permutation[permuted.position].item() == plain.position
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
        assert torch.equal(alone.scores, result.scores) and alone.position == result.position
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
    torch.testing.assert_close(result.scores[result.position], expected.min(), rtol=1e-12, atol=0)
    assert result.position == survivors[expected.argmin()] == result.scores.argmin()


def test_the_label_is_a_class_index_and_no_place_among_the_survivors():
    errors_CS = torch.ones(100, 500)
    errors_CS[97] = 0.5
    assert classify(errors_CS, published_stages(100), torch.ones(500)).position == 97
    assert classify(errors_CS, racing(64, confidence=0.9), torch.ones(500)).position == 97


def test_ties_go_to_the_lower_class_index():
    for stages in (published_stages(30), racing(500, confidence=0.9)):
        result = classify(torch.ones(30, 500), stages, torch.ones(500))
        assert result.position == 0 and torch.equal(result.scores, torch.ones(30, dtype=torch.float64))


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
