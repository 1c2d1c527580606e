"""Weights against their definitions at high precision, scores and grids against plain loops."""

import itertools
import math
import re

import mpmath
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_ndtr, logsumexp

from fewshot_diti import timesteps as ts
from fewshot_diti.trials import drawn_grid, even_grid

SCHEDULER = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
ABAR = SCHEDULER.alphas_cumprod.double()
T = len(ABAR)


def tif_by_mpmath(abar: float, distances: range) -> list[float]:
    """`tif` at one t for whole d, at 30 digits; they share the terms erfc(s k), so each is computed once."""
    with mpmath.workdps(30):
        s = mpmath.sqrt(mpmath.mpf(abar)) / (2 * mpmath.sqrt(2 * (1 - mpmath.mpf(abar))))
        terms = {k: mpmath.erfc(s * k) for k in distances}
        k = distances[-1]
        # The terms fall ever faster: those left out sum to less than 1e-11 of any sum.
        while k < distances[-1] + 500 and terms[k] > 1e-13 * terms[distances[-1]]:
            k += 1
            terms[k] = mpmath.erfc(s * k)
        tails = {k + 1: mpmath.mpf(0)}
        for j in range(k, distances[0] - 1, -1):
            tails[j] = tails[j + 1] + terms[j]
        nothing = mpmath.mpf(0)
        return [float(terms[d] / (tails[d] - tails.get(d + 501, nothing))) for d in distances]


def test_tif_is_its_formula_at_thirty_digits_for_d_from_1_to_50_at_every_timestep():
    distances = range(1, 51)
    truth_TD = torch.tensor([tif_by_mpmath(abar, distances) for abar in ABAR.tolist()], dtype=torch.float64)
    weights_TD = torch.stack([ts.tif(ABAR, d) for d in distances], dim=1)
    torch.testing.assert_close(weights_TD, truth_TD, rtol=1e-9, atol=0)


@pytest.mark.parametrize("d", [1.5, 9.97, 27.5])
def test_tif_is_log_erfc_and_logsumexp_for_d_between_whole_numbers_too(d):
    s = np.sqrt(ABAR.numpy() / (8 * (1 - ABAR.numpy())))[:, None]
    log_erfc = math.log(2) + log_ndtr(-math.sqrt(2) * s * (d + np.arange(501)))
    truth = np.exp(log_erfc[:, 0] - logsumexp(log_erfc, axis=1))
    np.testing.assert_allclose(ts.tif(ABAR, d).numpy(), truth, rtol=1e-9, atol=1e-9)


def test_tif_falls_with_t_where_its_released_form_is_an_accidental_band_pass():
    for d in (1.0, 10.0, 50.0):
        weights = ts.tif(ABAR, d)
        assert (weights.diff() <= 0).all() and weights[0] > 0.9 and weights[-1] >= 1 / 501
    released = ts.tif_released(10)
    assert (released[:151] == 0).all()
    assert released[[200, 400]].tolist() == pytest.approx([0.994, 0.53], abs=2e-3)
    assert released[180] > 0.999 and released[999] < 0.01


def test_tif_released_is_one_minus_erf_with_float32_linear_betas():
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    for t in (0, 170, 171, 300, 999):
        scale = (abar[t].sqrt() / (2 * (2 * (1 - abar[t])).sqrt())).item()
        lost = [1 - math.erf(scale * (7.5 + j)) for j in range(501)]
        expected = lost[0] / (sum(lost) + 1e-18)
        assert ts.tif_released(7.5)[t].item() == pytest.approx(expected, rel=1e-12, abs=0)


def test_a_zero_terminal_snr_schedule_gets_finite_weights():
    abar = ABAR.clone()
    abar[-1] = 0
    assert ts.tif(abar, 5.0)[-1].item() == pytest.approx(1 / 501)
    assert ts.pdae(abar)[-1] == 0


def test_snr_and_pdae_follow_their_formulas_and_pdae_peaks_at_one():
    snr = np.array([a / (1 - a) for a in ABAR.tolist()])
    np.testing.assert_allclose(ts.snr(ABAR).numpy(), snr, rtol=1e-14)
    for gamma in (0.1, 0.5):
        raw = snr**gamma / (1 + snr)
        np.testing.assert_allclose(ts.pdae(ABAR, gamma).numpy(), raw / raw.max(), rtol=1e-13)
    assert ts.pdae(ABAR).max() == 1


