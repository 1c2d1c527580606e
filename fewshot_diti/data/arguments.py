"""What a user passes to the classifier: one image or many, and labels that go with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from fewshot_diti.data.images import DecodedImage, ImageSource, decode, raise_bad_images

Label: TypeAlias = str | int | bool


def as_list(images: ImageSource | Iterable[ImageSource]) -> tuple[bool, list[ImageSource]]:
    """Whether one image was passed, and the images.

    One image is a path, encoded bytes, a PIL image, a DecodedImage, or an array of pixels [H, W] or [H, W, channels].
    Many are a list, tuple, generator, pandas Series, array of paths, or array of pixels [N, H, W, 3].

    Raises:
        ValueError: there are no images, or they are in a set or dictionary.
        TypeError: it is none of these.
    """
    if isinstance(images, np.ndarray) and images.ndim == 0:
        images = images.item()
    pixels = isinstance(images, np.ndarray) and images.dtype.kind not in "OUT" and 1 < images.ndim < 4
    if pixels or isinstance(images, str | Path | bytes | Image.Image | DecodedImage):
        return True, [images]  # type: ignore[list-item]
    if isinstance(images, Set | Mapping):
        raise ValueError(f"The images are in a {type(images).__name__}; pass a list, which has an order.")
    if not isinstance(images, Iterable):
        raise TypeError(f"Images cannot be a {type(images).__name__}; pass an image, or a list of images.")
    many = list(images)
    if not many:
        raise ValueError("No images were passed.")
    return False, many


def as_images(images: Iterable[ImageSource]) -> list[ImageSource]:
    """A list of images, from what `as_list` takes; for functions that give one result per image.

    Raises:
        ValueError, TypeError: as `as_list`; ValueError for one image that is not in a list.
    """
    one, many = as_list(images)
    if one:
        what = repr(many[0]) if isinstance(many[0], str) else type(many[0]).__name__
        raise ValueError(f"One image was passed where a list is needed ({what}); pass [image].")
    return many


def plain_labels(labels: Iterable[Any]) -> list[Label]:
    """Labels as Python has them, whatever numpy made of them; ValueError for one label that is not in a list."""
    if isinstance(labels, str | bytes):
        raise ValueError(f"labels={labels!r} is one text; pass a list of labels, [{labels!r}].")
    return [x.item() if isinstance(x, np.generic) else x for x in labels]


def group_shots(images: Sequence[ImageSource], labels: Sequence[Label]) -> dict[Label, list[ImageSource]]:
    """Shots by label; a picture given twice under one label counts once.

    Every image is decoded once. Paths stay paths, so that many large images need no memory; anything else becomes a
    DecodedImage.

    Raises:
        ValueError: not one label per image, labels of mixed type, or one picture under two labels.
        FileNotFoundError, ValueError: images cannot be decoded; the text names each with the reason (the first 20).
    """
    images, values = as_images(images), plain_labels(labels)
    if len(images) != len(values):
        raise ValueError(f"{len(images)} images but {len(values)} labels; pass one label per image.")
    types = {type(x) for x in values}
    if len(types) > 1 or not types <= {str, int, bool}:
        strange = next((i for i, x in enumerate(values) if type(x) not in (str, int, bool)), None)
        which = "" if strange is None else f", label {strange} being {values[strange]!r}"
        raise ValueError(
            f"Labels must be all str, all int or all bool, got {sorted(t.__name__ for t in types)}{which}."
        )
    first: dict[str, tuple[Label, str]] = {}  # label and name of each picture
    groups: dict[Label, list[ImageSource]] = {}
    bad: dict[int, Exception] = {}
    for row, (image, label) in enumerate(zip(images, values, strict=True)):
        try:
            decoded = decode(image)
        except (OSError, ValueError) as error:
            bad[row] = error
            continue
        name = decoded.name if isinstance(image, str | Path) else f"image {row}, {decoded.name}"
        if decoded.id not in first:
            first[decoded.id] = (label, name)
            groups.setdefault(label, []).append(image if isinstance(image, str | Path) else decoded)
        earlier_label, earlier = first[decoded.id]
        if earlier_label != label:
            raise ValueError(
                f"One picture ({earlier} and {name}) is given as {earlier_label!r} and as {label!r}; keep one."
            )
    raise_bad_images(bad, len(images))
    return groups
