"""Near-duplicates: one picture as JPEG and PNG, saved again at another quality, or resized."""

from __future__ import annotations

import warnings

import numpy as np

from fewshot_diti.data.image_set import ImageSet
from fewshot_diti.data.images import THUMBNAIL_SIDE

# Root mean square difference of two thumbnails. Of copies (JPEG from quality 30, WebP, AVIF, 256 colours, resized) it
# is at most 2.6 of 255; of different images of flightgear-aircraft, renders of one aircraft in one livery among them,
# at least 11.1.
MAX_DIFFERENCE = 4.0
# The same in parts of the thumbnail's own contrast (its standard deviation): images of low contrast are all alike.
MAX_RELATIVE_DIFFERENCE = 0.1
_PAIRS_AT_ONCE = 2**24
_NAMED = 5


def near_duplicates(images_a: ImageSet, images_b: ImageSet | None = None) -> list[tuple[int, int]]:
    """Pairs of images that are one picture in other pixels, by their thumbnails of 16 x 16 pixels.

    Of each image of `images_a` the nearest of `images_b` is looked at. Pictures of one image id are left out: they are
    plain duplicates. The first access to an image set's thumbnails decodes its images, in the same pass as `ids`; to
    compare 2,000 images with each other then takes less than a second.

    Args:
        images_a: A images.
        images_b: B images; where it is None, the images of `images_a` before each one.

    Returns:
        (row in `images_a`, row in `images_b`) of each pair; within one set (later row, earlier row).
    """
    other = images_a if images_b is None else images_b
    a_AD, b_BD = _flat(images_a.thumbnails), _flat(other.thumbnails)
    ids_a, ids_b = np.array(images_a.ids), np.array(other.ids)
    pairs: list[tuple[int, int]] = []
    if not len(a_AD) or not len(b_BD):
        return []
    a_squares_A, b_squares_B = (a_AD**2).mean(1), (b_BD**2).mean(1)
    rows_at_once = max(1, _PAIRS_AT_ONCE // len(b_BD))
    for start in range(0, len(a_AD), rows_at_once):
        part = slice(start, start + rows_at_once)
        squares = a_squares_A[part, None] + b_squares_B - 2 / b_BD.shape[1] * a_AD[part] @ b_BD.T
        differences = np.sqrt(squares.clip(min=0))
        differences[ids_a[part][:, None] == ids_b] = np.inf
        if images_b is None:
            differences[np.arange(start, start + len(differences))[:, None] <= np.arange(len(b_BD))] = np.inf
        limits = np.minimum(MAX_DIFFERENCE, MAX_RELATIVE_DIFFERENCE * a_AD[part].std(1))
        nearest = differences.argmin(1)
        rows = np.flatnonzero(differences[np.arange(len(nearest)), nearest] < limits)
        pairs += [(start + int(row), int(nearest[row])) for row in rows]
    return pairs


def warn_of_near_duplicates(shots: ImageSet, test: ImageSet | None = None) -> None:
    """Warns where two shots, or a shot and a test image, are one picture in other pixels; the text names them."""
    within: list[str] = []
    between: list[str] = []
    for row, earlier in near_duplicates(shots):
        pair = f"{shots.names[row]} and {shots.names[earlier]}"
        (within if shots.labels[row] == shots.labels[earlier] else between).append(pair)
    _warn(within, "shots of one class", "Cross-validation may train on one and test on the other; keep one of each.")
    _warn(between, "shots of different classes", "Only one class can be right; remove the wrong one.")
    if test is not None:
        pairs = [f"{test.names[t]} and the shot {shots.names[s]}" for t, s in near_duplicates(test, shots)]
        _warn(pairs, "a test image and a shot", "The accuracy will be too high; remove the test image or the shot.")


def _warn(pairs: list[str], what: str, consequence: str) -> None:
    if pairs:
        more = f", and {len(pairs) - _NAMED} more" if len(pairs) > _NAMED else ""
        warnings.warn(
            f"{len(pairs)} pairs of {what} look like copies of one picture: {'; '.join(pairs[:_NAMED])}{more}. "
            f"{consequence}",
            stacklevel=3,
        )


def _flat(thumbnails_NHWC: np.ndarray) -> np.ndarray:
    return (
        thumbnails_NHWC.reshape(len(thumbnails_NHWC), 3 * THUMBNAIL_SIDE**2).astype(np.float32) - 128
    )  # small values for float32