def test_every_weight_is_float64_over_the_schedule_also_for_a_float32_one():
    abar = SCHEDULER.alphas_cumprod
    for weights in (ts.uniform(abar), ts.window(abar, 0, 5), ts.pdae(abar), ts.tif(abar, 3.0), ts.tif_released(3.0)):
        assert weights.dtype == torch.float64 and weights.shape == (T,)
        assert (weights >= 0).all() and (weights <= 1).all()


def test_a_half_precision_or_impossible_schedule_is_refused():
    for bad in (ABAR.half(), ABAR[None], torch.tensor([0.5, 1.0])):
        with pytest.raises(ValueError, match="alphas_cumprod"):
            ts.snr(bad)


def test_window_holds_lo_and_not_hi_and_refuses_what_is_empty_or_outside():
    assert ts.window(ABAR, 100, 300).nonzero().flatten().tolist() == list(range(100, 300))
    assert ts.window(ABAR, 0, T).sum() == T
    for lo, hi in [(5, 5), (7, 3), (-1, 5), (0, T + 1)]:
        with pytest.raises(ValueError, match=re.escape(f"window({lo}, {hi})")):
            ts.window(ABAR, lo, hi)


@pytest.mark.parametrize("d", [0.0, -1.0, math.nan, math.inf])
def test_tif_refuses_a_distance_that_is_none(d):
    with pytest.raises(ValueError, match="distance between classes"):
        ts.tif(ABAR, d)
    with pytest.raises(ValueError, match="distance between classes"):
        ts.tif_released(d)


def test_spread_is_one_over_the_standard_deviation_over_classes_at_the_trials_timesteps():
    errors = torch.rand(6, 4, 5, generator=torch.Generator().manual_seed(1))
    steps = torch.tensor([10, 200, 450, 451, 900])
    weights = ts.spread(errors, steps, T)
    expected = 1 / errors.double().std(dim=1, correction=0).mean(dim=0)
    torch.testing.assert_close(weights[steps], expected)
    assert weights[0] == weights[10] and weights[999] == weights[900]
    assert weights[105].item() == pytest.approx(math.sqrt(weights[10] * weights[200]))  # halfway, in the logarithm


def test_relative_is_one_over_the_mean_error_at_the_trials_timesteps():
    errors = torch.rand(6, 4, 5, generator=torch.Generator().manual_seed(1))
    steps = torch.tensor([10, 200, 450, 451, 900])
    weights = ts.relative(errors, steps, T)
    torch.testing.assert_close(weights[steps], 1 / errors.double().mean(dim=(0, 1)))
    scores = ts.weighted_mean(errors, ts.trial_weights(weights, steps))
    assert scores.mean().item() == pytest.approx(1)  # in units of the usual error


def test_spread_from_timesteps_of_each_image_finds_the_same_curve():
    generator = torch.Generator().manual_seed(2)
    steps = torch.randint(0, T, (40, 50), generator=generator)
    truth = torch.exp(-torch.arange(T) / 250)
    errors = torch.randn(40, 12, 50, generator=generator) * truth[steps][:, None] + 1
    ratio = ts.spread(errors, steps, T) * truth
    assert 0.85 < ratio[50:950].min() / ratio[50:950].max() <= 1


def test_spread_bounds_the_weight_of_a_timestep_at_which_classes_do_not_differ():
    errors = torch.rand(4, 3, 5, generator=torch.Generator().manual_seed(3))
    errors[:, :, 2] = 0.5
    weights = ts.spread(errors, torch.tensor([1, 2, 3, 4, 5]), 10)
    spread_S = errors.double().std(dim=1, correction=0).mean(dim=0)
    assert weights[3].item() == weights.max() == pytest.approx(1000 / spread_S.median().item())
    with pytest.raises(ValueError, match="same at most timesteps"):
        ts.spread(torch.full((2, 3, 4), 0.1), torch.arange(4), 10)
    with pytest.raises(ValueError, match="two classes"):
        ts.spread(errors[:, :1], torch.arange(5), 10)


@given(st.integers(1, 200), st.integers(0, 900), st.integers(1, 100))
def test_an_even_grid_lies_inside_its_window_and_is_symmetric_about_the_middle(num_trials, lo, width):
    grid = even_grid(num_trials, lo, lo + width)
    assert grid.dtype == torch.int64 and len(grid) == num_trials
    assert grid.min() >= lo and grid.max() < lo + width and (grid.diff() >= 0).all()
    assert abs(grid.double().mean() - (lo + width / 2)) <= 1


