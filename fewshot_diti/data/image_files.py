"""Image files: which can be read, and how their bytes become a picture."""

from __future__ import annotations

import io
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 178_956_970  # Pillow's own limit, where its default is unchanged
MAX_SIDE = 65_535  # JPEG's limit; Pillow keeps a pointer for each row
_LONGEST = 4096  # path that a message holds, in characters: longer ones are data by mistake
MAX_FILE_BYTES = 2**30
_LARGE = 2**25  # pixels above which a file must hold at least one byte for each _PIXELS_PER_BYTE
_PIXELS_PER_BYTE = 1000

Image.init()  # loads all plugins, so that OPEN is complete
# No EPS, which starts Ghostscript; the rest of what Pillow reads is no format of photographs.
FORMATS = tuple(f for f in ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF", "JPEG2000") if f in Image.OPEN)

_PNG = b"\x89PNG\r\n\x1a\n"
_UNUSED_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # texts and colour profiles: any size, and never read
_KINDS = {stat.S_IFIFO: "a named pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}


def read_file(path: str | Path) -> bytes:
    """The bytes of a regular file; anything else is an error at once, without waiting for data.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a folder, a named pipe, a device or a socket; it cannot be read; or it is above 1 GiB.
    """
    if "://" in str(path):
        raise FileNotFoundError(f"{path} is an internet address, not a file; download the image and pass its path.")
    try:
        status = os.stat(path)
        if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_FILE_BYTES:
            return Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        if os.path.islink(path):
            raise FileNotFoundError(
                f"{path} is a link to {os.readlink(path)}, which is not there; mend or remove it."
            ) from error
        raise FileNotFoundError(f"There is no image file {path}; check the path.") from error
    except (OSError, ValueError) as error:  # no permission, links in a circle, a name too long, a NUL in it
        reason = (isinstance(error, OSError) and error.strerror) or error
        shown = path if len(str(path)) <= _LONGEST else f"{str(path)[:60]}\u2026 ({len(str(path))} characters)"
        raise ValueError(f"{shown} cannot be read ({reason}); replace it, or leave it out.") from error
    if stat.S_ISDIR(status.st_mode):
        if not os.access(path, os.R_OK | os.X_OK):
            raise ValueError(f"{path} is a folder that cannot be listed; change its permissions, or leave it out.")
        raise FileNotFoundError(f"{path} is a folder, not an image file; pass the image files that lie in it.")
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "no regular file")
        raise ValueError(f"{path} is {kind}, not an image file; leave it out.")
    raise ValueError(
        f"{path} has {status.st_size} bytes; an image file may have up to {MAX_FILE_BYTES}. Save it compressed."
    )


def read_picture(content: bytes, name: str) -> Image.Image:
    """Decodes the bytes of an image file of one of `FORMATS`, recognised by content; of an animation the first frame.

    The size is read from the header and checked before pixels are made. The checksums of a PNG are checked.

    Raises:
        ValueError: another format, a damaged file, a file cut short, a picture above the limits on the size, or 16-bit
            values that use less than a sixteenth of their range.
    """
    if not content:
        raise ValueError(f"{name} is empty; replace it, or leave it out.")
    try:
        if content.startswith(_PNG):
            content = _checked_png(content)
        with Image.open(io.BytesIO(content), formats=FORMATS) as file:
            _check_size(file.size, len(content))
            sixteen_bits = any(";16" in str(tile.args) for tile in file.tile)
            file.load()
        image: Image.Image = file
        if file.format == "PPM" and file.mode == "I":  # which Pillow has scaled to 0..65535
            image = Image.fromarray(np.asarray(file).astype(np.uint16))
    except UnidentifiedImageError as error:
        kinds = ", ".join(FORMATS)
        raise ValueError(f"{name} is not an image of a known format ({kinds}); convert it, or leave it out.") from error
    except Exception as error:  # what the decoders raise for damaged files has no end
        raise ValueError(f"Cannot decode the image {name} ({error}); replace it, or leave it out.") from error
    if sixteen_bits and not image.mode.startswith("I"):  # colours, of which Pillow has kept the high byte alone
        colours_HWC = np.asarray(image.convert("RGB"))
        brightest = int(colours_HWC.max())
        check_range(256 * brightest + 255, name)
    return image


def check_range(largest: int, name: str) -> None:
    """Checks that 16-bit values use their range; many cameras write 10, 12 or 14 bits into 16-bit files.

    Args:
        largest: the largest value of the picture, 0 to 65535; 0 is allowed.

    Raises:
        ValueError: it is below 4096 (12 bits or fewer): as 8-bit values, all pixels would be below 16 of 255. Where it
            is below 16384 (14 bits) there is a warning, as the picture may be a dark one.
    """
    bits = max(8, largest.bit_length())
    text = (
        f"The 16-bit values of {name} reach {largest} of 65535, as if they had {bits} bits: multiply them by "
        f"{2 ** (16 - bits)}, or save the image with 8 bits"
    )
    if 0 < largest < 2**12:
        raise ValueError(f"{text}; it would be black.")
    if 0 < largest < 2**14:
        warnings.warn(f"{text}, unless it is meant to be that dark.", stacklevel=2)


def _check_size(size: tuple[int, int], num_bytes: int) -> None:
    width, height = size
    if width * height > MAX_PIXELS or max(size) > MAX_SIDE:
        raise ValueError(
            f"its header says {width} x {height} pixels; allowed are {MAX_PIXELS} pixels and sides of {MAX_SIDE}"
        )
    if width * height > max(_LARGE, _PIXELS_PER_BYTE * num_bytes):
        raise ValueError(f"its header says {width} x {height} pixels, too many for a file of {num_bytes} bytes")


def _checked_png(content: bytes) -> bytes:
    """The PNG without texts and colour profile; raises ValueError where a checksum is wrong or the end is missing."""
    kept = [_PNG]
    for kind, chunk in _png_chunks(content):
        if kind not in _UNUSED_CHUNKS:
            if zlib.crc32(chunk[4:-4]) != struct.unpack(">I", chunk[-4:])[0]:
                raise ValueError(f"the checksum of its part {kind.decode('latin-1')!r} is wrong")
            kept.append(chunk)  # type: ignore[arg-type]
        if kind == b"IEND":
            return b"".join(kept)
    raise ValueError("it is cut short")


def _png_chunks(content: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """(kind, whole chunk: length, kind, data, checksum) of each chunk that is complete."""
    place = len(_PNG)
    while place + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        if place + 12 + length > len(content):
            return
        yield kind, memoryview(content)[place : place + 12 + length]
        place += 12 + length
