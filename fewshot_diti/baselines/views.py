"""Random views of an image, for baselines that train on them; torch's global generator draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from threading import RLock

import torch
from PIL import Image
from torchvision.transforms import v2

from fewshot_diti.config import TrainingConfig

_ONE_AT_A_TIME = RLock()
Recolour = Callable[[Image.Image], Image.Image]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside the context torch's global generator draws from a seed, and is as it was outside; one thread at a time.

    Random views draw from that generator and no other. Whatever else draws from it in this package, such as a network
    that is made, does so inside this context too, so that threads cannot change each other's views.
    """
    with _ONE_AT_A_TIME, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # a GPU's stays as it is
        yield


def as_it_is(image: Image.Image) -> Image.Image:
    """The image itself."""
    return image


@dataclass(frozen=True, kw_only=True)
class ColourJitter:
    """Copies in other colours; strengths as of `TrainingConfig`."""

    brightness: float
    contrast: float
    saturation: float
    hue: float
    permute_channels: bool

    @classmethod
    def of(cls, training: TrainingConfig) -> ColourJitter:
        """As strong as that of the copies that class tokens are trained on."""
        return cls(**{f.name: getattr(training, f.name) for f in fields(cls)})

    def __call__(self, image: Image.Image) -> Image.Image:
        """A copy, as torch's global generator draws."""
        permuted = v2.RandomChannelPermutation()(image) if self.permute_channels else image
        copy: Image.Image = v2.ColorJitter(self.brightness, self.contrast, self.saturation, self.hue)(permuted)
        return copy


def random_view(image: Image.Image, recolour: Recolour) -> Image.Image:
    """A crop in other colours: half of the image or more, in its own aspect and size; no flips, since noses may point
    one way."""
    aspect = image.width / image.height
    return recolour(v2.RandomResizedCrop((image.height, image.width), scale=(0.5, 1.0), ratio=(aspect, aspect))(image))