def test_five_hundred_even_trials_are_the_published_odd_timesteps():
    assert even_grid(500, 0, 1000).tolist() == list(range(1, 1000, 2))
    for num_trials, lo, hi in [(0, 0, 10), (5, 10, 10), (5, -1, 10)]:
        with pytest.raises(ValueError, match="no grid"):
            even_grid(num_trials, lo, hi)


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.booleans(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_score_is_the_weighted_mean_over_trials(seed, N, C, S, per_image, with_density):
    generator = torch.Generator().manual_seed(seed)
    errors = torch.rand(N, C, S, generator=generator)
    shape = (N, S) if per_image else (S,)
    weights = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.01
    density = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5
    scores = ts.weighted_mean(errors, weights, density if with_density else None)
    assert scores.dtype == torch.float64 and scores.shape == (N, C)
    for n, c in itertools.product(range(N), range(C)):
        w, q = (weights[n], density[n]) if per_image else (weights, density)
        terms = [w[s].item() / (q[s].item() if with_density else 1) * errors[n, c, s].item() for s in range(S)]
        assert scores[n, c].item() == pytest.approx(sum(terms) / S, rel=1e-12)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_broken_error_raises_and_names_its_class_even_where_its_weight_is_zero(value):
    errors = torch.ones(2, 5, 3)
    errors[1, 3, 2] = value
    with pytest.raises(ValueError, match="class index 3 "):
        ts.weighted_mean(errors, torch.tensor([1.0, 1.0, 0.0]))
    with pytest.raises(ValueError, match="class index 3 "):
        ts.spread(errors, torch.arange(3), 10)


def test_scores_refuse_weights_that_cannot_rank_classes():
    errors = torch.ones(2, 3, 4)
    with pytest.raises(ValueError, match="of image 1 are 0"):
        ts.weighted_mean(errors, torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]]))
    for bad in (torch.tensor([1.0, -1, 1, 1]), torch.tensor([1.0, math.nan, 1, 1])):
        with pytest.raises(ValueError, match="not negative"):
            ts.weighted_mean(errors, bad)
    with pytest.raises(ValueError, match="shape"):
        ts.weighted_mean(errors, torch.ones(3))
    with pytest.raises(ValueError, match="density"):
        ts.weighted_mean(errors, torch.ones(4), torch.tensor([1.0, 1, 1, 0]))


def test_trial_weights_are_looked_up_and_an_error_names_window_and_timesteps():
    weights_T = ts.window(ABAR, 100, 200)
    assert ts.trial_weights(weights_T, torch.tensor([[99, 100], [199, 200]])).tolist() == [[0, 1], [1, 0]]
    with pytest.raises(ValueError, match="from 100 to 199, and the 3 trials have t from 300 to 700"):
        ts.trial_weights(weights_T, torch.tensor([300, 500, 700]))
    with pytest.raises(ValueError, match="from 0 to 999"):
        ts.trial_weights(weights_T, torch.tensor([0, T]))
    with pytest.raises(ValueError, match="from 0 to 999"):
        ts.trial_weights(weights_T, torch.tensor([100.0, 150.0]))
    with pytest.raises(ValueError, match="the 2 trials have t from 300 to 500"):  # of the second image
        ts.trial_weights(weights_T, torch.tensor([[100, 150], [300, 500]]))


def test_an_even_density_has_the_mean_one_over_the_timesteps_asked_for():
    weights_T = ts.window(ABAR, 150, 200).float()
    density_T = ts.where_weighted(weights_T, 100, 200)
    assert density_T.dtype == torch.float64
    assert density_T[100:200].mean() == 1 and (density_T[150:200] == 2).all()
    assert density_T.sum() == 100


