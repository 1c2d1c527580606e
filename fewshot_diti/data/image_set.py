"""Labelled images in the one shape that every source gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from fewshot_diti.data.images import ImageSource, image_id, open_image


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSet:
    """N labelled images, decoded only when asked for.

    Attributes:
        images: N sources, each what `open_image` takes or a function without arguments that returns it.
        labels: int64 [N], positions in `class_names`.
        class_names: a class's place is its label; classes without an image are allowed.
        names: N texts by which errors name the images: a path, or a row of a data set.
        attributes: column name -> N values; "" where an image has none.

    Raises:
        ValueError: the lengths differ, or a label is no position in `class_names`.
    """

    images: Sequence[ImageSource | Callable[[], ImageSource]]
    labels: np.ndarray
    class_names: tuple[str, ...]
    names: tuple[str, ...]
    attributes: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        columns: dict[str, Sized] = {"labels": self.labels, "names": self.names, **self.attributes}
        wrong = {name: len(values) for name, values in columns.items() if len(values) != len(self.images)}
        if wrong:
            raise ValueError(f"{len(self.images)} images, but these columns have other lengths: {wrong}.")
        object.__setattr__(self, "labels", np.asarray(self.labels, dtype=np.int64))
        if len(self) and not 0 <= self.labels.min() <= self.labels.max() < len(self.class_names):
            raise ValueError(f"Labels must lie in 0..{len(self.class_names) - 1}, the places of {self.class_names}.")

    def __len__(self) -> int:
        return len(self.images)

    def image(self, row: int) -> Image.Image:
        """Decodes the image at a position; raises ValueError or FileNotFoundError that names it."""
        source = self.images[row]
        try:
            return open_image(source() if callable(source) else source)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{self.names[row]}: {error}") from error
        except (ValueError, TypeError, OSError) as error:  # OSError: where `datasets` decodes
            raise ValueError(f"{self.names[row]}: {error}") from error

    def decode(self, row: int) -> Image.Image:
        """As `image`."""
        return self.image(row)

    def decoded(self) -> Sequence[Image.Image]:
        """The images as a sequence that decodes each when it is asked for."""
        return LazyImages(self)

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """The N image ids; the first access decodes every image once."""
        return tuple(image_id(self.image(row)) for row in range(len(self)))

    def subset(self, rows: Iterable[int]) -> ImageSet:
        """The images at the given positions, in that order, under the same class names."""
        rows = [int(row) for row in rows]
        chosen = ImageSet(
            images=[self.images[row] for row in rows],
            labels=self.labels[rows],
            class_names=self.class_names,
            names=tuple(self.names[row] for row in rows),
            attributes={key: tuple(values[row] for row in rows) for key, values in self.attributes.items()},
        )
        if "ids" in self.__dict__:  # known ids go along: decoding is the dear part
            chosen.__dict__["ids"] = tuple(self.ids[row] for row in rows)
        return chosen

    def first_of_each_class(self, count: int) -> ImageSet:
        """Up to `count` images of each class, the first by image id."""
        taken = [0] * len(self.class_names)
        rows = []
        for row in sorted(range(len(self)), key=lambda row: self.ids[row]):
            taken[self.labels[row]] += 1
            if taken[self.labels[row]] <= count:
                rows.append(row)
        return self.subset(sorted(rows))


class LazyImages(Sequence[Image.Image]):
    """The images of a set, decoded when asked for; a slice is lazy too."""

    def __init__(self, images: ImageSet) -> None:
        self._images = images

    @property
    def ids(self) -> tuple[str, ...]:
        """The image ids, known without decoding once the set knows them."""
        return self._images.ids

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return LazyImages(self._images.subset(range(len(self))[row]))
        return self._images.decode(range(len(self))[row])


def index_labels(values: Sequence[str], known: Iterable[str] = ()) -> tuple[np.ndarray, tuple[str, ...]]:
    """(int64 labels, class names in order) of label texts and further known classes; whole numbers sort by value."""
    names = sorted({*values, *known}, key=lambda n: (not n.isdecimal(), int(n) if n.isdecimal() else 0, n))
    places = {name: place for place, name in enumerate(names)}
    return np.array([places[value] for value in values], dtype=np.int64), tuple(names)


class SplitError(ValueError):
    """A split is asked of a source without any, the other way round, or one that it does not have."""


def check_has_split(name: str, split: str | None, splits: Sequence[str]) -> None:
    """Raises SplitError where the source has no such split, or has splits and none is asked for."""
    if splits and split not in splits:
        raise SplitError(f"{name} has the splits {', '.join(splits)}, not {split!r}; pass one of them.")
    if split and not splits:
        raise SplitError(f"{name} has no splits, so there is no {split!r}; leave the split out.")
