"""Near-duplicates are found across formats and qualities, and different images are not taken for copies."""

import io
import time
import warnings

import numpy as np
import pytest
from PIL import Image

from fewshot_diti.data import ImageSet, load_bundled, near_duplicates, warn_of_near_duplicates


def resaved(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def image_set(images, labels):
    names = tuple(f"image {row}" for row in range(len(images)))
    return ImageSet(images=images, labels=labels, class_names=("a", "b"), names=names)


@pytest.fixture(scope="module")
def aircraft():
    """24 of the images that ship: two of each variant."""
    train = load_bundled("train")
    return train.first_of_each_class(2)


COPIES = {
    "JPEG 95": lambda x: resaved(x, "JPEG", quality=95),
    "JPEG 50": lambda x: resaved(x, "JPEG", quality=50),
    "JPEG 30": lambda x: resaved(x, "JPEG", quality=30),
    "WebP": lambda x: resaved(x, "WEBP", quality=60),
    "AVIF": lambda x: resaved(x, "AVIF", quality=50),
    "256 colours": lambda x: resaved(x.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
    "half size": lambda x: x.resize((128, 64), Image.Resampling.BICUBIC),
    "double size": lambda x: resaved(x.resize((512, 256), Image.Resampling.BICUBIC), "JPEG", quality=75),
}


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_in_another_format_quality_or_size_is_found(aircraft, kind):
    copies = image_set([COPIES[kind](aircraft.image(row)) for row in range(24)], [0] * 24)
    assert near_duplicates(copies, aircraft) == [(row, row) for row in range(24)]


def test_no_two_of_the_528_different_images_that_ship_are_taken_for_copies():
    train, test = load_bundled("train"), load_bundled("test")
    assert near_duplicates(train) == near_duplicates(test) == near_duplicates(test, train) == []


def test_plain_duplicates_blank_images_and_empty_sets_are_no_pairs(aircraft):
    assert near_duplicates(aircraft, aircraft) == []
    blank = image_set([np.full((4, 4, 3), v, np.uint8) for v in (10, 11)], [0, 1])
    assert near_duplicates(blank) == []
    nothing = aircraft.subset([])
    assert near_duplicates(nothing) == near_duplicates(nothing, aircraft) == near_duplicates(aircraft, nothing) == []


def test_warnings_tell_copies_of_one_class_of_two_and_of_the_test_apart(aircraft):
    pictures = [aircraft.image(row) for row in range(3)]
    copies = [resaved(picture, "JPEG", quality=60) for picture in pictures]
    shots = image_set([pictures[0], copies[0], pictures[1], copies[1]], [0, 0, 0, 1])
    test = image_set([resaved(pictures[0], "WEBP"), pictures[2]], [0, 0])
    with pytest.warns(UserWarning) as said:
        warn_of_near_duplicates(shots, test)
    texts = [str(warning.message) for warning in said]
    assert len(texts) == 3
    assert texts[0].startswith("1 pairs of shots of one class") and "image 1 and image 0" in texts[0]
    assert texts[1].startswith("1 pairs of shots of different classes") and "image 3 and image 2" in texts[1]
    assert texts[2].startswith("1 pairs of a test image and a shot") and "image 0 and the shot image" in texts[2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_near_duplicates(aircraft, image_set(pictures, [0, 0, 0]))


def test_comparing_two_thousand_images_takes_seconds():
    thumbnails = np.random.default_rng(0).integers(0, 256, (2000, 16, 16, 3), np.uint8)
    data = ImageSet(images=[b""] * 2000, labels=[0] * 2000, class_names=("a",), names=("",) * 2000)
    data.__dict__["_decoded_once"] = tuple(map(str, range(2000))), thumbnails
    start = time.perf_counter()
    assert near_duplicates(data) == []
    assert time.perf_counter() - start < 10
