"""Labelled images in the one shape that every source gives."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fewshot_diti.data.images import THUMBNAIL_SIDE, DecodedImage, ImageSource, decode, raise_bad_images, thumbnail
from fewshot_diti.progress import Progress

_NAMED = 20  # classes that a warning names


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSet:
    """N labelled images, decoded only when asked for.

    Class names are kept in Unicode's composed form (NFC), so that two spellings of one name are one class.

    Attributes:
        images: N sources, each what `decode` takes or a function without arguments that returns it.
        labels: int64 [N], positions in `class_names`.
        class_names: a class's place is its label; classes without an image are allowed.
        names: N texts by which errors name the images: a path, or a row of a data set.
        attributes: column name -> N values; "" where an image has none.

    Raises:
        ValueError: the lengths differ, a label is no position in `class_names`, or a class name holds characters that
            control a terminal.
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
        labels = np.asarray(self.labels, dtype=np.int64)
        if len(self) and not 0 <= labels.min() <= labels.max() < len(self.class_names):
            raise ValueError(f"Labels must lie in 0..{len(self.class_names) - 1}, the places of {self.class_names}.")
        normalized = [normalize_class_name(name) for name in self.class_names]
        places = {name: place for place, name in enumerate(dict.fromkeys(normalized))}
        if len(places) < len(normalized) and len(self):
            labels = np.array([places[name] for name in normalized], dtype=np.int64)[labels]
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "class_names", tuple(places))

    def __len__(self) -> int:
        return len(self.images)

    def decode(self, row: int) -> DecodedImage:
        """Decodes the image at a position.

        Raises:
            FileNotFoundError, ValueError: as the function `decode`, and naming the image. ValueError too where `ids`
                are known and the picture has changed since.
        """
        source, name = self.images[row], self.names[row]
        try:
            decoded = decode(source() if callable(source) else source)
        except (ValueError, TypeError, OSError) as error:  # OSError: where `datasets` reads the row
            text = f"{error}" if name in str(error) else f"{name}: {error}"
            raise (FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError)(text) from error
        if "_decoded_once" in self.__dict__ and decoded.id != self.ids[row]:
            raise ValueError(f"{name} has changed since it was listed; start again, and leave the images as they are.")
        return replace(decoded, name=name)

    def image(self, row: int) -> Image.Image:
        """The RGB picture at a position; errors as `decode`."""
        return self.decode(row).rgb

    def decoded(self) -> LazyImages:
        """The images as a sequence that decodes each when it is asked for."""
        return LazyImages(self)

    @cached_property
    def _decoded_once(self) -> tuple[tuple[str, ...], np.ndarray]:
        """Ids and thumbnails, from one pass over the images that keeps no picture."""
        ids, thumbnails = [], []
        bad: dict[int, Exception] = {}
        with Progress(len(self), "reading", "image", minor=True) as bar:
            for row in range(len(self)):
                try:
                    decoded = self.decode(row)
                except (OSError, ValueError) as error:
                    bad[row] = error
                else:
                    ids.append(decoded.id)
                    thumbnails.append(thumbnail(decoded.rgb))
                bar.update()
        raise_bad_images(bad, len(self))
        return tuple(ids), np.stack(thumbnails) if thumbnails else np.empty(
            (0, THUMBNAIL_SIDE, THUMBNAIL_SIDE, 3), np.uint8
        )

    @property
    def ids(self) -> tuple[str, ...]:
        """The N image ids; the first access decodes every image once.

        Raises:
            FileNotFoundError, ValueError: images cannot be decoded; the text names each with the reason (the first 20).
        """
        return self._decoded_once[0]

    @property
    def label_names(self) -> list[str]:
        """The name of each image's class."""
        return [self.class_names[c] for c in self.labels]

    @property
    def thumbnails(self) -> np.ndarray:
        """uint8 [N, 16, 16, 3], from the pass that gives `ids`; errors as `ids`."""
        return self._decoded_once[1]

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
        if "_decoded_once" in self.__dict__:  # known ids go along: decoding is the expensive part
            chosen.__dict__["_decoded_once"] = tuple(self.ids[row] for row in rows), self.thumbnails[rows]
        return chosen

    def without_empty_classes(self) -> ImageSet:
        """The same images without the classes that have none; a warning names those.

        An empty folder, a bank inside the folder of images, or a data set filtered to some of its classes leaves such
        classes; nothing can be trained for them.
        """
        used = np.unique(self.labels)
        if len(used) == len(self.class_names):
            return self
        empty = [name for place, name in enumerate(self.class_names) if place not in set(used.tolist())]
        more = f" and {len(empty) - _NAMED} more" if len(empty) > _NAMED else ""
        warnings.warn(
            f"These classes have no images and are left out: {', '.join(empty[:_NAMED])}{more}.", stacklevel=2
        )
        chosen = replace(
            self,
            labels=np.searchsorted(used, self.labels),
            class_names=tuple(self.class_names[place] for place in used),
        )
        if "_decoded_once" in self.__dict__:
            chosen.__dict__["_decoded_once"] = self._decoded_once
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


