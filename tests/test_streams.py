"""Data sets, tables and streams of images are answered as lists of paths are, and streams are not kept in memory."""

from __future__ import annotations

import io
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from small_classifier import make, shots_of

from fewshot_diti import Backbone, DiTiClassifier


@pytest.fixture(scope="module")
def classifier(backbone: Backbone, pictures: dict[str, list[Path]]) -> DiTiClassifier:
    return make(backbone).fit(*shots_of(pictures, ["a320", "dc-9", "tu-154"]))


@pytest.fixture
def stored(tests: list[Path]) -> datasets.Dataset:
    """A data set with a number and a photo in each row."""
    rows = {"n": range(len(tests)), "photo": list(map(str, tests))}
    return datasets.Dataset.from_dict(rows).cast_column("photo", datasets.Image())


def test_predict_takes_data_sets_tables_and_streams(
    classifier: DiTiClassifier, tests: list[Path], stored: datasets.Dataset
) -> None:
    paths = list(map(str, tests))
    expected = classifier.predict(paths).tolist()
    tables = (
        pd.DataFrame({"path": paths, "n": 0}),
        pd.DataFrame({"n": 0, "image": tests}),
        pd.DataFrame({"file": paths}),
    )
    for images in (stored, *tables, stored.to_iterable_dataset()):
        assert classifier.predict(images).tolist() == expected
    assert torch.equal(classifier.scores(stored), classifier.scores(paths))
    assert classifier.predict(path for path in paths).tolist() == expected


def test_every_answer_is_the_same_of_a_stream(
    classifier: DiTiClassifier, tests: list[Path], stored: datasets.Dataset
) -> None:
    stream, paths = stored.to_iterable_dataset(), list(map(str, tests))
    expected = classifier.predict(paths)
    assert classifier.score(stored, expected) == classifier.score(stream, expected) == 1
    assert (classifier.predict_proba(stream) == classifier.predict_proba(paths)).all()
    assert torch.equal(classifier.scores(stream), classifier.scores(paths))
    assert torch.equal(classifier.errors(stream), classifier.errors(paths))
    assert torch.equal(classifier.evidence(stream)["class tokens"], classifier.evidence(paths)["class tokens"])
    assert list(classifier.as_pipeline()(stream)) == classifier.as_pipeline()(paths)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="3 images but 2 labels"):
        classifier.score(stream, expected[:2])


def test_a_stream_is_learned_from(backbone: Backbone, pictures: dict[str, list[Path]]) -> None:
    shots, labels = shots_of(pictures, ["a320", "dc-9"])
    rows = datasets.Dataset.from_dict({"image": list(map(str, shots))}).cast_column("image", datasets.Image())
    assert make(backbone).fit(rows.to_iterable_dataset(), labels).bank_ == make(backbone).fit(shots, labels).bank_


def test_memory_does_not_grow_with_the_length_of_a_stream(classifier: DiTiClassifier) -> None:
    def peak(count: int) -> int:
        def rows() -> Iterator[dict[str, Any]]:
            for seed in range(count):
                pixels = np.random.default_rng(seed).integers(0, 256, (400, 400, 3), np.uint8)
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "bmp")  # 480 kB
                yield {"image": {"bytes": buffer.getvalue(), "path": None}}

        stream = datasets.IterableDataset.from_generator(rows, features=datasets.Features(image=datasets.Image()))
        tracemalloc.start()
        assert len(classifier.predict(stream)) == count
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(2)  # what is kept from then on
    assert peak(40) - peak(10) < 2e6  # 30 images of 480 kB


def test_data_sets_and_tables_without_one_column_of_images_are_refused(
    classifier: DiTiClassifier, tests: list[Path], stored: datasets.Dataset
) -> None:
    paths, image = list(map(str, tests)), datasets.Image()
    two = datasets.Dataset.from_dict({"photo": paths, "other": paths})
    two = two.cast(datasets.Features(photo=image, other=image))
    empty = stored.filter(lambda row: row["n"] > 9)
    hole = datasets.Dataset.from_list([{"photo": None}], features=datasets.Features(photo=image))
    for images, text in (
        (pd.DataFrame({"a": paths, "b": paths}), r"columns \['a', 'b'\], of which exactly one must be called path or"),
        (pd.DataFrame({"path": paths, "image": paths}), r"columns \['path', 'image'\], of which exactly one"),
        (pd.DataFrame({"path": [*paths[:2], None]}), "holds no path in 1 of 3 rows, in row 2 "),
        (pd.DataFrame({"path": []}), "No images were passed"),
        (stored.remove_columns("photo"), "has 0 columns of images"),
        (stored.remove_columns("photo").to_iterable_dataset(), "has 0 columns of images"),
        (two, r"has 2 columns of images \(photo, other in all\)"),
        (two.to_iterable_dataset(), "has 2 columns of images"),
        (stored.to_iterable_dataset().map(lambda row: row), "does not know what its columns hold, as after a map"),
        (empty, "No images were passed"),
        (stored.to_iterable_dataset().filter(lambda row: row["n"] > 9), "No images were passed"),
        (hole, "the row has no image"),
        (hole.to_iterable_dataset(), "the row has no image"),
        (iter(()), "No images were passed"),
    ):
        with pytest.raises(ValueError, match=text):
            classifier.predict(images)
