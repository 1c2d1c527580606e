"""Files as people have them: decoded once, or refused with the reason before they cost time or memory."""

import io
import os
import socket
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from fewshot_diti.data import DecodedImage, ImageGeometry, ImageSet, decode, image_id, open_image
from fewshot_diti.data import image_files as files


def photo(seed=0, size=(40, 60)):
    steps = np.random.default_rng(seed).normal(0, 1, (*size, 3)).cumsum(0).cumsum(1)
    return Image.fromarray(((steps - steps.min()) / np.ptp(steps) * 255).astype(np.uint8))


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def image_set(images, class_names=("a",), labels=None):
    names = tuple(map(str, images))
    return ImageSet(images=images, labels=labels or [0] * len(images), class_names=class_names, names=names)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width, height):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def test_a_decoded_image_is_taken_everywhere_and_read_once(tmp_path, monkeypatch):
    photo().save(tmp_path / "a.png")
    decoded = decode(tmp_path / "a.png")
    assert decoded.id == image_id(tmp_path / "a.png") and decoded.name == str(tmp_path / "a.png")
    expected = ImageGeometry(size=(8, 8)).pixels(tmp_path / "a.png")
    monkeypatch.setattr("fewshot_diti.data.images.read_file", lambda path: pytest.fail("read again"))
    assert decode(decoded) is decoded
    assert open_image(decoded) is decoded.rgb and image_id(decoded) == decoded.id
    assert (ImageGeometry(size=(8, 8)).pixels(decoded) == expected).all()
    with pytest.raises(ValueError, match=r"Image .*a\.png is 40 pixels high"):
        ImageGeometry(size=(8, 8), banner_rows=40).pixels(decoded)


def test_an_image_set_decodes_each_row_once_for_ids_and_thumbnails(tmp_path, monkeypatch):
    for number in range(3):
        photo(number).save(tmp_path / f"{number}.png")
    data = image_set([tmp_path / f"{number}.png" for number in range(3)])
    read = []
    original = files.read_file
    monkeypatch.setattr("fewshot_diti.data.images.read_file", lambda path: read.append(path) or original(path))
    assert data.ids == data.subset([0, 1, 2]).ids and data.thumbnails.shape == (3, 16, 16, 3)
    assert len(read) == 3
    decoded = data.decode(1)
    assert isinstance(decoded, DecodedImage) and (decoded.id, decoded.name) == (data.ids[1], data.names[1])


def test_an_image_that_changed_since_its_id_was_taken_is_refused(tmp_path):
    photo(0).save(tmp_path / "0.png")
    data = image_set([tmp_path / "0.png"])
    assert len(data.ids) == 1
    photo(1).save(tmp_path / "0.png")
    for read in (data.decode, data.image, data.subset([0]).decode):
        with pytest.raises(ValueError, match=r"0\.png has changed since it was listed"):
            read(0)


def test_the_ids_of_an_image_set_name_all_bad_images_at_once(tmp_path):
    photo().save(tmp_path / "good.png")
    paths = [tmp_path / "good.png"]
    for number in range(22):
        paths.append(tmp_path / f"bad{number}.png")
        paths[-1].write_text("<html>404</html>")
    (tmp_path / "dead.png").symlink_to("nowhere.png")
    with pytest.raises(ValueError) as caught:
        _ = image_set([tmp_path / "dead.png", *paths]).ids
    lines = str(caught.value).splitlines()
    assert lines[0] == "23 of 24 images cannot be used:" and lines[-1] == "  and 3 more" and len(lines) == 22
    assert "dead.png is a link to nowhere.png, which is not there" in lines[1]
    with pytest.raises(FileNotFoundError, match=r"1 of 2 images"):
        _ = image_set([tmp_path / "dead.png", tmp_path / "good.png"]).ids


def test_a_png_with_megabytes_of_text_or_a_huge_colour_profile_opens():
    info = PngImagePlugin.PngInfo()
    info.add_itxt("workflow", "x" * 2**21, zip=True)
    assert image_id(encoded(photo(), pnginfo=info)) == image_id(photo())
    whole = encoded(photo())
    for part in (
        chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**24))),
        chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(2**24))),
        chunk(b"tEXt", b"k\0" + b"v" * 1000) * 70_000,
    ):
        assert image_id(whole[:33] + part + whole[33:]) == image_id(photo())


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF"])
def test_a_file_whose_tail_is_missing_or_zero_is_refused(kind, share):
    whole = encoded(photo(size=(90, 120)), kind)
    cut = int(share * len(whole))
    for content in (whole[:cut], whole[:cut] + bytes(len(whole) - cut)):
        with pytest.raises(ValueError, match="bytes"):
            open_image(content)


def test_a_png_without_its_end_is_refused():
    with pytest.raises(ValueError, match="cut short"):
        open_image(encoded(photo())[:-12])


@pytest.mark.parametrize("colours", ["L", "RGB"])
@pytest.mark.parametrize(("largest", "bits"), [(255, 8), (1023, 10), (4095, 12)])
def test_values_of_ten_or_twelve_bits_in_sixteen_are_refused_and_not_black(tmp_path, colours, largest, bits):
    ramp = np.linspace(0, largest, 32 * 64).reshape(32, 64).astype(">u2")
    if colours == "L":
        content = encoded(Image.fromarray(ramp.astype(np.uint16)))
    else:  # Pillow writes no colours of 16 bits
        rows = b"".join(b"\0" + np.repeat(row, 3).tobytes() for row in ramp)
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 32, 16, 2, 0, 0, 0))
        body = header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
        content = b"\x89PNG\r\n\x1a\n" + body
    (tmp_path / "camera.png").write_bytes(content)
    with pytest.raises(ValueError, match=rf"camera\.png reach .* {bits} bits: multiply them by {2 ** (16 - bits)}"):
        open_image(tmp_path / "camera.png")


