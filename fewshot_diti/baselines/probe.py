"""Simple heads on frozen features: logistic regression, discriminants, the nearest class mean, the nearest shot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from scipy.spatial.distance import cdist
from scipy.special import softmax
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from fewshot_diti.baselines.base import Baseline
from fewshot_diti.data.images import ImageSource
from fewshot_diti.features import fit_discriminant

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
        candidates: features by name, of which the shots choose by cross-validation; the first where a class has one
            shot.

    Attributes:
        chosen_: the name of the features, after `fit`.
        strength_: C, after `fit`.
    """

    def __init__(self, candidates: Mapping[str, Features]) -> None:
        self.candidates = candidates

    def _fit(self, images: Sequence[ImageSource], labels_N: np.ndarray) -> None:
        def fitted(features: Features) -> Pipeline:
            return logistic_head(labels_N).fit(features(images), labels_N)

        self.chosen_ = next(iter(self.candidates))
        if len(self.candidates) > 1 and np.bincount(labels_N).min() > 1:
            merits = {name: fitted(features)[-1].best_score_ for name, features in self.candidates.items()}
            self.chosen_ = max(merits, key=lambda name: merits[name])
        self._model = fitted(self.candidates[self.chosen_])
        self.strength_ = float(getattr(self._model[-1], "best_estimator_", self._model[-1]).C)

    def predict_proba(self, images: Sequence[ImageSource]) -> np.ndarray:
        """Probabilities [N, C]."""
        return self._model.predict_proba(self.candidates[self.chosen_](images))


class NearestMean(Baseline):
    """The class whose mean feature is nearest; probabilities: softmax of minus the squared distance.

    Args:
        candidates: as of `LogisticProbe`.

    Attributes:
        chosen_: the name of the features, after `fit`.
    """

    def __init__(self, candidates: Mapping[str, Features]) -> None:
        self.candidates = candidates

    def _fit(self, images: Sequence[ImageSource], labels_N: np.ndarray) -> None:
        self.chosen_ = next(iter(self.candidates))
        fewest = int(np.bincount(labels_N).min())
        if len(self.candidates) > 1 and fewest > 1:
            folds = min(4, fewest)
            merits = {name: self._cross_validated(f(images), labels_N, folds) for name, f in self.candidates.items()}
            self.chosen_ = max(merits, key=lambda name: merits[name])
        self._means_CD = self._means(self.candidates[self.chosen_](images), labels_N)

    def predict_proba(self, images: Sequence[ImageSource]) -> np.ndarray:
        """Probabilities [N, C]."""
        distances = cdist(self.candidates[self.chosen_](images), self._means_CD, "sqeuclidean")
        return softmax(-distances, axis=1)

    def _means(self, features_ND: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
        return np.stack([features_ND[labels_N == c].mean(0) for c in range(len(self.classes_))])

    def _cross_validated(self, features_ND: np.ndarray, labels_N: np.ndarray, folds: int) -> float:
        right = []
        for train, held_out in StratifiedKFold(folds).split(features_ND, labels_N):
            distances = cdist(features_ND[held_out], self._means(features_ND[train], labels_N[train]), "sqeuclidean")
            right.append((distances.argmin(1) == labels_N[held_out]).mean())
        return float(np.mean(right))


class ShrinkageLda(Baseline):
    """`features.fit_discriminant`: linear discriminant analysis with a shrunk covariance.

    Args:
        features: of images.
    """

    def __init__(self, features: Features) -> None:
        self.features = features

    def _fit(self, images: Sequence[ImageSource], labels_N: np.ndarray) -> None:
        features_ND = torch.from_numpy(self.features(images))
        self._model = fit_discriminant({c: features_ND[labels_N == c] for c in range(len(self.classes_))})

    def predict_proba(self, images: Sequence[ImageSource]) -> np.ndarray:
        """Probabilities [N, C]."""
        return self._model.log_probabilities(torch.from_numpy(self.features(images))).exp().numpy()


class NearestNeighbour(Baseline):
    """The class of the nearest shot; probabilities: softmax of minus the squared distance to each class's nearest.

    Args:
        features: of images; latents, for one.
    """

    def __init__(self, features: Features) -> None:
        self.features = features

    def _fit(self, images: Sequence[ImageSource], labels_N: np.ndarray) -> None:
        self._shots_ND, self._labels_N = self.features(images), labels_N

    def predict_proba(self, images: Sequence[ImageSource]) -> np.ndarray:
        """Probabilities [N, C]."""
        distances = cdist(self.features(images), self._shots_ND, "sqeuclidean")
        nearest = [distances[:, self._labels_N == c].min(1) for c in range(len(self.classes_))]
        return softmax(-np.stack(nearest, 1), axis=1)
