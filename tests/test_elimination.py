"""Elimination schedules against the published counts; eliminate against scoring everything."""

import inspect
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
from fewshot_diti.timesteps import even_grid, score

SHAPES = {"seed": st.integers(0, 2**31), "C": st.integers(1, 12), "S": st.integers(1, 20)}


def random_image(seed, C, S):
    generator = torch.Generator().manual_seed(seed)
    errors_CS = torch.rand(C, S, generator=generator, dtype=torch.float64)
    return errors_CS, torch.rand(S, generator=generator, dtype=torch.float64) + 0.01, generator


def lookup(errors_CS):
    return lambda class_indices, trial_positions: errors_CS[class_indices][:, trial_positions]


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
            eliminate(lookup(torch.rand(4, 3)), 4, stages, weights)


@given(**SHAPES)
@settings(max_examples=30, deadline=None)
def test_the_exhaustive_stage_gives_the_smallest_score_and_ranks_all_classes_by_it(seed, C, S):
    errors_CS, weights_S, _ = random_image(seed, C, S)
    scores = score(errors_CS[None], weights_S)[0]
    result = eliminate(lookup(errors_CS), C, exhaustive(S), weights_S)
    assert result.label == scores.argmin().item()
    assert result.order == scores.argsort().tolist()
    torch.testing.assert_close(result.scores, scores, rtol=1e-14, atol=0)


@given(**SHAPES)
@settings(max_examples=30, deadline=None)
def test_permuting_the_classes_permutes_the_result(seed, C, S):
    errors_CS, weights_S, generator = random_image(seed, C, S)
    permutation = torch.randperm(C, generator=generator)
    stages = halving(C, S)
    plain = eliminate(lookup(errors_CS), C, stages, weights_S)
    permuted = eliminate(lookup(errors_CS[permutation]), C, stages, weights_S)
    assert [permutation[c].item() for c in permuted.order] == plain.order
    assert torch.equal(permuted.scores, plain.scores[permutation])


@given(**SHAPES)
@settings(max_examples=30, deadline=None)
def test_only_classes_still_in_are_asked_for_and_the_count_of_evaluations_is_met(seed, C, S):
    errors_CS, weights_S, _ = random_image(seed, C, S)
    asked = []

    def errors_fn(class_indices, trial_positions):
        asked.append((class_indices.tolist(), trial_positions.tolist()))
        return errors_CS[class_indices][:, trial_positions]

    stages = halving(C, S)
    result = eliminate(errors_fn, C, stages, weights_S)
    assert sum(len(classes) * len(positions) for classes, positions in asked) == count_evaluations(stages, C)
    assert sorted(result.order) == list(range(C)) and result.order[0] == result.label
    for (before, _), (after, _), stage in zip(asked, asked[1:], stages, strict=False):
        assert set(after) == set(result.order[: stage.keep]) and set(after) <= set(before)
    done = [p for stage in stages for p in stage.trial_positions]
    survivors = asked[-1][0]
    expected = (errors_CS[survivors][:, done] * weights_S[done]).mean(dim=1)
    torch.testing.assert_close(result.scores[survivors], expected, rtol=1e-12, atol=0)
    assert result.label == survivors[expected.argmin()]


def test_the_label_is_a_class_index_and_no_place_among_the_survivors():
    errors_CS = torch.ones(100, 500)
    errors_CS[97] = 0.5
    result = eliminate(lookup(errors_CS), 100, published_stages(100), torch.ones(500))
    assert result.label == 97 and len(result.order) == 100


def test_ties_go_to_the_lower_class_index():
    result = eliminate(lookup(torch.ones(30, 500)), 30, published_stages(30), torch.ones(500))
    assert result.order == list(range(30))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_broken_class_token_raises_by_class_index_also_in_a_late_stage(value):
    errors_CS = torch.ones(30, 500)
    errors_CS[23] = 0.5
    errors_CS[23, published_stages(30)[2].trial_positions[7]] = value
    with pytest.raises(ValueError, match="class index 23 "):
        eliminate(lookup(errors_CS), 30, published_stages(30), torch.ones(500))


def test_a_stage_without_any_weight_raises_instead_of_dropping_classes_blindly():
    weights_S = (even_grid(500, 0, 1000) < 20).double()
    with pytest.raises(ValueError, match="20 trials up to stage 1 have weight 0"):
        eliminate(lookup(torch.rand(30, 500)), 30, published_stages(30), weights_S)
    eliminate(lookup(torch.rand(30, 500)), 30, exhaustive(500), weights_S)


def test_errors_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(4, 1\) for 4 classes x 3 trials"):
        eliminate(lambda classes, positions: torch.rand(4, 1), 4, exhaustive(3), torch.ones(3))


def test_the_scorer_has_no_place_for_a_true_label():
    assert list(inspect.signature(eliminate).parameters) == ["errors_fn", "num_classes", "stages", "weights_S"]
