"""Tables, pictures and intervals, made from results that are known."""

import io
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from rich.table import Table

from fewshot_diti.reports import (
    MethodResult,
    accuracy_table,
    bootstrap_interval,
    prediction_table,
    predictions_picture,
    wilson_interval,
)


def rendered(table: Table) -> str:
    console = Console(width=120, file=io.StringIO(), markup=False)
    console.print(table)
    return console.file.getvalue()


@given(total=st.integers(1, 500), data=st.data())
def test_wilson_interval_follows_its_formula(total: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, total))
    p, z = correct / total, 1.959963984540054
    middle, half = p + z**2 / (2 * total), z * np.sqrt(p * (1 - p) / total + z**2 / (4 * total**2))
    expected = [(middle - half) / (1 + z**2 / total), (middle + half) / (1 + z**2 / total)]
    np.testing.assert_allclose(wilson_interval(correct, total), expected, atol=1e-12)


def test_bootstrap_interval_of_single_images_agrees_with_theory() -> None:
    values = np.arange(400) % 4 == 0
    low, high = bootstrap_interval(values, [str(i) for i in range(400)])
    half = 1.96 * np.sqrt(0.25 * 0.75 / 400)
    np.testing.assert_allclose([low, high], [0.25 - half, 0.25 + half], atol=0.01)


def test_bootstrap_interval_is_wider_when_images_of_a_group_agree() -> None:
    values = np.repeat(np.arange(20) % 2, 10)
    grouped = bootstrap_interval(values, [str(i // 10) for i in range(200)])
    single = bootstrap_interval(values, [str(i) for i in range(200)])
    assert grouped[1] - grouped[0] > 2 * (single[1] - single[0])


@given(
    values=st.lists(st.booleans(), min_size=1, max_size=40), groups=st.integers(1, 5), seed=st.integers(0, 2**32 - 1)
)
def test_bootstrap_interval_repeats_and_stays_inside_the_values(values: list[bool], groups: int, seed: int) -> None:
    names = [str(i % groups) for i in range(len(values))]
    low, high = bootstrap_interval(np.array(values), names, seed=seed, resamples=50)
    assert (low, high) == bootstrap_interval(np.array(values), names, seed=seed, resamples=50)
    assert min(values) <= low <= high <= max(values)


def test_bootstrap_interval_refuses_no_values_and_missing_groups() -> None:
    with pytest.raises(ValueError, match="0 values"):
        bootstrap_interval(np.array([]), [])
    with pytest.raises(ValueError, match="2 values and 1 groups"):
        bootstrap_interval(np.array([1, 0]), ["a"])


def test_accuracy_table_shows_every_method_on_every_subset_with_its_number_of_images() -> None:
    correct = np.array([True, True, True, False])
    seen = np.array([True, True, False, False])
    subsets = {"all": np.ones(4, bool), "seen": seen, "unseen": ~seen, "none": np.zeros(4, bool)}
    results = [
        MethodResult(name="ours", correct=correct, seconds=12.4),
        MethodResult(name="other", correct=~correct, seconds=3),
    ]
    text = rendered(accuracy_table(results, subsets, ["x", "y", "x", "y"], "liveries"))
    rows = [re.split(r" {2,}", line.strip()) for line in text.splitlines()]
    assert ["ours", "75.0 [50, 100]", "100.0 [100, 100]", "50.0 [0, 100]", "no images", "12"] in rows
    assert ["other", "25.0 [0, 50]", "0.0 [0, 0]", "50.0 [0, 100]", "no images", "3"] in rows
    assert "4 images" in text and "2 images" in text


def test_prediction_table_lists_the_top_classes_and_keeps_brackets_in_names() -> None:
    record = {"path": "a[1].png", "probabilities": {"x[bold]": 0.75, "y": 0.25}, "margin": 0.00012}
    text = rendered(prediction_table([record]))
    assert all(part in text for part in ("a[1].png", "x[bold] 75.0 %", "y 25.0 %", "1.20e-04"))
    assert "third" not in text
    assert "margin" in rendered(prediction_table([]))


def test_prediction_table_names_the_folder_that_all_images_share_once() -> None:
    paths = ["/data/[new]/a/1.png", "/data/[new]/b/2.png"]
    records = [{"path": p, "probabilities": {"x": 1.0}, "margin": 0.1} for p in paths]
    text = rendered(prediction_table(records))
    assert text.count("/data/[new]") == 1
    assert "a/1.png" in text and "b/2.png" in text
    mixed = rendered(prediction_table([records[0], {**records[1], "path": "b/2.png"}]))
    assert "/data/[new]/a/1.png" in mixed


def test_predictions_picture_is_a_grid_with_right_in_blue_and_wrong_in_orange() -> None:
    images = [Image.new("RGB", (64, 32), "white")] * 3
    both = predictions_picture(images, ["a", "b", "c"], ["a", "b", "a"], [1.0, 0.5, 0.25], columns=2)
    right = predictions_picture(images, ["a", "b", "c"], ["a", "b", "c"], [1.0, 0.5, 0.25], columns=2)
    one_row = predictions_picture(images, ["a", "b", "c"], ["a", "b", "c"], [1.0, 0.5, 0.25], columns=3)
    assert Image.open(io.BytesIO(one_row)).width > Image.open(io.BytesIO(both)).width

    def count(png: bytes, colour: tuple[int, int, int]) -> int:
        return int((np.asarray(Image.open(io.BytesIO(png)).convert("RGB")) == colour).all(2).sum())

    blue, orange = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)
    assert count(both, blue) > 0 and count(both, orange) > 0
    assert count(right, blue) > count(both, blue) and count(right, orange) == 0
