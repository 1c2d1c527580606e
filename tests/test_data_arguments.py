"""One image or many, in whatever a user holds them, and their labels."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from fewshot_diti.data import DecodedImage, as_images, decode
from fewshot_diti.data.arguments import as_list, group_shots

PICTURE = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
ONE = ["a.png", Path("a.png"), PICTURE, PICTURE[..., 0], Image.fromarray(PICTURE), b"bytes", decode(PICTURE)]


@pytest.mark.parametrize("image", [*ONE, np.array("a.png")], ids=lambda x: type(x).__name__)
def test_one_image_is_distinguished_from_many_and_refused_where_many_are_needed(image):
    one, images = as_list(image)
    assert one and len(images) == 1
    with pytest.raises(ValueError, match=r"One image was passed where a list is needed \(.*pass \[image\]"):
        as_images(image)
    assert as_images([image]) == [image]


def test_a_bare_path_is_not_taken_apart_into_letters():
    with pytest.raises(ValueError, match=r"needed \('photos/a\.png'\)"):
        as_images("photos/a.png")


@pytest.mark.parametrize(
    "images",
    [
        ("a.png", "b.png"),
        (name for name in ("a.png", "b.png")),
        np.array(["a.png", "b.png"]),
        np.array(["a.png", "b.png"], dtype=object),
        pd.Series(["a.png", "b.png"], index=[7, 8]),
    ],
    ids=["tuple", "generator", "array", "array of objects", "Series"],
)
def test_many_images_come_in_any_ordered_collection(images):
    assert list(as_images(images)) == ["a.png", "b.png"]


def test_an_array_of_four_dimensions_is_many_images():
    one, images = as_list(np.stack([PICTURE, PICTURE]))
    assert not one and len(images) == 2 and (images[0] == PICTURE).all()


@pytest.mark.parametrize(
    ("images", "error", "text"),
    [
        ([], ValueError, "No images were passed"),
        ({"a.png"}, ValueError, "in a set; pass a list"),
        ({"a.png": 1}, ValueError, "in a dict; pass a list"),
        (5, TypeError, "cannot be a int"),
        (None, TypeError, "cannot be a NoneType"),
    ],
)
def test_what_is_no_collection_of_images_is_an_error(images, error, text):
    with pytest.raises(error, match=text):
        as_images(images)


def test_a_sequence_that_decodes_when_asked_is_not_decoded():
    class Lazy(Sequence):
        def __len__(self):
            return 2

        def __getitem__(self, row):
            raise AssertionError("decoded")

    assert len(as_images(Lazy())) == 2


def test_shots_are_grouped_by_label_and_decoded_once(tmp_path, monkeypatch):
    for number in range(2):
        Image.fromarray(PICTURE + number).save(tmp_path / f"{number}.png")
    read = []
    original = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.name) or original(path))
    images = [tmp_path / "0.png", Image.fromarray(PICTURE), tmp_path / "1.png", PICTURE + 2]
    groups = group_shots(images, np.array(["x", "x", "y", "y"]), decode)
    assert [len(groups[x]) for x in "xy"] == [1, 2]
    assert groups["x"][0].id == decode(PICTURE).id and isinstance(groups["y"][1], DecodedImage)
    assert sorted(read) == ["0.png", "1.png"]


def test_all_bad_shots_are_named_at_once(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"(?s)2 of 3 images cannot be used:.*text\.png.*gone\.png"):
        group_shots([PICTURE, tmp_path / "text.png", tmp_path / "gone.png"], ["x", "x", "y"], decode)


def test_one_picture_under_two_labels_is_named_by_both_names(tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "0.png")
    with pytest.raises(ValueError, match=r"One picture \(.*0\.png and .*\) is given as 'x' and as 'y'"):
        group_shots([tmp_path / "0.png", Image.fromarray(PICTURE)], ["x", "y"], decode)
