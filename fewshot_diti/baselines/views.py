"""Random views of an image, for baselines that train on them."""

from __future__ import annotations

from PIL import Image
from torchvision.transforms import v2


def random_crop(image: Image.Image) -> Image.Image:
    """Half of the image or more, in its own aspect and size; no flips, since noses may point one way."""
    aspect = image.width / image.height
    return v2.RandomResizedCrop((image.height, image.width), scale=(0.5, 1.0), ratio=(aspect, aspect))(image)
