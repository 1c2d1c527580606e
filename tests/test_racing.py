"""Races: whom they drop, and how often that is a mistake."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_elimination import classify, lookup

from fewshot_diti.elimination import count_evaluations, eliminate
from fewshot_diti.racing import Look, chances_of_least, final_means, nested_order, racing


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
    assert count_evaluations(looks, 12) == 40 * 12  # at most: no class is dropped for certain
    assert [look.error_rate for look in looks[:-1]] == pytest.approx([0.1 / 8] * 8)
    errors_CS = torch.rand(12, 40, generator=torch.Generator().manual_seed(0)) * 0.01
    errors_CS[1:] += torch.arange(1, 12)[:, None]
    result = classify(errors_CS, looks, torch.ones(40))
    assert (result.position, result.evaluations, result.decided) == (0, 24, True)
    close = classify(torch.rand(12, 40, generator=torch.Generator().manual_seed(1)), looks, torch.ones(40))
    assert not close.decided and close.evaluations > 350


@pytest.mark.parametrize("classes", [3, 30])
def test_a_race_misses_the_label_of_all_trials_no_more_often_than_its_confidence_allows(classes):
    """Errors as `Look` assumes them, most images undecided."""
    N, S = (1500 if classes < 10 else 500), 64
    g = torch.Generator().manual_seed(0)
    means = 0.15 * torch.randn(N, classes, 1, generator=g)
    errors_NCS = means + torch.randn(N, classes, S, generator=g) + 5 * torch.rand(1, 1, S, generator=g)
    results = eliminate(lookup(errors_NCS), N, classes, racing(S, confidence=0.8), torch.ones(S))
    labels = torch.tensor([r.position for r in results])
    missed = (labels != errors_NCS.mean(2).argmin(1)).double().mean()
    assert missed < 0.2
    assert sum(r.evaluations for r in results) < 0.8 * N * classes * S


@pytest.mark.parametrize("classes", [2, 3, 12])
@pytest.mark.parametrize("done", [2, 4, 8])
@pytest.mark.parametrize(("ahead", "behind"), [(0.0, 0.0), (0.3, 0.0), (0.0, 20.0)])
def test_one_look_drops_the_class_of_all_trials_no_more_often_than_its_error_rate(classes, done, ahead, behind):
    N, S, rate = 1500, 64, 0.05
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
