"""Attributes of aircraft variants, and colours."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from fewshot_diti.data import load_bundled
from fewshot_diti.files import shipped
from fewshot_diti.representation.attributes import NUANCED, attributes_of, lab, log_lengths, sky_colour

HELD_OUT = Path(__file__).parents[1] / "recipes" / "pocket" / "held_out_variants.json"


def test_every_variant_of_the_data_has_attributes() -> None:
    bundled = load_bundled("test")
    found = attributes_of(bundled.label_names, bundled.attributes["manufacturer"])
    assert tuple(found) == NUANCED
    for name, values in found.items():
        assert {0.0, 1.0} <= set(values[~np.isnan(values)].tolist()), name
    held_out = json.loads(HELD_OUT.read_text())
    attributes_of(held_out, [""] * len(held_out))
    assert len(list(csv.DictReader(shipped("aircraft-attributes.csv").open()))) == 38


def test_known_aircraft_have_what_anyone_can_see_and_what_is_not_sure_is_unknown() -> None:
    variants, makers = ["A380", "ATR-72", "A320", "Boeing 717", "A319"], ["Airbus", "ATR", "Airbus", "Boeing", "Airbus"]
    found = attributes_of(variants, makers)
    assert found["four engines"].tolist() == [1, 0, 0, 0, 0]
    assert found["propellers"].tolist() == [0, 1, 0, 0, 0] and found["high wing"].tolist() == [0, 1, 0, 0, 0]
    assert found["T-tail"].tolist() == [0, 1, 0, 1, 0] and found["rear engines"].tolist() == [0, 0, 0, 1, 0]
    np.testing.assert_array_equal(found["winglets"], [np.nan, 0, np.nan, 0, np.nan])
    np.testing.assert_array_equal(found["wide body"], [1, 0, 0, np.nan, 0])
    np.testing.assert_array_equal(found["Boeing"], [0, np.nan, 0, 1, 0])
    lengths = log_lengths(["A380", "CRJ-700"])
    assert np.exp(lengths[0]) == pytest.approx(72.7) and np.isnan(lengths[1])
    with pytest.raises(ValueError, match="No attributes of Concorde; known are 737-300"):
        attributes_of(["Concorde"], [""])


@pytest.mark.parametrize(
    ("rgb", "expected"),
    [
        ((255, 255, 255), (100, 0, 0)),
        ((255, 0, 0), (53.24, 80.09, 67.20)),
        ((0, 0, 255), (32.30, 79.19, -107.86)),
        ((119, 119, 119), (50.03, 0, 0)),
        ((3, 3, 3), (0.82, 0, 0)),
    ],
)
def test_colours_have_the_values_of_tables(rgb: tuple[int, int, int], expected: tuple[float, float, float]) -> None:
    assert lab(np.array([rgb]))[0] == pytest.approx(expected, abs=0.02)


def test_the_sky_is_the_top_of_the_image() -> None:
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:8] = (0, 0, 255)
    assert sky_colour(pixels) == pytest.approx((32.30, 79.19, -107.86), abs=0.02)
