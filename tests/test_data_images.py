"""Opening images, their ids and their geometry."""

import io
import json
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageOps

from fewshot_diti.bank_files import from_fields
from fewshot_diti.data.images import ImageGeometry, image_id, open_image
from fewshot_diti.files import write_atomically

pictures = st.tuples(st.integers(1, 12), st.integers(1, 12)).flatmap(lambda hw: arrays(np.uint8, (*hw, 3)))


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@given(pictures)
@settings(max_examples=30, deadline=None)
def test_array_pil_image_and_encoded_file_of_one_picture_have_one_id(picture):
    image = Image.fromarray(picture)
    ids = {image_id(source) for source in (picture, image, encoded(image), encoded(image, "BMP"))}
    assert len(ids) == 1
    assert len(ids.pop()) == 32


@given(pictures)
@settings(max_examples=30, deadline=None)
def test_changing_one_pixel_or_the_shape_changes_the_id(picture):
    changed = picture.copy()
    changed[-1, -1, -1] ^= 1
    assert image_id(changed) != image_id(picture)
    if picture.shape[0] != picture.shape[1]:
        assert image_id(picture.reshape(picture.shape[1], picture.shape[0], 3)) != image_id(picture)


def test_a_path_as_text_and_as_path_opens_the_same_picture_whatever_its_name(tmp_path):
    picture = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    for name in ("a.png", "b.jpg"):  # the name's ending says nothing either
        (tmp_path / name).write_bytes(encoded(Image.fromarray(picture)))
    assert image_id(tmp_path / "a.png") == image_id(str(tmp_path / "b.jpg")) == image_id(picture)


def test_the_exif_orientation_is_applied():
    picture = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    turned = open_image(encoded(Image.fromarray(picture), exif=exif))
    assert np.array_equal(np.asarray(turned), np.rot90(picture, -1))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "LA", "RGBA", "RGBa"])
def test_every_common_mode_becomes_rgb(mode):
    image = Image.new("RGBA", (5, 4), (255, 255, 255, 255))
    image = (
        image.convert("LA").convert("RGBA").convert("RGBa") if mode == "RGBa" else image.convert("RGB").convert(mode)
    )
    opened = open_image(image)
    assert opened.mode == "RGB"
    assert np.asarray(opened).min() >= 254


def test_transparent_pixels_lie_over_white_in_files_palettes_and_arrays():
    hidden = np.zeros((3, 3, 4), np.uint8)
    palette = Image.new("P", (3, 3), 0)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    for source in (hidden, Image.fromarray(hidden), encoded(Image.fromarray(hidden)), encoded(palette, transparency=0)):
        assert np.asarray(open_image(source)).min() == 255


def test_sixteen_bit_grey_keeps_its_range():
    image = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    assert np.asarray(open_image(encoded(image)))[0, :, 0].tolist() == [0, 128, 255]


def test_a_grey_array_equals_the_rgb_array_of_its_copies():
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert image_id(grey) == image_id(np.stack([grey] * 3, axis=-1))


@pytest.mark.parametrize(
    ("source", "error", "text"),
    [
        (np.zeros((4, 4, 3), np.float32), ValueError, "dtype float32.*astype"),
        (np.zeros((3, 8, 8), np.uint8), ValueError, r"shape \(3, 8, 8\).*channels last"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "not empty"),
        (Image.new("F", (2, 2)), ValueError, "mode F.*0..255"),
        (b"no image", ValueError, "8 bytes is not an image"),
        ("/nowhere/at-all.jpg", FileNotFoundError, "/nowhere/at-all.jpg"),
        (7, TypeError, "int.*path"),
    ],
)
def test_what_cannot_be_opened_is_an_error_that_says_what_is_allowed(source, error, text):
    with pytest.raises(error, match=text):
        open_image(source)


def test_a_file_cut_short_is_an_error_that_names_it(tmp_path):
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)), "JPEG")
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.jpg"):
        open_image(tmp_path / "cut.jpg")