def test_values_of_fourteen_bits_give_a_warning_and_black_and_full_range_none(recwarn):
    dark = np.full((4, 4), 2**14 - 1, np.uint16)
    assert np.asarray(open_image(encoded(Image.fromarray(dark)))).max() == 63
    assert "14 bits" in str(recwarn.pop(UserWarning).message)
    for value, expected in ((0, 0), (65535, 255)):
        picture = Image.fromarray(np.full((4, 4), value, np.uint16))
        assert np.asarray(open_image(encoded(picture))).max() == expected
    assert not recwarn.list


def test_a_pgm_says_its_range_and_is_scaled_by_it():
    content = b"P5 2 1 4095\n" + struct.pack(">HH", 0, 4095)
    assert np.asarray(open_image(content))[0, :, 0].tolist() == [0, 255]


def test_an_eps_named_jpg_never_starts_ghostscript(tmp_path, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\nexit 1\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "x.jpg").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 16\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with pytest.raises(ValueError, match=r"x\.jpg is not an image of a known format \(JPEG, PNG, .*AVIF"):
        open_image(tmp_path / "x.jpg")
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF", "JPEG2000"])
def test_every_allowed_format_is_known_by_content(tmp_path, kind):
    (tmp_path / "picture").write_bytes(encoded(photo(), kind))
    assert open_image(tmp_path / "picture").size == (60, 40)


@pytest.mark.parametrize("size", [(2**31 - 1, 2**31 - 1), (20_000, 9_000), (1, 2**27), (13_000, 13_000)])
def test_a_header_that_claims_a_huge_picture_is_refused_before_pixels_are_made(size):
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"pixels"):
        open_image(png_header(*size))
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    jpeg = bytearray(encoded(photo(), "JPEG"))
    place = jpeg.index(b"\xff\xc0")
    jpeg[place + 5 : place + 9] = struct.pack(">HH", 13_000, 13_000)
    with pytest.raises(ValueError, match=r"13000 x 13000 pixels, too many for a file of \d+ bytes"):
        open_image(bytes(jpeg))


def test_pillows_limit_of_pixels_holds_where_a_program_has_lifted_it(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ValueError, match="20000 x 9000 pixels; allowed are 178956970"):
        open_image(png_header(20_000, 9_000))


def test_what_is_no_regular_file_is_an_error_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("pipe.png")
    (tmp_path / "self.png").symlink_to("self.png")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "s.png"))
    (tmp_path / "huge.png").touch()
    os.truncate(tmp_path / "huge.png", 2**31)
    (tmp_path / "empty.png").touch()
    for path, text in {
        tmp_path / "pipe.png": "is a named pipe",
        tmp_path / "link.png": "is a named pipe",
        tmp_path / "self.png": "cannot be read",
        tmp_path / "s.png": "is a socket",
        "/dev/null": "is a device",
        "/dev/zero": "is a device",
        tmp_path / "huge.png": "has 2147483648 bytes",
        tmp_path / "empty.png": "is empty",
        f"{tmp_path}/{'x' * 300}.png": "cannot be read",
        f"{tmp_path}/a\0.png": "cannot be read",
    }.items():
        with pytest.raises(ValueError, match=text):
            open_image(path)
    server.close()
    for path, text in {str(tmp_path): "is a folder", "https://example.org/x.png": "download the image"}.items():
        with pytest.raises(FileNotFoundError, match=text):
            open_image(path)


def test_a_file_without_read_permission_is_an_error_that_names_it(tmp_path, monkeypatch):
    photo().save(tmp_path / "mine.png")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(ValueError, match=r"mine\.png cannot be read .*Permission denied"):
        open_image(tmp_path / "mine.png")


def test_classes_without_images_are_left_out_with_a_warning_that_names_them():
    pictures = [photo(n) for n in range(3)]
    data = image_set(pictures, ("a", "empty", "b", "bank"), [2, 0, 2])
    ids = data.ids
    with pytest.warns(UserWarning, match="no images and are left out: empty, bank"):
        kept = data.without_empty_classes()
    assert kept.class_names == ("a", "b") and kept.labels.tolist() == [1, 0, 1] and kept.ids == ids
    assert kept.without_empty_classes() is kept


def test_two_unicode_forms_of_a_class_name_are_one_class():
    data = image_set([photo(n) for n in range(3)], ("u\u0308ber", "x", "\u00fcber"), [2, 1, 0])
    assert data.class_names == ("\u00fcber", "x") and data.labels.tolist() == [0, 1, 0]


@pytest.mark.parametrize("name", ["\x1b]0;owned\x07", "a\nb", "gear\0", "\u202egnp", "\udcff"])
def test_a_class_name_that_would_control_a_terminal_is_refused(name):
    with pytest.raises(ValueError, match="rename the class"):
        image_set([photo()], (name,))
    joined = "هواپیما\u200cها"  # the joiners of Persian and of emoji are letters
    assert image_set([photo()], (joined,)).class_names == (joined,)
