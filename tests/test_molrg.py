"""A mixture of low-rank Gaussians: the closed forms against other computations of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal

from fewshot_diti.representation.molrg import (
    LowRankMixture,
    csnr,
    is_unimodal,
    memorising_denoiser,
    subspace,
)

SIGMAS = (0.01, 0.2, 0.5, 1.0, 10.0)


def covariances(mixture: LowRankMixture, sigma: float) -> list[np.ndarray]:
    """Of noised images of each class, from the definition."""
    found = []
    for basis in mixture.subspaces_Knd:
        inside = basis @ basis.T
        found.append(inside + mixture.delta**2 * (np.eye(len(inside)) - inside) + sigma**2 * np.eye(len(inside)))
    return found


@pytest.mark.parametrize("sigma", [0.1, 0.5, 2.0])
def test_the_denoiser_is_tweedies_formula_of_the_density(sigma: float) -> None:
    mixture = LowRankMixture(dims=4)
    x = mixture.draw(5, np.random.default_rng(1))[0] + sigma * np.random.default_rng(2).normal(size=(5, 12))
    noised = torch.tensor(x, requires_grad=True)
    parts = [
        torch.distributions.MultivariateNormal(torch.zeros(12, dtype=torch.float64), torch.tensor(c)).log_prob(noised)
        for c in covariances(mixture, sigma)
    ]
    torch.logsumexp(torch.stack(parts), 0).sum().backward()
    assert noised.grad is not None
    assert np.allclose(mixture.denoise(x, sigma), x + sigma**2 * noised.grad.numpy(), atol=1e-9)


def test_images_have_the_covariance_of_their_class() -> None:
    mixture = LowRankMixture(classes=2, dims=2, delta=0.3)
    x, labels = mixture.draw(200_000, np.random.default_rng(0))
    for label, expected in enumerate(covariances(mixture, 0.0)):
        assert np.allclose(np.cov(x[labels == label].T), expected, atol=0.02)


@pytest.mark.parametrize(
    ("sigma", "exact", "form"),
    [(0.01, 12.6, 12.6), (0.2, 45.8, 46.2), (0.5, 273, 411), (1.0, 82.7, 73.7), (10.0, 12.5, 12.5)],
)
def test_csnr_of_clean_images_is_what_was_computed_elsewhere(sigma: float, exact: float, form: float) -> None:
    mixture = LowRankMixture()
    x, labels = mixture.draw(100_000, np.random.default_rng(0))
    assert csnr(mixture.denoise(x, sigma), labels, mixture.subspaces_Knd) == pytest.approx(exact, rel=0.03)
    assert mixture.closed_form(sigma) == pytest.approx(form, rel=0.005)


def test_csnr_of_noised_images_and_its_form_agree_at_both_ends() -> None:
    mixture = LowRankMixture()
    rng = np.random.default_rng(0)
    x, labels = mixture.draw(100_000, rng)
    for sigma in (0.01, 10.0):
        noised = x + sigma * rng.normal(size=x.shape)
        found = csnr(mixture.denoise(noised, sigma), labels, mixture.subspaces_Knd)
        assert mixture.closed_form(sigma, noisy=True) == pytest.approx(found, rel=0.05)


def test_the_ratio_of_the_best_denoiser_has_one_peak() -> None:
    mixture = LowRankMixture()
    x, labels = mixture.draw(5_000, np.random.default_rng(0))
    sigmas = np.geomspace(0.01, 10, 13)
    assert is_unimodal([csnr(mixture.denoise(x, s), labels, mixture.subspaces_Knd) for s in sigmas])
    assert is_unimodal([mixture.closed_form(s) for s in sigmas])


def test_csnr_is_the_ratio_of_projections() -> None:
    rng = np.random.default_rng(3)
    x, bases = rng.normal(size=(40, 6)), LowRankMixture(classes=3, dims=2).subspaces_Knd
    labels = np.arange(40) % 3
    expected = []
    for k, basis in enumerate(bases):
        projector = basis @ basis.T
        of_class = x[labels == k]
        inside = np.mean([np.linalg.norm(projector @ v) ** 2 for v in of_class])
        outside = np.mean([np.linalg.norm(v - projector @ v) ** 2 for v in of_class])
        expected.append(inside / outside)
    assert csnr(x, labels, bases) == pytest.approx(np.mean(expected))
    with pytest.raises(ValueError, match="Class 2 has no image"):
        csnr(x[labels < 2], labels[labels < 2], bases)


def test_a_denoiser_that_has_memorised_gives_its_samples_back() -> None:
    samples = np.random.default_rng(0).normal(size=(6, 8))
    assert np.allclose(memorising_denoiser(samples + 0.01, samples, 0.02), samples)
    assert np.allclose(memorising_denoiser(samples[:2], samples, 1e4), samples.mean(0), atol=1e-5)
    density = [multivariate_normal(s, 0.5**2 * np.eye(8)).pdf(samples[0] + 0.3) for s in samples]
    expected = np.average(samples, axis=0, weights=density)
    assert np.allclose(memorising_denoiser(samples[:1] + 0.3, samples, 0.5)[0], expected)


def test_a_subspace_holds_the_images_that_span_it() -> None:
    basis = LowRankMixture(classes=2, dims=3).subspaces_Knd[0]
    images = np.random.default_rng(0).normal(size=(20, 3)) @ basis.T
    found = subspace(images, 3)
    assert np.allclose(found @ found.T, basis @ basis.T)
    with pytest.raises(ValueError, match="20 images for a subspace of 21"):
        subspace(images, 21)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((1, 2, 3, 4, 3, 2, 1), True),
        ((1, 2, 3, 4, 5, 6, 7), False),
        ((7, 6, 5, 4, 3, 2, 1), False),
        ((1, 2, 9, 2, 3, 4, 3, 2, 1), True),  # one outlier is no peak
        ((1, 3, 5, 5, 2, 1, 1, 3, 5, 5, 2, 1), False),
        ((1, 1, 1, 1, 1), False),
        ((0, 10, 10, 10, 9.5, 9.5), False),  # hardly falls
    ],
)
def test_a_curve_with_one_peak_is_unimodal(values: tuple[float, ...], expected: bool) -> None:
    assert is_unimodal(values) == expected


@pytest.mark.parametrize("wrong", [{"classes": 1}, {"dims": 0}, {"delta": 0.0}])
def test_values_out_of_range_are_named(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LowRankMixture(**wrong)  # type: ignore[arg-type]
