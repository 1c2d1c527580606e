"""What can be seen of an aircraft: attributes of 38 variants, and the colour of an image's sky.

Attributes of variants were collected by hand; lengths are right to 1 %. What is not sure counts as unknown.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence

import numpy as np

from fewshot_diti.files import shipped

_UNSURE = "?"  # at the end of a value
_OF_VARIANT = {  # name: column, values that have the attribute, values that have it not
    "four engines": ("engines", ("4",), ("2", "3")),
    "rear engines": ("engines_at", ("rear",), ("wing", "both")),
    "propellers": ("propulsion", ("propeller",), ("jet",)),
    "high wing": ("wing", ("high",), ("low",)),
    "T-tail": ("t_tail", ("yes",), ("no",)),
    "winglets": ("tip", ("winglet",), ("none",)),  # fences are hardly seen
    "wide body": ("size", ("twin-aisle",), ("single-aisle", "regional", "commuter or business")),
}
NUANCED = (*_OF_VARIANT, "Boeing")
MAKERS = ("Boeing", "Airbus")  # the attribute "Boeing" is known of these two alone
# linear RGB to XYZ, and the white of D65 (IEC 61966-2-1)
_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_WHITE = _XYZ.sum(1)


def attributes_of(variants: Sequence[str], manufacturers: Sequence[str]) -> dict[str, np.ndarray]:
    """Whether each image has each of `NUANCED`: 1.0, 0.0 or NaN where it is not known, [N].

    Args:
        variants: of the images.
        manufacturers: of the images; others than Boeing and Airbus are unknown.

    Raises:
        ValueError: a variant is not in the table.
    """
    table = _table()
    if unknown := sorted({*variants} - {*table}):
        raise ValueError(f"No attributes of {', '.join(unknown)}; known are {', '.join(table)}.")
    found = {}
    for name, (column, yes, no) in _OF_VARIANT.items():
        values = [table[variant][column] for variant in variants]
        found[name] = np.array([1.0 if v in yes else 0.0 if v in no else np.nan for v in values])
    found["Boeing"] = np.array([float(m == MAKERS[0]) if m in MAKERS else np.nan for m in manufacturers])
    return found


def log_lengths(variants: Sequence[str]) -> np.ndarray:
    """Natural logarithm of each variant's length in metres [N], NaN where it is not sure; errors as `attributes_of`."""
    table = _table()
    lengths = [table[variant]["length_m"] for variant in variants]
    return np.array([np.nan if x.endswith(_UNSURE) else np.log(float(x)) for x in lengths])


def sky_colour(pixels_HW3: np.ndarray) -> np.ndarray:
    """Mean L*, a*, b* of the uppermost eighth of a uint8 image [height, width, 3]."""
    top = pixels_HW3[: max(1, len(pixels_HW3) // 8)]
    colour: np.ndarray = lab(top.reshape(-1, 3)).mean(0)
    return colour


def lab(pixels_N3: np.ndarray) -> np.ndarray:
    """CIE 1976 L*, a*, b* of sRGB values 0 to 255, under D65, [N, 3]."""
    values = pixels_N3 / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    shares = linear @ _XYZ.T / _WHITE
    f = np.where(shares > (6 / 29) ** 3, np.cbrt(shares), shares / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


def _table() -> dict[str, dict[str, str]]:
    with shipped("aircraft-attributes.csv").open(encoding="utf-8", newline="") as file:
        return {row["variant"]: row for row in csv.DictReader(file)}