class LazyImages(Sequence[DecodedImage]):
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


def image_files_set(
    paths: Sequence[Path],
    classes: Sequence[str],
    class_names: Iterable[str] = (),
    attributes: dict[str, tuple[str, ...]] | None = None,
) -> ImageSet:
    """The images in files, each with the name of its class; `class_names` are further known classes."""
    labels, known = index_labels(classes, class_names)
    return ImageSet(
        images=list(paths),
        labels=labels,
        class_names=known,
        names=tuple(map(str, paths)),
        attributes=attributes or {},
    )


def unlabelled(images: Sequence[ImageSource | Callable[[], ImageSource]], names: tuple[str, ...]) -> ImageSet:
    """Images whose classes are not known: all under one class without a name."""
    return ImageSet(images=images, labels=np.zeros(len(names), dtype=np.int64), class_names=("",), names=names)


def index_labels(values: Sequence[str], known: Iterable[str] = ()) -> tuple[np.ndarray, tuple[str, ...]]:
    """(int64 labels, class names in order) of label texts and further known classes; whole numbers sort by value."""
    normalized = {value: normalize_class_name(value) for value in {*values, *known}}
    names = sorted(set(normalized.values()), key=lambda n: (not n.isdecimal(), int(n) if n.isdecimal() else 0, n))
    places = {name: place for place, name in enumerate(names)}
    return np.array([places[normalized[value]] for value in values], dtype=np.int64), tuple(names)


def normalize_class_name(name: str) -> str:
    """A class name in Unicode's composed form (NFC): macOS writes the parts of an accented letter one by one.

    Raises:
        ValueError: the name holds control characters, marks that reverse the text, or bytes that are no UTF-8.
    """
    if bad := sorted({c for c in name if unicodedata.category(c) in ("Cc", "Cs") or c in _REVERSING}):
        raise ValueError(
            f"The class name {name!r} holds {', '.join(map(ascii, bad))}: control characters, marks that reverse the "
            "text and bytes that are no UTF-8 are not allowed in it; rename the class."
        )
    return unicodedata.normalize("NFC", name)


_REVERSING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def check_one_of(what: str, value: str, allowed: Sequence[str]) -> None:
    """Raises a ValueError that names what is allowed."""
    if value not in allowed:
        raise ValueError(f"{what} {value!r}; pass one of {', '.join(allowed)}.")


class SplitError(ValueError):
    """A split is asked of a source without any, the other way round, or one that it does not have."""


def check_has_split(name: str, split: str | None, splits: Sequence[str]) -> None:
    """Raises SplitError where the source has no such split, or has splits and none is asked for."""
    if splits and split not in splits:
        raise SplitError(f"{name} has the splits {', '.join(splits)}, not {split!r}; pass one of them.")
    if split and not splits:
        raise SplitError(f"{name} has no splits, so there is no {split!r}; leave the split out.")
