"""What a user passes to the classifier: one image or many, and labels that go with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fewshot_diti.bank import plain_labels
from fewshot_diti.data.images import ImageSource, image_id, open_image
from fewshot_diti.training import Label


def group_shots(images: Sequence[ImageSource], labels: Sequence[Label]) -> dict[Label, list[ImageSource]]:
    """Shots by label; a picture given twice under one label counts once."""
    images, values = as_many(images), plain_labels(labels)
    if len(images) != len(values):
        raise ValueError(f"{len(images)} images but {len(values)} labels; pass one label an image.")
    types = {type(x) for x in values}
    if len(types) > 1 or not types <= {str, int, bool}:
        strange = next((i for i, x in enumerate(values) if type(x) not in (str, int, bool)), None)
        which = "" if strange is None else f", label {strange} being {values[strange]!r}"
        raise ValueError(
            f"Labels must be all str, all int or all bool, got {sorted(t.__name__ for t in types)}{which}."
        )
    label_of: dict[str, Label] = {}
    names: dict[str, str] = {}
    groups: dict[Label, list[ImageSource]] = {}
    for image, label in zip(images, values, strict=True):
        i = image_id(image)
        if i not in label_of:
            groups.setdefault(label, []).append(image if isinstance(image, str | Path) else open_image(image))
        name = names.setdefault(i, f"{image}" if isinstance(image, str | Path) else f"image id {i}")
        if label_of.setdefault(i, label) != label:
            both = f"{name} and {image}" if isinstance(image, str | Path) else name
            raise ValueError(f"One picture ({both}) is given as {label_of[i]!r} and as {label!r}; keep one.")
    return groups


def as_list(images: ImageSource | Sequence[ImageSource]) -> tuple[bool, list[ImageSource]]:
    """Whether one image was passed, and the images; arrays of paths and [N, H, W, 3] pixels are many."""
    pixels = isinstance(images, np.ndarray) and images.dtype.kind not in "OU" and images.ndim < 4
    if pixels or isinstance(images, str | Path | bytes | Image.Image):
        return True, [images]  # type: ignore[list-item]
    many = list(images)  # generators too
    if not many:
        raise ValueError("No images were passed.")
    return False, many


def as_many(images: Sequence[ImageSource]) -> list[ImageSource]:
    """Images that go with a list of labels."""
    one, many = as_list(images)
    if one:
        raise ValueError("One image was passed where a list is needed, as for its labels; pass [image].")
    return many
