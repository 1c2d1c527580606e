"""Two methods on the same test images: McNemar's test and the difference in accuracy with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How method a does against method b.

    Attributes:
        difference: mean accuracy of a minus that of b, -1 to 1, over images and seeds.
        low, high: its 95 % interval, by bootstrap over images and seeds.
        p_values: of McNemar's exact test, one per seed.
    """

    difference: float
    low: float
    high: float
    p_values: tuple[float, ...]


def mcnemar(correct_a_N: np.ndarray, correct_b_N: np.ndarray) -> float:
    """Exact two-sided p-value (McNemar, 1947): of the images on which one alone is right, half should be a's."""
    only_a, only_b = int((correct_a_N & ~correct_b_N).sum()), int((correct_b_N & ~correct_a_N).sum())
    if only_a + only_b == 0:
        return 1.0
    return float(binomtest(only_a, only_a + only_b).pvalue)


def compare(
    correct_a: Sequence[np.ndarray], correct_b: Sequence[np.ndarray], *, resamples: int = 2000, seed: int = 0
) -> Comparison:
    """Compares two methods, each with one bool [N] per seed, on the same images in the same order.

    The bootstrap draws seeds, and images, with replacement; an image that is drawn counts for every seed that is, since
    the seeds share the test images.

    Raises:
        ValueError: no seeds, or the two differ in seeds or images.
    """
    if not correct_a or [len(c) for c in correct_a] != [len(c) for c in correct_b]:
        raise ValueError(
            f"Images by seed: {[len(c) for c in correct_a]} against {[len(c) for c in correct_b]}; two methods are "
            "compared on the same seeds and images."
        )
    differences_KN = np.stack(correct_a).astype(float) - np.stack(correct_b)
    seeds, images = differences_KN.shape
    rng = np.random.default_rng(seed)
    seed_counts = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples)
    image_counts = rng.multinomial(images, np.full(images, 1 / images), size=resamples)
    means = np.einsum("rk,kn,rn->r", seed_counts, differences_KN, image_counts, optimize=True) / (seeds * images)
    low, high = np.quantile(means, (0.025, 0.975))
    return Comparison(
        difference=float(differences_KN.mean()),
        low=float(low),
        high=float(high),
        p_values=tuple(mcnemar(a, b) for a, b in zip(correct_a, correct_b, strict=True)),
    )
