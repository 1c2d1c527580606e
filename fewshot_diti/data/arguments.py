"""What a user passes to the classifier: one image or many, and labels that go with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from PIL import Image

from fewshot_diti.config import Label
from fewshot_diti.data.hub import StoredImages, is_stream, streamed_images
from fewshot_diti.data.images import DecodedImage, ImageSource, raise_bad_images
from fewshot_diti.progress import Progress


class _Shot(Protocol):
    @property
    def id(self) -> str: ...
    @property
    def name(self) -> str: ...


T = TypeVar("T")
Prepared = TypeVar("Prepared", bound=_Shot)


def as_list(images: ImageSource | Iterable[Any]) -> tuple[bool, Sequence[Any] | Iterator[Any]]:
    """Whether one image was passed, and the images.

    One image is a path, encoded bytes, a PIL image, a DecodedImage, or an array of pixels [H, W] or [H, W, channels].
    Many are a list, tuple, pandas Series, array of paths, array of pixels [N, H, W, 3], a `datasets.Dataset` with one
    column of images, a DataFrame with a column path or image (or one column), or what else has a length and rows, such
    as a data set of torch. A generator and a
    `datasets.IterableDataset` are read while they are worked through, and not kept.

    Raises:
        ValueError: there are no images, they are in a set or dictionary, or in a table without such a column.
        TypeError: it is none of these.
    """
    if isinstance(images, np.ndarray) and images.ndim == 0:
        images = images.item()
    pixels = isinstance(images, np.ndarray) and images.dtype.kind not in "OUT" and 1 < images.ndim < 4
    if pixels or isinstance(images, str | Path | bytes | Image.Image | DecodedImage):
        return True, [images]  # type: ignore[list-item]
    if StoredImages.can_hold(images):
        images = StoredImages(images)
    elif is_stream(images):
        images = streamed_images(images)
    elif hasattr(images, "columns"):
        images = _paths_of(images)
    if isinstance(images, Set | Mapping):
        row = "; of a row of a data set pass row['image']" if isinstance(images, Mapping) else ""
        raise ValueError(f"The images are in a {type(images).__name__}; pass a list, which has an order{row}.")
    if not isinstance(images, Iterable) and hasattr(images, "__len__") and hasattr(images, "__getitem__"):
        images = [images[row] for row in range(len(images))]  # as torch's data sets, and KeyDataset of transformers
    if not isinstance(images, Iterable):
        raise TypeError(f"Images cannot be a {type(images).__name__}; pass an image, or a list of images.")
    if isinstance(images, Iterator):
        first = list(islice(images, 1))
        if first:
            return False, chain(first, images)
    many = images if isinstance(images, Sequence) else list(images)  # a sequence may decode when asked
    if not len(many):
        raise ValueError("No images were passed.")
    return False, many


def _paths_of(table: Any) -> list[Any]:
    """The paths in a DataFrame, which is known by what it has: pandas is not needed without one."""
    names = list(table.columns)
    named = [name for name in names if name in ("path", "image")] or names
    if len(named) != 1:
        raise ValueError(
            f"The table has the columns {names}, of which exactly one must be called path or image; pass one column, "
            "table[NAME]."
        )
    cells = table[named[0]].tolist()
    if bad := [row for row, cell in enumerate(cells) if not isinstance(cell, str | Path)]:
        raise ValueError(
            f"Column {named[0]!r} of the table holds no path in {len(bad)} of {len(cells)} rows, in row {bad[0]} "
            f"{cells[bad[0]]!r}; fill or drop them."
        )
    return cells  # type: ignore[no-any-return]


def as_images(images: Iterable[Any]) -> Sequence[Any] | Iterator[Any]:
    """Many images, from what `as_list` takes; for functions that give one result per image.

    Raises:
        ValueError, TypeError: as `as_list`; ValueError for one image that is not in a list.
    """
    one, many = as_list(images)
    if one:
        (image,) = many
        what = repr(image) if isinstance(image, str) else type(image).__name__
        raise ValueError(f"One image was passed where a list is needed ({what}); pass [image].")
    return many


def one_by_one(images: Iterable[T]) -> Iterator[T]:
    """The images in their order; those of a sequence by position: where one raises an IndexError, iteration would end
    as if there were no more."""
    return (images[row] for row in range(len(images))) if isinstance(images, Sequence) else iter(images)


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of so many consecutive items, the last one shorter; `itertools.batched` of Python 3.12."""
    iterator = iter(items)
    while some := list(islice(iterator, size)):
        yield some


def plain_labels(labels: Iterable[Any]) -> list[Label]:
    """Labels as Python has them, whatever numpy made of them; ValueError for one label that is not in a list."""
    if isinstance(labels, str | bytes):
        raise ValueError(f"labels={labels!r} is one text; pass a list of labels, [{labels!r}].")
    return [x.item() if isinstance(x, np.generic) else x for x in labels]


def true_labels(
    images: Iterable[Any], labels: Iterable[Any], classes: Sequence[Label]
) -> tuple[Sequence[Any] | Iterator[Any], list[Label]]:
    """Images, and the labels to compare predictions with.

    Raises:
        ValueError: not one label per image (of images that come one by one only `check_one_each` can tell, afterwards),
            or labels of another type than the classes.
    """
    many, values = as_images(images), plain_labels(labels)
    if isinstance(many, Sequence):
        check_one_each(len(many), len(values))
    known = {type(x).__name__ for x in classes}
    if others := {type(x).__name__ for x in values} - known:
        raise ValueError(f"Labels are {', '.join(known)} in the bank, got {', '.join(sorted(others))}.")
    return many, values


def group_shots(
    images: Iterable[ImageSource], labels: Sequence[Label], prepare: Callable[[ImageSource], Prepared]
) -> dict[Label, list[Prepared]]:
    """Shots by label, each decoded once by `prepare`; a picture given twice under one label counts once.

    Raises:
        ValueError: not one label per image, labels of mixed type, or one picture under two labels.
        FileNotFoundError, ValueError: images cannot be decoded; the text names each with the reason (the first 20).
    """
    many, values = as_images(images), plain_labels(labels)
    if not isinstance(many, Sequence):
        many = list(many)  # shots are few
    check_one_each(len(many), len(values))
    types = {type(x) for x in values}
    if len(types) > 1 or not types <= {str, int, bool}:
        strange = next((i for i, x in enumerate(values) if type(x) not in (str, int, bool)), None)
        which = "" if strange is None else f", label {strange} being {values[strange]!r}"
        raise ValueError(
            f"Labels must be all str, all int or all bool, got {sorted(t.__name__ for t in types)}{which}."
        )
    first: dict[str, tuple[Label, Prepared]] = {}
    groups: dict[Label, list[Prepared]] = {}
    bad: dict[int, Exception] = {}
    with Progress(len(many), "shots", "image", minor=True) as bar:
        for row, label in enumerate(values):
            bar.update()
            try:
                shot = prepare(many[row])
            except (OSError, ValueError) as error:
                bad[row] = error
                continue
            if shot.id not in first:
                first[shot.id] = label, shot
                groups.setdefault(label, []).append(shot)
            earlier_label, earlier = first[shot.id]
            if earlier_label != label:
                both = f"{earlier.name} and {shot.name}"
                raise ValueError(f"One picture ({both}) is given as {earlier_label!r} and as {label!r}; keep one.")
    raise_bad_images(bad, len(many))
    return groups


def check_one_each(images: int, labels: int) -> None:
    """Raises a ValueError where there are not as many images as labels."""
    if images != labels:
        raise ValueError(f"{images} images but {labels} labels; pass one label per image.")
