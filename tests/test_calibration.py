"""The temperature and the window that held-out shots choose."""

import itertools
import math

import pytest
import torch
from fewshot_diti.held_out import fit_temperature, negative_log_likelihood
from hypothesis import given, settings
from hypothesis import strategies as st

from fewshot_diti.calibration import candidate_windows, choose_window
from fewshot_diti.trials import even_grid


def test_the_temperature_that_drew_the_labels_is_found():
    generator = torch.Generator().manual_seed(0)
    scores = 3 + 0.01 * torch.randn(4000, 5, generator=generator)
    for temperature in (0.003, 0.02):
        labels = torch.multinomial((-scores / temperature).softmax(dim=1), 1, generator=generator)[:, 0]
        assert fit_temperature(scores, labels) == pytest.approx(temperature, rel=0.15)


@given(st.integers(0, 2**31), st.floats(1e-4, 1e4), st.floats(-5, 5))
@settings(max_examples=20, deadline=None)
def test_the_temperature_scales_with_the_scores_and_no_other_is_likelier(seed, scale, shift):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(40, 4, generator=generator, dtype=torch.float64)
    labels = torch.where(torch.rand(40, generator=generator) < 0.7, scores.argmin(dim=1), torch.arange(40) % 4)
    temperature = fit_temperature(scores, labels)
    assert fit_temperature(scale * scores + shift, labels) == pytest.approx(scale * temperature, rel=1e-3)
    # The one further image of unknown class, written out: each label once more per class, N C + C images in all.
    smoothed = torch.cat([scores.repeat(40 * 4, 1), scores.repeat(4, 1)])
    targets = torch.cat([labels.repeat(40 * 4), torch.arange(4).repeat_interleave(40)])
    best = negative_log_likelihood(smoothed, targets, temperature)
    for factor in (0.8, 0.99, 1.01, 1.25):
        assert best <= negative_log_likelihood(smoothed, targets, factor * temperature) + 1e-12


def test_shots_that_are_all_right_still_give_probabilities_below_one():
    scores = 1 - 0.1 * torch.eye(4).repeat(5, 1)
    temperature = fit_temperature(scores, torch.arange(4).repeat(5))
    assert (-scores / temperature).softmax(dim=1).max().item() == pytest.approx(1 - 0.75 / 21, abs=1e-4)


def test_scores_that_mislead_give_nearly_equal_probabilities():
    scores = 1 + 0.1 * torch.eye(4).repeat(5, 1)
    temperature = fit_temperature(scores, torch.arange(4).repeat(5))
    assert negative_log_likelihood(scores, torch.arange(4).repeat(5), temperature) == pytest.approx(
        math.log(4), abs=1e-3
    )


def test_scores_and_labels_that_fit_no_temperature_are_refused():
    labels = torch.tensor([0, 1])
    with pytest.raises(ValueError, match="class index 1 has the score nan"):
        fit_temperature(torch.tensor([[1.0, 2.0, 3.0], [1.0, math.nan, 2.0]]), labels)
    with pytest.raises(ValueError, match="same in all classes"):
        fit_temperature(torch.ones(2, 3), labels)
    with pytest.raises(ValueError, match="C >= 2"):
        fit_temperature(torch.ones(2, 1), labels)
    with pytest.raises(ValueError, match="indices from 0 to 2"):
        fit_temperature(torch.rand(2, 3), torch.tensor([0, 3]))


def test_the_candidates_are_all_windows_between_tenths_of_the_schedule():
    windows = candidate_windows(1000)
    assert len(windows) == 55 and windows[0] == (0, 100) and (0, 1000) in windows and windows[-1] == (900, 1000)


def held_out_errors(informative: tuple[int, int], timesteps: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    errors = 1 + 0.1 * torch.randn(len(labels), 6, len(timesteps), generator=generator)
    inside = (timesteps >= informative[0]) & (timesteps < informative[1])
    errors[torch.arange(len(labels)), labels] -= 0.1 * inside.float()
    return errors


@pytest.mark.parametrize("informative", [(0, 300), (200, 500), (700, 1000)])
def test_the_window_that_holds_the_information_is_chosen(informative):
    labels = torch.arange(96) % 6
    steps = even_grid(40, 0, 1000)
    lo, hi = choose_window(held_out_errors(informative, steps, labels), labels, steps, candidate_windows(1000))
    assert abs(lo - informative[0]) <= 100 and abs(hi - informative[1]) <= 100


def test_the_choice_depends_neither_on_the_order_of_candidates_nor_of_images():
    labels = torch.arange(30) % 6
    steps = even_grid(20, 0, 1000)
    errors = held_out_errors((100, 400), steps, labels)
    candidates = candidate_windows(1000)
    chosen = choose_window(errors, labels, steps, candidates)
    assert choose_window(errors.flip(0), labels.flip(0), steps.expand(30, -1), candidates[::-1]) == chosen


def test_equally_likely_windows_go_to_the_wider_and_then_to_the_smaller_lo():
    labels = torch.arange(8) % 2
    steps = torch.tensor([50, 150, 250, 350])
    errors = (1 - torch.nn.functional.one_hot(labels, 2).float())[:, :, None].repeat(1, 1, 4)
    for candidates in itertools.permutations([(0, 100), (0, 300), (100, 400), (200, 300)]):
        assert choose_window(errors, labels, steps, candidates) == (0, 300)


def test_candidates_without_a_trial_are_left_out_and_none_left_is_an_error():
    labels = torch.arange(8) % 2
    errors = held_out_errors((0, 1000), torch.tensor([50, 950]), labels)
    assert choose_window(errors, labels, torch.tensor([50, 950]), [(100, 900), (0, 100)]) == (0, 100)
    with pytest.raises(ValueError, match="none of the 1 candidate windows"):
        choose_window(errors, labels, torch.tensor([50, 950]), [(100, 900)])
