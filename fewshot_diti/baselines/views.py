"""Random views of an image, for baselines that train on them; torch's global generator draws."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image
from torchvision.transforms import v2

from fewshot_diti.training import TrainingConfig

Recolour = Callable[[Image.Image], Image.Image]


def as_it_is(image: Image.Image) -> Image.Image:
    """The image itself."""
    return image


def recolouring(training: TrainingConfig) -> Recolour:
    """Copies in other colours, jittered as strongly as those that class tokens are trained on."""
    jitter = v2.ColorJitter(training.brightness, training.contrast, training.saturation, training.hue)
    recolour: Recolour = v2.Compose([v2.RandomChannelPermutation(), jitter]) if training.permute_channels else jitter
    return recolour


def random_view(image: Image.Image, recolour: Recolour) -> Image.Image:
    """A crop in other colours: half of the image or more, in its own aspect and size; no flips, since noses may point
    one way."""
    aspect = image.width / image.height
    return recolour(v2.RandomResizedCrop((image.height, image.width), scale=(0.5, 1.0), ratio=(aspect, aspect))(image))
