"""Simple heads on frozen features: logistic regression, the nearest class mean, the nearest shot."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.spatial.distance import cdist
from scipy.special import softmax
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from fewshot_diti.baselines.base import Baseline
from fewshot_diti.data.images import ImageSource

Features = Callable[[Sequence[ImageSource]], np.ndarray]  # images to [N, D]

STRENGTHS = tuple(np.logspace(-3, 2, 6))  # the candidates for C of logistic regression


def logistic_head(labels_N: np.ndarray) -> Pipeline:
    """Logistic regression on standardised features, to be fitted on shots of these labels.

    Its strength C is chosen by cross-validation on the shots, 1 where a class has one shot.
    """
    fewest = int(np.bincount(labels_N).min())
    model = LogisticRegression(max_iter=1000)
    if fewest > 1:
        model = GridSearchCV(model, {"C": STRENGTHS}, cv=min(4, fewest))
    # as many components as shots lose nothing, and make wide features cheap
    return make_pipeline(StandardScaler(), PCA(), model)


class LogisticProbe(Baseline):
    """`logistic_head` on features of images.

    Args:
        features: of images.
    """

    def __init__(self, features: Features) -> None:
        self.features = features

    def _fit(self, images: list[ImageSource], labels_N: np.ndarray) -> None:
        self._model = logistic_head(labels_N).fit(self.features(images), labels_N)

    def predict_proba(self, images: Sequence[ImageSource]) -> np.ndarray:
        """Probabilities [N, C]."""
        return self._model.predict_proba(self.features(images))


class NearestMean(Baseline):
    """The class whose mean feature is nearest; probabilities: softmax of minus the squared distance.

    Args:
        features: of images.
    """

    def __init__(self, features: Features) -> None:
        self.features = features

    def _fit(self, images: list[ImageSource], labels_N: np.ndarray) -> None:
        shots = self.features(images)
        self._means_CD = np.stack([shots[labels_N == c].mean(0) for c in range(len(self.classes_))])

    def predict_proba(self, images: Sequence[ImageSource]) -> np.ndarray:
        """Probabilities [N, C]."""
        return softmax(-cdist(self.features(images), self._means_CD, "sqeuclidean"), axis=1)


class NearestNeighbour(Baseline):
    """The class of the nearest shot; probabilities: softmax of minus the squared distance to each class's nearest.

    Args:
        features: of images; latents, for one.
    """

    def __init__(self, features: Features) -> None:
        self.features = features

    def _fit(self, images: list[ImageSource], labels_N: np.ndarray) -> None:
        self._shots_ND, self._labels_N = self.features(images), labels_N

    def predict_proba(self, images: Sequence[ImageSource]) -> np.ndarray:
        """Probabilities [N, C]."""
        distances = cdist(self.features(images), self._shots_ND, "sqeuclidean")
        nearest = [distances[:, self._labels_N == c].min(1) for c in range(len(self.classes_))]
        return softmax(-np.stack(nearest, 1), axis=1)
