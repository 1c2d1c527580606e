"""What a method gets, one draw of shots and the images to classify, and what it gives."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fewshot_diti.data import ImageSet, Shots, check_disjoint, load_shots_file, warn_of_near_duplicates
from fewshot_diti.data.image_set import LazyImages


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """One draw of shots and the images to classify, under the same class names."""

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
        return self.shots.decoded()

    def shot_labels(self) -> list[str]:
        """The name of each shot's class."""
        return self.shots.label_names

    def test_images(self) -> LazyImages:
        """The images to classify."""
        return self.test.decoded()

    def truth(self) -> list[str]:
        """The name of each test image's class, for figures alone: no method reads it."""
        return self.test.label_names


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What a method gives for the N test images.

    Attributes:
        probabilities: [N, C], classes in the task's order.
        evaluations: samples through a U-Net per image, 0 where there is none.
        training_seconds, scoring_seconds: in all; features that an earlier method left cost nothing.
        chosen: what the shots decided, such as a window or C.
    """

    probabilities: np.ndarray
    evaluations: float = 0
    training_seconds: float
    scoring_seconds: float
    chosen: dict[str, Any] = field(default_factory=dict)


def listed_shots(file: Path, pool: ImageSet, test: ImageSet, num_shots: int) -> Shots:
    """The shots that a file lists.

    Raises:
        FileNotFoundError, ValueError: as `load_shots_file`, a class has another number of shots, or one of the test
            images' classes has none.
    """
    listed = load_shots_file(file, pool)
    if wrong := {name: len(ids) for name, ids in listed.image_ids.items() if len(ids) != num_shots}:
        raise ValueError(f"shots={num_shots}, but {file} has other numbers per class: {wrong}; pass its number.")
    if missing := sorted(set(test.class_names) - set(listed.image_ids)):
        raise ValueError(f"{file} lists no shots of {missing}, and there are test images of them.")
    return listed


def make_task(pool: ImageSet, test: ImageSet, drawn: Shots, num_shots: int, seed: int) -> Task:
    """The task of drawn shots. Warns where a test image is nearly the same picture as a shot.

    Raises:
        ValueError: a shot is not in the pool, or a test image is a shot.
    """
    shots = pool.subset(drawn.rows(pool))
    check_disjoint(shots, test)
    warn_of_near_duplicates(shots, test)
    return Task(shots=shots, test=test, num_shots=num_shots, seed=seed)


def fingerprint(images: ImageSet) -> str:
    """32 hex characters that change with any picture, label or class name."""
    labelled = repr((images.class_names, images.labels.tolist(), images.ids))
    return hashlib.sha256(labelled.encode()).hexdigest()[:32]
