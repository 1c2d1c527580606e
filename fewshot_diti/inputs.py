"""What a user passes to the classifier: one image or many, and labels that go with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fewshot_diti.bank import plain_labels
from fewshot_diti.config import Label
from fewshot_diti.data.images import ImageSource
from fewshot_diti.encoding import PreparedImage

_NAMED = 20  # broken images in one error


def group_shots(
    images: Sequence[ImageSource], labels: Sequence[Label], prepare: Callable[[ImageSource], PreparedImage]
) -> dict[Label, list[PreparedImage]]:
    """Shots by label, each decoded once; a picture given twice under one label counts once.

    Raises:
        ValueError: lengths differ, labels of mixed type, one picture under two labels, or images that cannot be used,
            all named.
    """
    images, values = as_many(images), plain_labels(labels)
    if len(images) != len(values):
        raise ValueError(f"{len(images)} images but {len(values)} labels; pass one label per image.")
    types = {type(x) for x in values}
    if len(types) > 1 or not types <= {str, int, bool}:
        strange = next((i for i, x in enumerate(values) if type(x) not in (str, int, bool)), None)
        which = "" if strange is None else f", label {strange} being {values[strange]!r}"
        raise ValueError(
            f"Labels must be all str, all int or all bool, got {sorted(t.__name__ for t in types)}{which}."
        )
    first: dict[str, tuple[Label, PreparedImage]] = {}
    groups: dict[Label, list[PreparedImage]] = {}
    broken: list[str] = []
    for i, label in enumerate(values):
        try:
            shot = prepare(images[i])
        except (ValueError, TypeError, OSError) as error:
            broken.append(str(error))
            continue
        known, other = first.setdefault(shot.id, (label, shot))
        if known != label:
            raise ValueError(
                f"One picture ({other.name} and {shot.name}) is given as {known!r} and as {label!r}; keep one."
            )
        if other is shot:
            groups.setdefault(label, []).append(shot)
    if broken:
        more = f"\nand {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
        raise ValueError(f"{len(broken)} shots cannot be used:\n" + "\n".join(broken[:_NAMED]) + more)
    return groups


def as_list(images: ImageSource | Sequence[ImageSource]) -> tuple[bool, Sequence[ImageSource]]:
    """Whether one image was passed, and the images; arrays of paths and [N, H, W, 3] pixels are many."""
    pixels = isinstance(images, np.ndarray) and images.dtype.kind not in "OU" and images.ndim < 4
    if pixels or isinstance(images, str | Path | bytes | Image.Image):
        return True, [images]  # type: ignore[list-item]
    many = images if isinstance(images, Sequence) else list(images)  # generators too
    if not many:
        raise ValueError("No images were passed.")
    return False, many


def as_many(images: Sequence[ImageSource]) -> Sequence[ImageSource]:
    """Images that go with a list of labels."""
    one, many = as_list(images)
    if one:
        raise ValueError("One image was passed where a list is needed, as for its labels; pass [image].")
    return many
