"""A mixture of low-rank Gaussians, on which the best denoiser is known in closed form (Li et al., NeurIPS 2025).

An image of class k is x_0 = U_k a + delta V_k e, with a and e standard normal, the orthonormal U_k [n, d] the class's
subspace and V_k its complement. The subspaces of the K classes are orthogonal to each other, n = K d. A noised image
is x = x_0 + sigma noise; in diffusion x = x_t / sqrt(abar_t) and sigma^2 = (1 - abar_t) / abar_t.

The class signal-to-noise ratio (CSNR) of what a denoiser makes of images is the energy of it inside the subspace of
the image's class over that outside. It says how well classes can be separated in it.

Shapes in names: N images, n dimensions, d of a class's subspace, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import softmax


@dataclass(frozen=True, kw_only=True)
class LowRankMixture:
    """The mixture.

    Attributes:
        classes: K.
        dims: d, of each class's subspace.
        delta: standard deviation outside of the subspace, where inside it is 1; above 0.
        seed: of the subspaces.

    Raises:
        ValueError: a value is out of its range.
    """

    classes: int = 3
    dims: int = 5
    delta: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.classes < 2 or self.dims < 1:
            raise ValueError(
                f"classes={self.classes}, dims={self.dims}; pass 2 classes or more, of 1 dimension or more."
            )
        if not self.delta > 0:
            raise ValueError(f"delta={self.delta}; pass a number above 0.")

    @property
    def subspaces_Knd(self) -> np.ndarray:
        """Orthonormal bases."""
        n = self.classes * self.dims
        basis, _ = np.linalg.qr(np.random.default_rng(self.seed).normal(size=(n, n)))
        return np.stack(np.split(basis, self.classes, axis=1))

    def draw(self, images: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Images [N, n] and their classes [N]."""
        bases, labels_N = self.subspaces_Knd, rng.integers(self.classes, size=images)
        x_0 = self.delta * rng.normal(size=(images, bases.shape[1]))
        inside = np.einsum("Nnd,Nn->Nd", bases[labels_N], x_0)
        return x_0 + np.einsum("Nnd,Nd->Nn", bases[labels_N], inside * (1 / self.delta - 1)), labels_N

    def denoise(self, x_Nn: np.ndarray, sigma: float) -> np.ndarray:
        """The posterior mean E[x_0 | x], what the best denoiser gives at noise level sigma."""
        bases = self.subspaces_Knd
        inside_KNn = np.einsum("Knd,Kmd,Nm->KNn", bases, bases, x_Nn, optimize=True)
        kept, kept_outside = 1 / (1 + sigma**2), self.delta**2 / (self.delta**2 + sigma**2)
        evidence_KN = (kept - kept_outside) / (2 * sigma**2) * (inside_KNn**2).sum(2)
        weights_KN = softmax(evidence_KN, axis=0)
        return kept_outside * x_Nn + (kept - kept_outside) * np.einsum("KN,KNn->Nn", weights_KN, inside_KNn)

    def closed_form(self, sigma: float, *, noisy: bool = False) -> float:
        """CSNR of the best denoiser, approximated by the posterior's weights at expected norms (the paper's theorem).

        Args:
            noisy: the denoiser reads noised images, not clean ones.
        """
        variance, others = self.delta**2, self.classes - 1
        exponent = (1 - variance) ** 2 * self.dims / (2 * (1 + sigma**2) * (variance + sigma**2))
        own = 1 / (1 + others * np.exp(-exponent))
        mixed = [(1 - variance) * weight + variance for weight in (own, (1 - own) / others)]
        ratio = (1 + sigma**2 / variance * mixed[0]) / (1 + sigma**2 / variance * mixed[1])
        scale = (1 + sigma**2) / (variance + sigma**2) if noisy else 1 / variance
        return float(scale / others * ratio**2)


def memorising_denoiser(x_Nn: np.ndarray, samples_Mn: np.ndarray, sigma: float) -> np.ndarray:
    """The posterior mean where the images are these samples and no others: what a network that has memorised its
    training images gives."""
    distances_NM = ((x_Nn[:, None] - samples_Mn) ** 2).sum(2)
    weights_NM: np.ndarray = softmax(-distances_NM / (2 * sigma**2), axis=1)
    return weights_NM @ samples_Mn


def csnr(found_Nn: np.ndarray, labels_N: np.ndarray, subspaces_Knd: Sequence[np.ndarray] | np.ndarray) -> float:
    """Mean over classes of the energy inside the class's subspace over the energy outside.

    Args:
        found_Nn: what a denoiser made of images, centred.
        labels_N: their classes, positions among the subspaces.
        subspaces_Knd: orthonormal bases.

    Raises:
        ValueError: a class has no image.
    """
    ratios = []
    for label, basis_nd in enumerate(subspaces_Knd):
        of_class = found_Nn[labels_N == label]
        if not len(of_class):
            raise ValueError(f"Class {label} has no image; pass one or more of each of {len(subspaces_Knd)} classes.")
        inside, whole = ((of_class @ basis_nd) ** 2).sum(), (of_class**2).sum()
        ratios.append(inside / (whole - inside))
    return float(np.mean(ratios))


def subspace(images_Nn: np.ndarray, rank: int) -> np.ndarray:
    """The `rank` directions [n, rank] with the most energy of centred images.

    Raises:
        ValueError: there are fewer images than directions.
    """
    if len(images_Nn) < rank:
        raise ValueError(f"{len(images_Nn)} images for a subspace of {rank} dimensions; pass {rank} or more.")
    _, _, directions = np.linalg.svd(images_Nn, full_matrices=False)
    return np.ascontiguousarray(directions[:rank].T)


def is_unimodal(values: Sequence[float] | np.ndarray) -> bool:
    """Whether a curve has one peak: one local maximum after a median over three points, which stands above the higher
    end by more than a tenth of the range."""
    curve = np.asarray(values, dtype=float)
    smooth = np.array([curve[0], *np.median([curve[:-2], curve[1:-1], curve[2:]], axis=0), curve[-1]])
    steps = np.sign(np.diff(smooth))
    steps = steps[steps != 0]
    peaks = int(((steps[:-1] > 0) & (steps[1:] < 0)).sum())
    spread = smooth.max() - smooth.min()
    return peaks == 1 and bool(smooth.max() - max(smooth[0], smooth[-1]) > 0.1 * spread)
