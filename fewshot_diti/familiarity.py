"""Is an image anything that the classifier knows? How similar the most similar shot is, by the frozen U-Net's features.

Shapes in names: N images, n shots, V views of a shot, D values of a feature.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor, cat

from fewshot_diti.discriminant import directions
from fewshot_diti.witnesses import FittedWitness


class Familiarity:
    """The cosine of an image's features with those of the most similar shot, around the mean of all shots.

    Args:
        fitted: the witness "features", of two shots or more.
    """

    def __init__(self, fitted: FittedWitness) -> None:
        shots_nD = cat([views[:, 0] for views in fitted.shots.values()]).float()
        self._mean_D = shots_nD.mean(0)
        self.directions_nD = directions(shots_nD, self._mean_D)

    def similarities(self, read_ND: Tensor) -> np.ndarray:
        """Of each image [N], from -1 to 1."""
        found: np.ndarray = (directions(read_ND, self._mean_D) @ self.directions_nD.T).max(1)
        return found

    def least(self, share: float) -> float:
        """The similarity that a share of the shots stay below, each beside its most similar other shot.

        Raises:
            ValueError: `share` is none.
        """
        if not 0 < share < 1:
            raise ValueError(f"reject={share}; pass a share between 0 and 1 of images like the shots, such as 0.01.")
        return float(np.quantile(self.usual(), share))

    def usual(self) -> np.ndarray:
        """The similarity of each shot and its most similar other shot [n]."""
        cosines_nn = self.directions_nD @ self.directions_nD.T
        np.fill_diagonal(cosines_nn, -1)
        found: np.ndarray = cosines_nn.max(1)
        return found


def features_of(witnesses: Sequence[FittedWitness]) -> FittedWitness:
    """The witness "features"; raises ValueError where there is none."""
    for fitted in witnesses:
        if fitted.name == "features":
            return fitted
    raise ValueError(
        "Only the U-Net's features of the shots show whether an image is known, and this bank keeps none; "
        "fit with witnesses=('features',) among others."
    )
