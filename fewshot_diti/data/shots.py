"""Shots: k training images per class, drawn by (k, seed) and identified by image id."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from fewshot_diti.data.image_set import ImageSet, normalize_class_name
from fewshot_diti.data.tables import parse_json, read_utf8
from fewshot_diti.files import write_atomically


@dataclass(frozen=True, kw_only=True)
class Shots:
    """Which images were drawn.

    Attributes:
        k: shots per class, or "all".
        seed: what the draw depends on beside the images themselves.
        image_ids: class name -> image ids; the first j of them are the j-shot draw of the same seed.

    Raises:
        ValueError: k is neither a whole number of at least 1 nor "all", the seed no whole number, a class not of k.
    """

    k: int | Literal["all"]
    seed: int
    image_ids: Mapping[str, tuple[str, ...]]

    def __post_init__(self) -> None:
        if self.k != "all" and (type(self.k) is not int or self.k < 1):
            raise ValueError(f'k={self.k!r}; pass a Python int of at least 1, or "all".')
        if type(self.seed) is not int:
            raise ValueError(f"seed={self.seed!r}; pass a whole number.")
        wrong = {name: len(ids) for name, ids in self.image_ids.items() if self.k != "all" and len(set(ids)) != self.k}
        if wrong:
            raise ValueError(f"k={self.k}, but these classes have other numbers of shots: {wrong}.")

    def save(self, path: str | Path) -> None:
        """Writes the shots as JSON, atomically."""
        record = {"k": self.k, "seed": self.seed, "image_ids": {n: list(ids) for n, ids in self.image_ids.items()}}
        write_atomically(path, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Shots:
        """Reads what `save` wrote; raises FileNotFoundError, or ValueError for a file that is something else."""
        try:
            record = parse_json(read_utf8(Path(path)), path)
            ids = {normalize_class_name(name): tuple(map(str, ids)) for name, ids in record.pop("image_ids").items()}
            return cls(**record, image_ids=ids)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} is no file of shots ({error}): it must hold k, seed and image_ids, as Shots.save writes them."
            ) from error

    def rows(self, data: ImageSet) -> list[int]:
        """Positions of the shots in `data`, class by class, in drawn order; of duplicates within a class the first.

        Raises:
            ValueError: an image is not among `data` under its class.
        """
        places: dict[tuple[str, str], int] = {}
        for row, (label, image) in enumerate(zip(data.labels, data.ids, strict=True)):
            places.setdefault((data.class_names[label], image), row)
        wanted = [(name, image) for name, ids in self.image_ids.items() for image in ids]
        missing = [key for key in wanted if key not in places]
        if missing:
            name, image = missing[0]
            raise ValueError(
                f"{len(missing)} of {len(wanted)} shots are not among the {len(data)} images, first image id "
                f"{image} of class {name!r}; pass the images that the shots came from, or draw anew with sample_shots."
            )
        return [places[key] for key in wanted]


def sample_shots(data: ImageSet, k: int | Literal["all"], seed: int) -> Shots:
    """Draws k images per class: each class's images in the order of SHA-256(seed, image id), the first k.

    So the draw is nested in k and depends on nothing but the seed and the pictures: neither on file names, file order
    or machine, nor on the other classes. Duplicates within a class count once. "all" takes every image and allows
    classes of different size.

    Raises:
        ValueError: a class has fewer than k images (than one, for "all"), or k or the seed is no allowed value.
    """
    Shots(k=k, seed=seed, image_ids={})  # refuses a bad k or seed before any image is decoded
    of_class: dict[str, set[str]] = {name: set() for name in data.class_names}
    for label, image in zip(data.labels, data.ids, strict=True):
        of_class[data.class_names[label]].add(image)
    least = 1 if k == "all" else k
    short = {name: len(ids) for name, ids in of_class.items() if len(ids) < least}
    if short:
        counts = ", ".join(f"{name!r} has {count}" for name, count in list(short.items())[:5])
        more = f" and {len(short) - 5} other classes have too few" if len(short) > 5 else ""
        fewest = min(short.values())
        way_out = f', or ask for {fewest} or "all"' if fewest else ""
        raise ValueError(
            f"{least} different images per class are needed, but {counts}{more}; add images or drop the class{way_out}."
        )

    count = None if k == "all" else k
    drawn = {name: tuple(sorted(ids, key=lambda i: _rank(seed, i))[:count]) for name, ids in of_class.items()}
    return Shots(k=k, seed=seed, image_ids=drawn)


def _rank(seed: int, text: str) -> str:
    return hashlib.sha256(f"{seed}:{text}".encode()).hexdigest()


def sample_shots_of_one_value(data: ImageSet, test: ImageSet, k: int, seed: int, column: str) -> Shots:
    """Draws k images per class that share one value of an attribute, such as a livery: a spurious cue of the class.

    The value is one that test images of other classes wear too, so that the cue misleads, and test images of the class,
    so that some match; where no value is both, the class takes one that misleads, or any. Of several, and of the images
    that wear it, SHA-256(seed, ...) draws.

    Raises:
        ValueError: no such column, or a class has no value that k of its images wear.
    """
    _check_column(column, data, test)
    drawn = {}
    for name in data.class_names:
        worn = [(v, test.class_names[c]) for v, c in zip(test.attributes[column], test.labels, strict=True)]
        own, elsewhere = {v for v, c in worn if c == name}, {v for v, c in worn if c != name}
        of_value: dict[str, set[str]] = {}
        rows = np.flatnonzero(data.labels == data.class_names.index(name))
        for row in rows:
            of_value.setdefault(data.attributes[column][row], set()).add(data.ids[row])
        possible = [v for v, ids in of_value.items() if v and len(ids) >= k]
        if not possible:
            counts = {v: len(ids) for v, ids in of_value.items()}
            raise ValueError(
                f"Class {name!r} has no {column} that {k} of its images wear (images of each: {counts}); lower k."
            )
        value = min(possible, key=lambda v: (v not in elsewhere, v not in own, _rank(seed, f"{name}:{v}")))
        drawn[name] = tuple(sorted(of_value[value], key=lambda image: _rank(seed, image))[:k])
    return Shots(k=k, seed=seed, image_ids=drawn)


def check_disjoint(shots_set: ImageSet, test_set: ImageSet) -> None:
    """Raises ValueError naming both where one picture, by decoded content, is a shot and a test image."""
    shot_names = dict(zip(shots_set.ids, shots_set.names, strict=True))
    both = [(shot_names[i], n) for i, n in zip(test_set.ids, test_set.names, strict=True) if i in shot_names]
    if both:
        raise ValueError(
            f"{len(both)} test images are also shots, first the test image {both[0][1]}, the same picture as the shot "
            f"{both[0][0]}; remove one of the two."
        )


def seen_attribute(shots: ImageSet, test: ImageSet, column: str = "airline") -> np.ndarray:
    """bool [N]: whether a test image's value of the column occurs among the shots of its own class (by class name).

    Raises:
        ValueError: one of the two has no such column.
    """
    _check_column(column, shots, test)
    shot_classes = (shots.class_names[label] for label in shots.labels)
    seen = set(zip(shot_classes, shots.attributes[column], strict=True))
    test_classes = (test.class_names[label] for label in test.labels)
    return np.array([key in seen for key in zip(test_classes, test.attributes[column], strict=True)], dtype=bool)


def shown_attribute(shots: ImageSet, test: ImageSet, column: str) -> np.ndarray:
    """bool [N, C]: whether the shots of a class (of the test images' C, by name) show a test image's value of the
    column; "" is none.

    Raises:
        ValueError: one of the two has no such column.
    """
    _check_column(column, shots, test)
    shown = {
        (shots.class_names[c], value) for c, value in zip(shots.labels, shots.attributes[column], strict=True) if value
    }
    return np.array([[(name, value) in shown for name in test.class_names] for value in test.attributes[column]])


def _check_column(column: str, *parts: ImageSet) -> None:
    for part in parts:
        if column not in part.attributes:
            raise ValueError(f"No attribute {column!r}; these images have {list(part.attributes)}.")
