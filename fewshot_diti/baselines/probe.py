"""Simple heads on frozen features: logistic regression, the nearest class mean, the nearest shot."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from scipy.spatial.distance import cdist
from scipy.special import softmax
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_score
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import Normalizer, StandardScaler
from threadpoolctl import threadpool_limits

from fewshot_diti.baselines.base import Baseline
from fewshot_diti.baselines.views import Recolour, seeded
from fewshot_diti.data.images import ImageSource, open_image

COPIES = 7  # of each shot
MOST_ROWS = 2000  # of shots and copies together
STRENGTHS = tuple(np.logspace(-3, 2, 6))  # the candidates for C of logistic regression


class Features(Protocol):
    """From images to [N, D]; `keep` says whether these images will be asked for again."""

    def __call__(self, images: Sequence[ImageSource], *, keep: bool = True) -> np.ndarray: ...


def logistic_head(labels_N: np.ndarray, copies: int = 0) -> Pipeline:
    """Logistic regression on standardised features, to be fitted on shots of these labels, then on copies of them.

    Its strength C is chosen by cross-validation on the shots, 1 where a class has one shot.

    Args:
        labels_N: of the shots.
        copies: of each shot. The rows to fit on are all shots, then the first copies of all, and so on.
    """
    fewest = int(np.bincount(labels_N).min())
    model: Any = LogisticRegression(max_iter=1000)
    if fewest > 1:
        folds = StratifiedKFold(min(4, fewest)).split(labels_N, labels_N)
        starts = len(labels_N) * np.arange(1 + copies)[:, None]
        model = GridSearchCV(model, {"C": STRENGTHS}, cv=[((starts + kept).ravel(), held) for kept, held in folds])
    # as many components as rows lose nothing, and make wide features cheap
    return make_pipeline(StandardScaler(), PCA(), model)


def fit_logistic(views_nVD: np.ndarray, labels_n: np.ndarray) -> Pipeline:
    """`logistic_head` fitted on shots and copies: features [n, 1 + copies, D] of n shots with these labels.

    No more copies than make `MOST_ROWS` rows.
    """
    copies = max(min(views_nVD.shape[1] - 1, MOST_ROWS // len(labels_n) - 1), 0)
    rows = views_nVD[:, : 1 + copies].swapaxes(0, 1).reshape(-1, views_nVD.shape[2])
    # two threads took 17 times as long over products this small; too large a C need not converge to lose
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return logistic_head(labels_n, copies).fit(rows, np.tile(labels_n, 1 + copies))


class LogisticProbe(Baseline):
    """`logistic_head` on features of images.

    Args:
        candidates: features by name, of which the shots choose by cross-validation; the first where a class has one
            shot.
        recolour: colours of the copies that it is fitted on beside the shots; None: on the shots alone.
        copies: of each shot, fewer where there would be more than `MOST_ROWS` rows to fit.
        seed: of the copies.

    Attributes:
        chosen_: the name of the features, after `fit`.
        strength_: C, after `fit`.
    """

    def __init__(
        self,
        candidates: Mapping[str, Features],
        *,
        recolour: Recolour | None = None,
        copies: int = COPIES,
        seed: int = 0,
    ) -> None:
        self.candidates, self.recolour, self.copies, self.seed = candidates, recolour, copies, seed

    def _fit(self, images: Sequence[ImageSource], labels_N: np.ndarray) -> None:
        self.chosen_ = next(iter(self.candidates))
        if len(self.candidates) > 1 and np.bincount(labels_N).min() > 1:
            merits = {
                name: fit_logistic(features(images)[:, None], labels_N)[-1].best_score_
                for name, features in self.candidates.items()
            }
            self.chosen_ = max(merits, key=lambda name: merits[name])
        views_NVD = self.candidates[self.chosen_](images)[:, None]
        if self.recolour is not None:
            views_NVD = np.concatenate([views_NVD, self._recoloured(images, self.recolour)], axis=1)
        self._model = fit_logistic(views_NVD, labels_N)
        self.strength_ = float(getattr(self._model[-1], "best_estimator_", self._model[-1]).C)

    def _recoloured(self, images: Sequence[ImageSource], recolour: Recolour) -> np.ndarray:
        """Features [N, copies, D]."""
        features = self.candidates[self.chosen_]
        copies = max(1, min(self.copies, MOST_ROWS // len(images) - 1))
        with seeded(self.seed):
            rows = [features([recolour(image) for _ in range(copies)], keep=False) for image in map(open_image, images)]
        return np.stack(rows)

    def predict_proba(self, images: Sequence[ImageSource]) -> np.ndarray:
        """Probabilities [N, C]."""
        return self._model.predict_proba(self.candidates[self.chosen_](images))


class NearestMean(Baseline):
    """The class whose mean feature is nearest; probabilities: softmax of minus the squared distance.

    Features are centred on the shots' mean and scaled to unit length (Wang et al., SimpleShot, 2019).

    Args:
        candidates: as of `LogisticProbe`.

    Attributes:
        chosen_: the name of the features, after `fit`.
    """

    def __init__(self, candidates: Mapping[str, Features]) -> None:
        self.candidates = candidates

    def _fit(self, images: Sequence[ImageSource], labels_N: np.ndarray) -> None:
        model = make_pipeline(StandardScaler(with_std=False), Normalizer(), NearestCentroid())
        self.chosen_ = next(iter(self.candidates))
        fewest = int(np.bincount(labels_N).min())
        # one shot per class has no spread inside its class, which scikit-learn computes and nothing here reads
        with np.errstate(invalid="ignore"):
            if len(self.candidates) > 1 and fewest > 1:
                folds = min(4, fewest)
                merits = {n: cross_val_score(model, f(images), labels_N, cv=folds) for n, f in self.candidates.items()}
                self.chosen_ = max(merits, key=lambda name: merits[name].mean())
            self._model = model.fit(self.candidates[self.chosen_](images), labels_N)

    def predict_proba(self, images: Sequence[ImageSource]) -> np.ndarray:
        """Probabilities [N, C]."""
        features_ND = self._model[:-1].transform(self.candidates[self.chosen_](images))
        # scikit-learn's own probabilities divide by the spread inside classes, which one shot does not have
        return softmax(-cdist(features_ND, self._model[-1].centroids_, "sqeuclidean"), axis=1)


class NearestNeighbour(Baseline):
    """The class of the nearest shot, with probability 1.

    Args:
        features: of images; latents, for one.
    """

    def __init__(self, features: Callable[[Sequence[ImageSource]], np.ndarray]) -> None:
        self.features = features

    def _fit(self, images: Sequence[ImageSource], labels_N: np.ndarray) -> None:
        self._model = KNeighborsClassifier(n_neighbors=1).fit(self.features(images), labels_N)

    def predict_proba(self, images: Sequence[ImageSource]) -> np.ndarray:
        """Probabilities [N, C], 0 or 1."""
        return self._model.predict_proba(self.features(images))