@pytest.mark.parametrize("shape", [(3, 4), (0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_errors_of_another_shape_or_without_any_are_refused(shape):
    with pytest.raises(ValueError, match=re.escape(f"errors have shape {shape}")):
        ts.weighted_mean(torch.ones(shape), torch.ones(4))


def test_spread_takes_two_classes_and_not_one():
    steps = torch.tensor([100, 500])
    errors = torch.rand(5, 2, 2, generator=torch.Generator().manual_seed(2))
    expected = 1 / errors.double().std(dim=1, correction=0).mean(dim=0)
    torch.testing.assert_close(ts.spread(errors, steps, T)[steps], expected)
    with pytest.raises(ValueError, match="errors of 1 class have no spread"):
        ts.spread(errors[:, :1], steps, T)


def test_a_weighting_is_written_as_it_is_read():
    assert str(ts.parse_weighting("window( 0,300 )")) == "window(0, 300)"
    assert str(ts.parse_weighting("window(1,301)")) == "window(1, 301)"
    assert str(ts.parse_weighting("pdae(0.25)")) == "pdae(0.25)"


@pytest.mark.parametrize(
    "text, name, parameters",
    [
        ("uniform", "uniform", ()),
        ("window(0,300)", "window", (0, 300)),
        (" window( 100 , 1000 ) ", "window", (100, 1000)),
        ("pdae", "pdae", ()),
        ("pdae(0.25)", "pdae", (0.25,)),
        ("tif(10)", "tif", (10,)),
        ("tif_released", "tif_released", ()),
        ("spread", "spread", ()),
        ("relative", "relative", ()),
        ("auto", "auto", ()),
    ],
)
def test_a_weighting_reads_back_from_its_own_text(text, name, parameters):
    weighting = ts.parse_weighting(text)
    assert weighting == ts.Weighting(name=name, parameters=parameters)
    assert ts.parse_weighting(str(weighting)) == weighting


@pytest.mark.parametrize(
    "text",
    [
        "",
        "small",
        "window",
        "window(0)",
        "window(3,x)",
        "window(5,5)",
        "window(0.5,3)",
        "pdae(-1)",
        "tif(nan)",
        "auto(1)",
    ],
)
def test_a_weighting_that_does_not_exist_is_an_error_that_shows_how_to_write_one(text):
    with pytest.raises(ValueError, match=r"window\(lo, hi\)|window\(0, 300\)|above 0"):
        ts.parse_weighting(text)


@given(num_trials=st.integers(1, 100))
@settings(max_examples=30, deadline=None)
def test_a_grid_drawn_from_an_even_density_is_the_even_grid(num_trials):
    assert drawn_grid(torch.ones(1000), num_trials).tolist() == even_grid(num_trials, 0, 1000).tolist()


def test_a_drawn_grid_has_the_densitys_share_of_trials_everywhere():
    density = torch.cat([torch.zeros(100), torch.full((300,), 3.0), torch.full((600,), 0.5)])
    grid = drawn_grid(density, 48)
    assert grid.tolist() == sorted(grid.tolist()) and int(grid.min()) >= 100
    assert int((grid < 400).sum()) == 36  # 900 of 1200
    with pytest.raises(ValueError, match="num_trials >= 1"):
        drawn_grid(density, 0)


def test_importance_sampling_gives_the_score_of_an_even_grid_with_equal_shares_of_trials():
    g = torch.Generator().manual_seed(0)
    abar = torch.linspace(0.999, 0.005, 1000, dtype=torch.float64)
    size = torch.linspace(0.1, 3, 1000, dtype=torch.float64)  # classes differ by more at large t
    apart = torch.rand(5, generator=g, dtype=torch.float64)
    errors = (2 + size * apart[:, None])[None]  # [1, 5, 1000]
    weights = ts.pdae(abar)
    times = torch.arange(1000)
    density = ts.importance(ts.where_weighted(weights, 0, 900), weights, ts.spread(errors, times, 1000))
    assert density[:900].mean() == pytest.approx(1) and not density[900:].any()
    grid = drawn_grid(density, 60)
    sampled = ts.weighted_mean(errors[:, :, grid], weights[grid], density[grid])
    even = ts.weighted_mean(errors[:, :, :900], weights[:900])
    torch.testing.assert_close(sampled - sampled[:, :1], even - even[:, :1], rtol=0.02, atol=0)
    moved = (weights * size / density)[grid]
    assert moved[4:].max() / moved[4:].min() < 1.3  # but for the tenth that is even, all trials count alike
    with pytest.raises(ValueError, match="no timestep in"):
        ts.where_weighted(ts.window(abar, 0, 10), 10, 900)


@given(lo=st.integers(0, 500), width=st.integers(1, 499), num_trials=st.integers(1, 80))
@settings(max_examples=30, deadline=None)
def test_trials_are_drawn_only_where_they_have_a_weight(lo, width, num_trials):
    weights = ts.window(torch.linspace(0.999, 0.005, 1000), lo, lo + width)
    grid = drawn_grid(ts.where_weighted(weights, 0, 1000), num_trials)
    assert grid.tolist() == even_grid(num_trials, lo, lo + width).tolist()
