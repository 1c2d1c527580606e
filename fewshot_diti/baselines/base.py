"""The interface that all baselines share with the classifier."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from fewshot_diti.data.images import ImageSource, image_id, open_image
from fewshot_diti.training import Label


class Baseline(ABC):
    """Learns classes from shots; `classes_` are the labels in the order of `predict_proba`'s columns."""

    classes_: np.ndarray

    def fit(self, images: Sequence[ImageSource], labels: Sequence[Label]) -> Baseline:
        """Learns from the shots, one label an image."""
        self.classes_, indices = np.unique(np.asarray(labels), return_inverse=True)
        self._fit(list(images), indices)
        return self

    @abstractmethod
    def _fit(self, images: list[ImageSource], labels_N: np.ndarray) -> None:
        """Learns from images with labels as positions in `classes_`."""

    @abstractmethod
    def predict_proba(self, images: Sequence[ImageSource]) -> np.ndarray:
        """Probabilities [N, C]."""

    def predict(self, images: Sequence[ImageSource]) -> np.ndarray:
        """Labels [N]."""
        return self.classes_[self.predict_proba(images).argmax(1)]


class KeptFeatures:
    """Features of images, computed once a picture however often a baseline asks.

    Args:
        compute: from PIL images to an array [N, D].
    """

    def __init__(self, compute: Callable[[list[Image.Image]], np.ndarray]) -> None:
        self._compute = compute
        self._kept: dict[str, np.ndarray] = {}

    def __call__(self, images: Sequence[ImageSource]) -> np.ndarray:
        """Features [N, D]."""
        opened = [open_image(image) for image in images]
        ids = [image_id(image) for image in opened]
        new = {i: image for i, image in zip(ids, opened, strict=True) if i not in self._kept}
        if new:
            self._kept |= dict(zip(new, self._compute(list(new.values())), strict=True))
        return np.stack([self._kept[i] for i in ids])
