"""What a method gets, one draw of shots and the images to judge, and what it says."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fewshot_diti.baselines.base import LazyImages
from fewshot_diti.data import ImageSet
from fewshot_diti.learning import Groups


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """One draw of shots and the images to judge, under the same class names."""

    shots: ImageSet
    test: ImageSet
    num_shots: int
    seed: int

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of all columns."""
        return self.test.class_names

    def shot_images(self) -> LazyImages:
        """The shots."""
        return LazyImages(self.shots)

    def shot_labels(self) -> list[str]:
        """The name of each shot's class."""
        return [self.shots.class_names[c] for c in self.shots.labels]

    def test_images(self) -> LazyImages:
        """The images to judge."""
        return LazyImages(self.test)

    def groups(self) -> Groups:
        """The shots of each class."""
        of_class = (np.flatnonzero(self.shots.labels == self.shots.class_names.index(n)) for n in self.class_names)
        return {n: LazyImages(self.shots.subset(rows)) for n, rows in zip(self.class_names, of_class, strict=True)}


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What a method says of the N test images.

    Attributes:
        probabilities: [N, C], classes in the task's order.
        evaluations: samples through a U-Net for each image, 0 where there is none.
        training_seconds, scoring_seconds: in all; features that an earlier method left cost nothing.
        chosen: what the shots decided, such as a window or C.
    """

    probabilities: np.ndarray
    evaluations: int = 0
    training_seconds: float
    scoring_seconds: float
    chosen: dict[str, Any] = field(default_factory=dict)


def fingerprint(images: ImageSet) -> str:
    """32 hex characters that change with any picture, label or class name."""
    labelled = repr((images.class_names, images.labels.tolist(), images.ids))
    return hashlib.sha256(labelled.encode()).hexdigest()[:32]