@given(pictures, st.integers(1, 9), st.integers(1, 9), st.sampled_from(["crop", "squash", "pad"]))
@settings(max_examples=50, deadline=None)
def test_pixels_have_the_asked_shape_and_lie_in_minus_one_to_one(picture, height, width, resize):
    pixels = ImageGeometry(size=(height, width), resize=resize).pixels(picture)
    assert pixels.shape == (3, height, width)
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous()
    assert -1 <= pixels.min() <= pixels.max() <= 1


@given(pictures)
@settings(max_examples=20, deadline=None)
def test_an_image_of_the_right_size_keeps_its_values(picture):
    pixels = ImageGeometry(size=picture.shape[:2]).pixels(picture)
    assert np.array_equal(((pixels + 1) * 127.5).round().byte().permute(1, 2, 0).numpy(), picture)


def test_crop_keeps_the_centre_and_the_aspect_squash_everything_and_pad_both():
    picture = np.zeros((8, 24, 3), np.uint8)
    picture[:, 8:16] = 255
    assert ImageGeometry(size=(8, 8)).pixels(picture).min() == 1
    squashed = ImageGeometry(size=(8, 8), resize="squash").pixels(picture)
    assert squashed[:, :, 0].max() == -1
    assert squashed[:, :, 4].min() > 0.5
    padded = ImageGeometry(size=(8, 12), resize="pad").pixels(255 - picture)
    assert padded.shape == (3, 8, 12)
    assert padded[:, [0, 1, 6, 7]].max() == -1 and padded[:, 2:6, 0].min() == 1


def test_a_thin_image_is_cropped_before_it_is_enlarged():
    pixels = ImageGeometry(size=(64, 64)).pixels(np.full((20_000, 1, 3), 255, np.uint8))
    assert pixels.shape == (3, 64, 64) and (pixels == 1).all()
    rows = np.repeat(np.arange(240, dtype=np.uint8)[:, None, None], 3, 2).repeat(8, 1)
    assert ImageGeometry(size=(8, 8)).pixels(rows).mean().item() == pytest.approx(119.5 / 127.5 - 1, abs=0.01)


def test_the_banner_is_cut_from_the_bottom_before_the_resize():
    picture = np.zeros((28, 16, 3), np.uint8)
    picture[-20:] = 255
    assert ImageGeometry(size=(8, 16), banner_rows=20).pixels(picture).max() == -1
    with pytest.raises(ValueError, match="28 pixels high"):
        ImageGeometry(size=(8, 16), banner_rows=28).pixels(picture)


@pytest.mark.parametrize(
    "fields", [{"size": (0, 8)}, {"size": (8,)}, {"size": (8, 8), "resize": "fit"}, {"size": (8, 8), "banner_rows": -1}]
)
def test_a_geometry_refuses_what_it_cannot_do(fields):
    with pytest.raises(ValueError, match="pass"):
        ImageGeometry(**fields)


def test_a_geometry_comes_back_from_its_dictionary():
    geometry = ImageGeometry(size=(64, 128), resize="squash", banner_rows=20)
    assert from_fields(ImageGeometry, json.loads(json.dumps(geometry.to_dict()))) == geometry


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    write_atomically(tmp_path / "deep" / "record.json", b"old")
    with pytest.raises(TypeError):
        write_atomically(tmp_path / "deep" / "record.json", "text is not bytes")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["record.json"]
    assert (tmp_path / "deep" / "record.json").read_bytes() == b"old"


@pytest.mark.parametrize("broken", ["open", "exif"])
def test_whatever_a_decoder_raises_is_an_error_that_names_the_file(tmp_path, monkeypatch, broken):
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (8, 8)).save(path)

    def fail(*_, **__):
        raise struct.error("unpack requires a buffer of 4 bytes")

    monkeypatch.setattr(*((Image, "open") if broken == "open" else (ImageOps, "exif_transpose")), fail)
    with pytest.raises(ValueError, match=r"photo\.jpg.*unpack requires"):
        open_image(path)
