"""The discriminant on features of the shots: its formula, its temperature, and the offsets that it gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.covariance import ledoit_wolf
from sklearn.preprocessing import normalize

from fewshot_diti.discriminant import Discriminant, fit_discriminant
from fewshot_diti.temperature import fit_temperature
from fewshot_diti.witnesses import score_offsets


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


def mahalanobis_squares(points: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    apart = points - mean
    return (apart @ np.linalg.inv(covariance) * apart).sum(1)


def test_the_shortlist_holds_the_likeliest() -> None:
    log_p = torch.log_softmax(torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).double(), 1)
    torch.testing.assert_close(score_offsets([log_p], [0.5]), -0.5 * log_p)
    listed = score_offsets([log_p], [0.0], 2).isfinite()
    assert (listed.sum(1) == 2).all() and (log_p[listed].view(7, 2).amin(1) > log_p[~listed].view(7, 3).amax(1)).all()
    assert score_offsets([log_p], [0.5], 9).isfinite().all()


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
