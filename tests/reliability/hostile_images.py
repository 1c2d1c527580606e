"""Image files of every bad kind, and of kinds that are odd and good."""

from __future__ import annotations

import io
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

ENCODED = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
_SUFFIXES = {"JPEG": "jpg", "JPEG2000": "jp2", "TIFF": "tif"}


def photo(seed: int, size: tuple[int, int] = (40, 24)) -> Image.Image:
    """Smooth colours, (width, height)."""
    noise = np.random.default_rng(seed).normal(0, 1, (size[1], size[0], 3)).cumsum(0).cumsum(1)
    return Image.fromarray(((noise - noise.min()) / max(np.ptp(noise), 1e-9) * 255).astype(np.uint8))


def encoded(format: str, seed: int = 0, **options: object) -> bytes:
    buffer = io.BytesIO()
    photo(seed).save(buffer, format, **options)
    return buffer.getvalue()


def suffix(format: str) -> str:
    return f".{_SUFFIXES.get(format, format.lower())}"


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_that_says(width: int, height: int, bits: int = 8) -> bytes:
    """A PNG of few bytes with any size in its header."""
    header = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    parts = _chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(bytes(100))), _chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def jpeg_that_says(width: int, height: int) -> bytes:
    content = bytearray(encoded("JPEG"))
    at = content.index(b"\xff\xc0") + 5
    content[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(content)


def png_with(kind: bytes, data: bytes) -> bytes:
    """A whole PNG with one part more, after its header."""
    content = encoded("PNG")
    return content[:33] + _chunk(kind, data) + content[33:]


def black_png(side: int) -> bytes:
    """A whole PNG of one colour: few bytes, side x side pixels."""
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


def float_tiff(value: float) -> bytes:
    buffer, pixels = io.BytesIO(), np.full((24, 40), 0.5, np.float32)
    pixels[3, 5] = value
    Image.fromarray(pixels).save(buffer, "TIFF")
    return buffer.getvalue()


def bad_contents(draw: random.Random) -> dict[str, tuple[str, bytes]]:
    """(suffix, bytes) of files that are no whole images, by kind."""
    found = {
        "empty": (".jpg", b""),
        "zero bytes": (".png", bytes(1000)),
        "text": (".jpg", b"I am a text\n" * 20),
        "random bytes": (".webp", draw.randbytes(3000)),
        "SVG": (".jpg", b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'),
        "HTML": (".jpg", b"<html><body>404</body></html>"),
        "PDF": (".png", b"%PDF-1.4\n1 0 obj\n<<>>\nendobj\ntrailer<<>>\n"),
        "EPS": (".jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 16\n%%EndComments\nshowpage\n%%EOF\n"),
        "HEIC": (".jpg", b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(400)),
        "git-lfs": (".jpg", b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"),
        "32-bit whole numbers": (".tif", _tiff(np.int32)),
        "float NaN": (".tif", float_tiff(np.nan)),
        "float Inf": (".tif", float_tiff(np.inf)),
        "float": (".tif", float_tiff(0.7)),
        "bomb of 13,000 x 13,000": (".png", black_png(13_000)),
        "JPEG header of 65,500 x 65,500": (".jpg", jpeg_that_says(65_500, 65_500)),
        "JPEG header of 13,000 x 13,000": (".jpg", jpeg_that_says(13_000, 13_000)),
        "GIF header": (".gif", encoded("GIF")[:6] + struct.pack("<HH", 65_535, 65_535) + encoded("GIF")[10:]),
        "BMP header": (".bmp", encoded("BMP")[:18] + struct.pack("<ii", 60_000, 60_000) + encoded("BMP")[26:]),
        "PPM header": (".ppm", b"P6\n999999 999999\n255\n" + bytes(100)),
        "PNG without an end": (".png", encoded("PNG")[:-12]),
        "PNG with a wrong checksum": (".png", encoded("PNG")[:-20] + b"\0" * 8 + encoded("PNG")[-12:]),
    }
    for width, height in ((2**31 - 1, 2**31 - 1), (100_000, 100_000), (1, 2**31 - 1), (20_000, 9_000)):
        found[f"PNG header of {width} x {height}"] = ".png", png_that_says(width, height)
    for format in ENCODED:
        content = encoded(format, draw.randrange(99))
        for share in (0.02, 0.5, draw.random() * 0.9):
            found[f"{format} cut at {share:.2f}"] = suffix(format), content[: int(len(content) * share)]
    return found


def _tiff(kind: type) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(photo(0).convert("L")).astype(kind)).save(buffer, "TIFF")
    return buffer.getvalue()


def flipped(draw: random.Random) -> tuple[str, bytes]:
    """An image with one bit flipped: whole or not, as its format can tell."""
    format = draw.choice(ENCODED)
    content = bytearray(encoded(format, draw.randrange(99)))
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return suffix(format), bytes(content)


def unsized(draw: random.Random) -> dict[str, tuple[str, bytes]]:
    """Files whose unused parts are large, or hold anything: good images all the same."""
    return {
        "text of 50 MB unpacked": (".png", png_with(b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000)))),
        "profile of 50 MB unpacked": (".png", png_with(b"iCCP", b"a\0\0" + zlib.compress(bytes(50_000_000)))),
        "random text": (".png", png_with(b"tEXt", draw.randbytes(2000))),
    }


def odd_images() -> dict[str, Callable[[Path], None]]:
    """What writes images that are odd and good, by file name."""
    picture = photo(1)
    exif = Image.Exif()
    exif[0x112] = 6
    palette = picture.convert("P")
    frames = [photo(seed) for seed in range(3)]
    return {
        "cmyk.jpg": lambda path: picture.convert("CMYK").save(path),
        "grey.jpg": lambda path: picture.convert("L").save(path),
        "16 bits.png": lambda path: Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(
            path
        ),
        "palette.png": lambda path: palette.save(path, transparency=0),
        "grey alpha.png": lambda path: picture.convert("LA").save(path),
        "rotated.jpg": lambda path: picture.save(path, exif=exif),
        "animated.gif": lambda path: frames[0].save(path, save_all=True, append_images=frames[1:]),
        "animated.webp": lambda path: frames[0].save(path, save_all=True, append_images=frames[1:]),
        "one bit.png": lambda path: picture.convert("1").save(path),
        "1 x 1.png": lambda path: Image.new("RGB", (1, 1), "red").save(path),
        "20,000 x 10.png": lambda path: photo(2, (20_000, 10)).save(path),
        "10 x 20,000.png": lambda path: photo(2, (10, 20_000)).save(path),
        "clear.png": lambda path: Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(path),
        "a link.png": lambda path: _link_out(path, picture),
    }


def _link_out(path: Path, picture: Image.Image) -> None:
    """A link to an image outside of the folder."""
    outside = path.parent.parent / "outside.png"
    picture.save(outside)
    path.symlink_to(outside)


def no_files(folder: Path) -> list[Path]:
    """A named pipe, a link to it, links to nothing and to a device, and a folder, all named as images."""
    os.mkfifo(folder / "pipe.png")
    (folder / "link to pipe.png").symlink_to(folder / "pipe.png")
    (folder / "dead link.png").symlink_to(folder / "nowhere.png")
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "circle.png").symlink_to(folder / "circle.png")
    (folder / "folder.jpg").mkdir()
    return sorted(folder.glob("*"))
