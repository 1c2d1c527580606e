"""A linear discriminant on features of the shots: probabilities of the classes, which help the class tokens decide.

Shapes in names: N images, n shots, V views of a shot, C classes, D values of a feature, m dimensions that the shots
span.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from scipy.linalg import eigh
from scipy.special import log_softmax
from sklearn.covariance import ledoit_wolf
from sklearn.preprocessing import normalize
from torch import Tensor

from fewshot_diti.elimination import NotFiniteError
from fewshot_diti.temperature import held_out_temperature

_COSINE_TEMPERATURE = 0.1


class Discriminant:
    """Linear discriminant analysis, the classes' common covariance shrunk towards the identity (Ledoit and Wolf, 2004).

    On directions: the mean of the classes' mean features is taken away, then every length; in the dimensions that the
    shots span. All classes are equally likely beforehand, however many shots each has. With one shot per class nothing
    is known of the scatter within a class, and the cosine to the shot decides.

    Args:
        features_nD: of the shots.
        labels_n: their classes, 0 to C - 1, each with a shot or more.
        temperature: of the softmax over the discriminants.

    Raises:
        ValueError: all shots have the same features.
    """

    def __init__(self, features_nD: np.ndarray, labels_n: np.ndarray, temperature: float = 1.0) -> None:
        classes = range(labels_n.max() + 1)
        self._mean_D = np.mean([features_nD[labels_n == c].mean(0, dtype=np.float64) for c in classes], axis=0)
        directions_nD = normalize(features_nD - self._mean_D)
        # the directions span no more dimensions than there are shots: all else is done in these
        squares, vectors = eigh(directions_nD @ directions_nD.T)
        if not squares[-1] > 0:
            raise ValueError("All shots look the same to the U-Net; check the images, and what their crop leaves.")
        spanned = squares > squares[-1] * 1e-8
        lengths, vectors = np.sqrt(squares[spanned]), vectors[:, spanned]
        places_nm = vectors * lengths
        means_Cm = np.stack([places_nm[labels_n == c].mean(0) for c in classes])
        within_nm = places_nm - means_Cm[labels_n]
        freedom = len(labels_n) - len(means_Cm)
        if np.abs(within_nm).max() > 1e-6:
            shrunk, _ = ledoit_wolf(within_nm, assume_centered=True)
            scatter = within_nm.T @ within_nm / freedom
            covariance = shrunk * len(labels_n) / freedom
            solved_Cm = np.linalg.solve(covariance, means_Cm.T).T
            # a mean of few shots lies further out than the class's own
            too_far_C = np.linalg.solve(covariance, scatter).trace() / np.bincount(labels_n)
            offsets_C = (too_far_C - (solved_Cm * means_Cm).sum(1)) / 2
        else:
            solved_Cm, offsets_C = means_Cm / _COSINE_TEMPERATURE, np.zeros(len(means_Cm))
        self._slopes_CD = solved_Cm @ (vectors / lengths).T @ directions_nD / temperature
        self._offsets_C = offsets_C / temperature

    def log_probabilities(self, features_ND: Tensor) -> Tensor:
        """Log-probabilities [N, C], float64.

        Raises:
            ValueError: a feature is not finite.
        """
        if not features_ND.isfinite().all():
            raise NotFiniteError("The U-Net's features of an image are not finite; load the backbone in float32.")
        directions_ND = normalize(features_ND.numpy() - self._mean_D)
        return torch.from_numpy(log_softmax(directions_ND @ self._slopes_CD.T + self._offsets_C, axis=1))


def directions(features_ND: Tensor, mean_D: Tensor) -> np.ndarray:
    """Features as unit vectors [N, D] around a mean, float32: their products are cosines."""
    found: np.ndarray = normalize((features_ND.float() - mean_D).numpy())
    return found


def fit_discriminant(shots: Mapping[Any, Tensor]) -> Discriminant:
    """The discriminant of features [n_c, V, D] of each class's shots, its columns in the order of the classes given.

    It is fitted on all V views of a shot, the shot itself first, then copies of it in other colours, as many as every
    class has; where some class has one shot, on the shots alone, since copies would make the other classes look too
    well known beside it. Its temperature is fitted on shots that discriminants of the others judge, in four folds; 1
    where every class has one shot.

    Raises:
        ValueError: a feature is not finite, naming the class, or all shots have the same features.
    """
    for label, features in shots.items():
        if not features.isfinite().all():
            raise ValueError(
                f"The U-Net's features of the shots of {label!r} are not finite; load the backbone in float32, or "
                "leave the class out."
            )

    labels_n = np.repeat(np.arange(len(shots)), [len(features) for features in shots.values()])
    others_n = np.bincount(labels_n)[labels_n] > 1  # shots that leave one of their class when they are held out
    fewest = min(features.shape[1] for features in shots.values()) if others_n.all() else 1
    features_nVD = torch.cat([features[:, :fewest] for features in shots.values()]).float()

    def judge(kept_n: np.ndarray, temperature: float = 1.0) -> Discriminant:
        views_nD = features_nVD[kept_n].flatten(0, 1).numpy()
        return Discriminant(views_nD, labels_n[kept_n].repeat(fewest), temperature)

    def judge_held_out(kept_n: np.ndarray, held_n: np.ndarray) -> Tensor:
        return judge(kept_n).log_probabilities(features_nVD[held_n, 0])

    return judge(np.ones(len(labels_n), dtype=bool), held_out_temperature(labels_n, judge_held_out))
