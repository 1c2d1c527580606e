"""Images: decoded from any source as RGB, identified by their pixels, cut and resized to a backbone's shape."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from fewshot_diti.data.image_files import check_range, read_file, read_picture

ResizeRule = Literal["crop", "squash", "pad"]

THUMBNAIL_SIDE = 16
_LONGEST_SIDE = 8192  # of images for a backbone
_NAMED = 20  # bad images that an error names


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """An image that `decode` has read; every function that takes an `ImageSource` takes it, and decodes nothing again.

    Attributes:
        id: 32 hexadecimal characters of the SHA-256 of the RGB pixels and their shape.
        rgb: the upright picture.
        name: what errors call it: its path, or what it was made of.
    """

    id: str
    rgb: Image.Image
    name: str


ImageSource: TypeAlias = str | Path | Image.Image | np.ndarray | bytes | DecodedImage


def decode(source: ImageSource) -> DecodedImage:
    """Decodes one image to RGB and computes its id.

    The EXIF orientation is applied, transparent pixels are laid over white, grey, 16-bit grey, palette and CMYK images
    are converted; of an animation the first frame is taken. A path, a PIL image and an array of one picture have one
    id; names and metadata do not enter it.

    Args:
        source: a path, an encoded file's bytes, a PIL image, a uint8 array of shape [H, W], [H, W, 3] or [H, W, 4], or
            a DecodedImage, which is returned as it is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be decoded (see `image_files`), or the array's shape or dtype is not among those
            above.
        TypeError: the source is of another type.
    """
    if isinstance(source, DecodedImage):
        return source
    rgb, name = _named_rgb(source)
    pixels_HWC = np.ascontiguousarray(rgb)
    digest = hashlib.sha256(repr(pixels_HWC.shape).encode())
    digest.update(pixels_HWC.data)
    return DecodedImage(id=digest.hexdigest()[:32], rgb=rgb, name=name)


def open_image(source: ImageSource) -> Image.Image:
    """The RGB picture of an image; arguments and errors as `decode`."""
    return source.rgb if isinstance(source, DecodedImage) else _named_rgb(source)[0]


def image_id(source: ImageSource) -> str:
    """The id of an image; arguments and errors as `decode`."""
    return decode(source).id


def thumbnail(rgb: Image.Image) -> np.ndarray:
    """uint8 [16, 16, 3]: the whole picture, averaged over 16 x 16 areas."""
    return np.asarray(rgb.resize((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.BOX))


def raise_bad_images(errors: Mapping[Any, Exception], total: int) -> None:
    """Raises one error that names every image that cannot be used with the reason, the first 20 of many.

    Args:
        errors: of each bad image, by any key; each text names its image. Nothing is raised where there is none.
        total: how many images there are, good and bad.

    Raises:
        FileNotFoundError: all the bad images are missing files.
        ValueError: any other bad image.
    """
    if errors:
        named = "\n  ".join(str(error) for error in list(errors.values())[:_NAMED])
        more = f"\n  and {len(errors) - _NAMED} more" if len(errors) > _NAMED else ""
        missing = all(isinstance(error, FileNotFoundError) for error in errors.values())
        text = f"{len(errors)} of {total} images cannot be used:\n  {named}{more}"
        raise FileNotFoundError(text) if missing else ValueError(text)


def _named_rgb(source: ImageSource) -> tuple[Image.Image, str]:
    """The RGB picture, and what errors call it."""
    if isinstance(source, np.ndarray):
        name = f"an array of shape {source.shape}"
        return _to_rgb(_from_array(source), name), name
    if isinstance(source, Image.Image):
        name = f"a PIL image of mode {source.mode}"
        return _to_rgb(source, name), name
    if isinstance(source, bytes):
        name = f"{len(source)} bytes"
        return _to_rgb(read_picture(source, name), name), name
    if isinstance(source, str | Path):
        name = str(source)
        return _to_rgb(read_picture(read_file(source), name), name), name
    raise TypeError(
        f"An image cannot be a {type(source).__name__}; pass a path, encoded bytes, a PIL image or a uint8 array."
    )


def as_picture(pixels_CHW: Tensor) -> Image.Image:
    """uint8 pixels [3, height, width] as a PIL image."""
    return Image.fromarray(pixels_CHW.permute(1, 2, 0).numpy())


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
    """The upright RGB image; raises ValueError for values without a defined range (modes I and F, some 16-bit grey)."""
    largest = 0
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode in ("I", "F"):
            raise ValueError("its values have no fixed range; scale them to 0..255 and save the image as 8 bit")
        if image.mode.startswith("I;16"):
            values_HW = np.asarray(image)
            largest = int(values_HW.max())
            image = Image.fromarray((values_HW >> 8).astype(np.uint8))
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    except Exception as error:  # a broken EXIF field alone raises struct.error or TypeError
        raise ValueError(f"Cannot convert {name} to RGB: {error}.") from error
    check_range(largest, name)
    return image


@dataclass(frozen=True, kw_only=True)
class ImageGeometry:
    """The one shape that a bank gives to shots and test images alike.

    Attributes:
        size: (height, width) in pixels.
        resize: "crop" covers the size, keeping the aspect, and crops the centre; "pad" fits into the size, keeping the
            aspect, on black; "squash" changes the aspect.
        banner_rows: pixel rows cut from the bottom before the resize (FGVC-Aircraft's images end in a banner of 20).

    Raises:
        ValueError: a size or a number of rows out of its range, or an unknown resize rule.
    """

    size: tuple[int, int]
    resize: ResizeRule = "crop"
    banner_rows: int = 0

    def __post_init__(self) -> None:
        if len(self.size) != 2 or not all(isinstance(s, int) and 1 <= s <= _LONGEST_SIDE for s in self.size):
            raise ValueError(f"size={self.size!r}; pass (height, width), two whole numbers from 1 to {_LONGEST_SIDE}.")
        if self.resize not in get_args(ResizeRule):
            raise ValueError(f"resize={self.resize!r}; pass one of {get_args(ResizeRule)}.")
        if not isinstance(self.banner_rows, int) or not 0 <= self.banner_rows <= _LONGEST_SIDE:
            raise ValueError(f"banner_rows={self.banner_rows!r}; pass a whole number from 0 to {_LONGEST_SIDE}.")

    def to_dict(self) -> dict[str, Any]:
        """The attributes as JSON writes them."""
        return asdict(self) | {"size": list(self.size)}

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
            FileNotFoundError, ValueError, TypeError: as `decode`.
        """
        name = image.name if isinstance(image, DecodedImage) else image
        name = f"Image {name}" if isinstance(name, str | Path) else "The image"
        return self.resized(open_image(image), name).float() / 127.5 - 1

    def resized(self, picture: Image.Image, name: str) -> Tensor:
        """uint8 [3, height, width] of an RGB picture; raises as `check`."""
        self.check(picture, name)
        picture = picture.crop((0, 0, picture.width, picture.height - self.banner_rows))
        height, width = self.size
        if self.resize == "squash":
            picture = picture.resize((width, height), Image.Resampling.BICUBIC)
        elif self.resize == "pad":
            if not min(round(picture.height / picture.width * width), round(picture.width / picture.height * height)):
                # a line that would come out thinner than a pixel
                picture = picture.resize((width, 1) if picture.width > picture.height else (1, height))
            picture = ImageOps.pad(picture, (width, height), Image.Resampling.BICUBIC, color="black")
        else:
            scale = max(height / picture.height, width / picture.width)
            left, top = (picture.width - width / scale) / 2, (picture.height - height / scale) / 2
            centre = (max(0, left), max(0, top), picture.width - max(0, left), picture.height - max(0, top))
            picture = picture.resize((width, height), Image.Resampling.BICUBIC, box=centre)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()
