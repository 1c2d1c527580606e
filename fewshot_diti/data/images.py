"""Images: opened from any source as RGB, named by their pixels, cut and resized to a backbone's shape."""

from __future__ import annotations

import hashlib
import io
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

ImageSource = str | Path | Image.Image | np.ndarray | bytes
ResizeRule = Literal["crop", "squash", "pad"]


def open_image(source: ImageSource) -> Image.Image:
    """Decodes one image to RGB.

    The EXIF orientation is applied, transparent pixels are laid over white, grey, 16-bit grey, palette and CMYK images
    are converted; of an animation the first frame is taken.

    Args:
        source: a path, an encoded file's bytes, a PIL image, or a uint8 array of shape [H, W], [H, W, 3] or [H, W, 4].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be decoded, or the array's shape or dtype is not among those above.
        TypeError: the source is of another type.
    """
    if isinstance(source, np.ndarray):
        return _to_rgb(_from_array(source), f"an array of shape {source.shape}")
    if isinstance(source, Image.Image):
        return _to_rgb(source, f"a PIL image of mode {source.mode}")
    if not isinstance(source, str | Path | bytes):
        raise TypeError(
            f"An image cannot be a {type(source).__name__}; pass a path, encoded bytes, a PIL image or a uint8 array."
        )
    name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
    if not isinstance(source, bytes) and not Path(source).is_file():
        raise FileNotFoundError(f"There is no image file {name}; check the path.")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.load()
    except UnidentifiedImageError as error:
        raise ValueError(f"{name} is not an image that Pillow knows; replace it, or leave it out.") from error
    except Exception as error:  # what the decoders raise for damaged files has no end
        raise ValueError(f"Cannot decode the image {name} ({error}); replace it, or leave it out.") from error
    return _to_rgb(image, name)


def _from_array(array: np.ndarray) -> Image.Image:
    """A PIL image of a uint8 array; raises ValueError for another dtype or shape."""
    if array.dtype != np.uint8:
        raise ValueError(
            f"An image array of dtype {array.dtype}; only uint8 is allowed. Scale the values to 0..255 and call "
            ".astype(np.uint8)."
        )
    channels_last = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if not channels_last or 0 in array.shape:
        raise ValueError(
            f"An image array of shape {array.shape}; allowed are [H, W], [H, W, 3] and [H, W, 4], not empty. Move the "
            "channels last, and pass several images as a list."
        )
    return Image.fromarray(np.ascontiguousarray(array))


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    """The upright RGB image; raises ValueError for modes whose value range is not defined (I, F)."""
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        if image.mode in ("I", "F"):
            raise ValueError("its values have no fixed range; scale them to 0..255 and save the image as 8 bit")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        return image.convert("RGB")
    except Exception as error:  # a broken EXIF field alone raises struct.error or TypeError
        raise ValueError(f"Cannot convert {name} to RGB: {error}.") from error


def image_id(image: ImageSource) -> str:
    """32 hexadecimal characters of the SHA-256 of the decoded RGB pixels and their shape.

    A path, a PIL image and an array of one picture have one id; names and metadata do not enter it.

    Raises:
        FileNotFoundError, ValueError, TypeError: as `open_image`.
    """
    pixels_HWC = np.asarray(open_image(image))
    return hashlib.sha256(repr(pixels_HWC.shape).encode() + pixels_HWC.tobytes()).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class ImageGeometry:
    """The one shape that a bank gives to shots and test images alike.

    Attributes:
        size: (height, width) in pixels.
        resize: "crop" covers the size, keeping the aspect, and crops the centre; "pad" fits into the size, keeping the
            aspect, on black; "squash" changes the aspect.
        banner_rows: pixel rows cut from the bottom before the resize (FGVC-Aircraft's images end in a banner of 20).

    Raises:
        ValueError: a size below 1, an unknown resize rule, a negative number of rows.
    """

    size: tuple[int, int]
    resize: ResizeRule = "crop"
    banner_rows: int = 0

    def __post_init__(self) -> None:
        if len(self.size) != 2 or not all(isinstance(s, int) and s >= 1 for s in self.size):
            raise ValueError(f"size={self.size!r}; pass (height, width), two whole numbers of at least 1.")
        if self.resize not in get_args(ResizeRule):
            raise ValueError(f"resize={self.resize!r}; pass one of {get_args(ResizeRule)}.")
        if not isinstance(self.banner_rows, int) or self.banner_rows < 0:
            raise ValueError(f"banner_rows={self.banner_rows!r}; pass a whole number of at least 0.")

    def to_dict(self) -> dict[str, Any]:
        """The attributes as JSON writes them."""
        return asdict(self) | {"size": list(self.size)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ImageGeometry:
        """The geometry that `to_dict` wrote; raises ValueError for bad values and TypeError for unknown fields."""
        return cls(**fields | {"size": tuple(fields["size"])})

    def check(self, picture: Image.Image, name: str) -> None:
        """Raises a ValueError naming the picture where it is no higher than `banner_rows`."""
        if picture.height <= self.banner_rows:
            raise ValueError(
                f"{name} is {picture.height} pixels high, no more than banner_rows={self.banner_rows}; lower it."
            )

    def pixels(self, image: ImageSource) -> Tensor:
        """float32 [3, height, width] in [-1, 1], resized by Pillow's antialiased bicubic filter.

        Raises:
            ValueError: the image is no higher than `banner_rows`.
            FileNotFoundError, ValueError, TypeError: as `open_image`.
        """
        name = f"Image {image}" if isinstance(image, str | Path) else "The image"
        return self.resized(open_image(image), name).float() / 127.5 - 1

    def resized(self, picture: Image.Image, name: str) -> Tensor:
        """uint8 [3, height, width] of an RGB picture; raises as `check`."""
        self.check(picture, name)
        picture = picture.crop((0, 0, picture.width, picture.height - self.banner_rows))
        height, width = self.size
        if self.resize == "squash":
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        elif self.resize == "pad":
            picture = ImageOps.pad(picture, (width, height), Image.Resampling.BICUBIC, color="black")
        else:
            scale = max(height / picture.height, width / picture.width)
            left, top = (picture.width - width / scale) / 2, (picture.height - height / scale) / 2
            centre = (max(0, left), max(0, top), picture.width - max(0, left), picture.height - max(0, top))
            picture = picture.resize((width, height), Image.Resampling.BICUBIC, box=centre)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
