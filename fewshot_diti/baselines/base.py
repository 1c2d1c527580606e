"""The interface that all baselines share with the classifier."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from PIL import Image

from fewshot_diti.config import Label
from fewshot_diti.data.image_set import LazyImages
from fewshot_diti.data.images import ImageSource, image_id, open_image
from fewshot_diti.progress import Progress


class Baseline(ABC):
    """Learns classes from shots; `classes_` are the labels in the order of `predict_proba`'s columns."""

    classes_: np.ndarray

    def fit(self, images: Sequence[ImageSource], labels: Sequence[Label]) -> Baseline:
        """Learns from the shots, one label per image."""
        self.classes_, indices = np.unique(np.asarray(labels), return_inverse=True)
        self._fit(images, indices)
        return self

    @abstractmethod
    def _fit(self, images: Sequence[ImageSource], labels_N: np.ndarray) -> None:
        """Learns from images with labels as positions in `classes_`."""

    @abstractmethod
    def predict_proba(self, images: Sequence[ImageSource]) -> np.ndarray:
        """Probabilities [N, C]."""

    def predict(self, images: Sequence[ImageSource]) -> np.ndarray:
        """Labels [N]."""
        return self.classes_[self.predict_proba(images).argmax(1)]


def opened(images: Sequence[ImageSource], size: int, rows: np.ndarray | None = None) -> Iterator[list[Image.Image]]:
    """The images, or those at some positions, as PIL images, `size` at a time: a test set need not fit into memory."""
    rows = np.arange(len(images)) if rows is None else rows
    with Progress(len(rows), "reading", "image", minor=True) as bar:
        for start in range(0, len(rows), size):
            yield (batch := [open_image(images[row]) for row in rows[start : start + size].tolist()])
            bar.update(len(batch))


class KeptFeatures:
    """Features of images, computed once per picture however often a baseline needs them.

    Args:
        compute: from PIL images to an array [N, D].
        batch_size: images that are decoded at a time.
    """

    def __init__(self, compute: Callable[[list[Image.Image]], np.ndarray], *, batch_size: int = 64) -> None:
        self._compute, self._batch_size = compute, batch_size
        self._kept: dict[str, np.ndarray] = {}

    def __call__(self, images: Sequence[ImageSource], *, keep: bool = True) -> np.ndarray:
        """Features [N, D]; `keep` says whether these images will be asked for again."""
        if not keep:
            return np.concatenate([self._compute(part) for part in opened(images, self._batch_size)])
        ids = images.ids if isinstance(images, LazyImages) else [image_id(image) for image in images]
        new = {i: row for row, i in enumerate(ids) if i not in self._kept}
        batches = opened(images, self._batch_size, np.array([*new.values()], dtype=int))
        features = (feature for batch in batches for feature in self._compute(batch))
        self._kept |= dict(zip(new, features, strict=True))
        return np.stack([self._kept[i] for i in ids])
