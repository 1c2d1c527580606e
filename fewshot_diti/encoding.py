"""Images to latents and features: the same way for shots and test images, each image decoded once.

Shapes in names: N images, K colour variants, V views of a shot, c, h, w latents, D values of a feature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from fewshot_diti.augment import colour_variants
from fewshot_diti.backbone import Backbone
from fewshot_diti.config import TrainingConfig
from fewshot_diti.data.images import ImageGeometry, ImageSource, decode
from fewshot_diti.features import block_features
from fewshot_diti.presets import PRESETS


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """An image that was decoded: its id, and its pixels in the bank's geometry.

    Attributes:
        id: of the decoded pixels, before any resize.
        name: for messages: the path, or the id.
        pixels_CHW: uint8 [3, height, width].
        resized: uint8 pixels in the other geometries that the encoder was asked for.
    """

    id: str
    name: str
    pixels_CHW: Tensor
    resized: Mapping[ImageGeometry, Tensor] = field(default_factory=dict)

    @property
    def values_CHW(self) -> Tensor:
        """float32 pixels in [-1, 1]."""
        return self.pixels_CHW.float() / 127.5 - 1


class Encoder:
    """A backbone's view of images.

    Args:
        geometry: the size and resize rule that all images get.
        generic_prompt: the text that the U-Net reads when its features are taken.
        others: further geometries that images are wanted in.
    """

    def __init__(
        self,
        backbone: Backbone,
        geometry: ImageGeometry,
        generic_prompt: str,
        others: Sequence[ImageGeometry] = (),
    ) -> None:
        self.backbone, self.geometry, self.generic_prompt, self.others = backbone, geometry, generic_prompt, others
        self._variants: dict[tuple[str, object], tuple[Tensor, Tensor]] = {}

    def prepare(self, image: ImageSource | PreparedImage) -> PreparedImage:
        """Decodes an image and gives it the geometry; one that is prepared already stays as it is.

        Raises:
            FileNotFoundError, ValueError, TypeError: as `data.images.decode` and `ImageGeometry.pixels`.
        """
        if isinstance(image, PreparedImage):
            if not set(self.others) <= set(image.resized):
                raise ValueError(f"{image.name} was prepared by another classifier's encoder; pass the image itself.")
            return image
        decoded = decode(image)
        pixels, *others = (g.resized(decoded.rgb, decoded.name) for g in (self.geometry, *self.others))
        return PreparedImage(decoded.id, decoded.name, pixels, dict(zip(self.others, others, strict=True)))

    @torch.no_grad()
    def latents(self, images: Sequence[PreparedImage]) -> Tensor:
        """Latents [N, c, h, w], each image by itself, so that its neighbours cannot change it by a bit.

        Raises:
            ValueError: those of an image are not finite, naming it.
        """
        found = [self.backbone.encode_images(image.values_CHW[None])[0] for image in images]
        for image, latents in zip(images, found, strict=True):
            if not latents.isfinite().all():
                raise ValueError(f"The VAE gives latents of {image.name} that are not finite; leave the image out.")
        return torch.cat(found)

    def flat_latents(self, images: Sequence[ImageSource]) -> np.ndarray:
        """Latents float32 [N, c * h * w], as baselines take features."""
        return self.latents([self.prepare(image) for image in images]).flatten(1).numpy()

    def variants(self, image: PreparedImage, training: TrainingConfig) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [K, c, h, w] of the latents of a shot's colour variants; kept until `forget`."""
        key = image.id, _colours(training)
        if key not in self._variants:
            copies = colour_variants(image.values_CHW, image.id, training)
            self._variants[key] = self.backbone.encode_images(copies)
        return self._variants[key]

    def forget(self) -> None:
        """Drops what is kept of shots."""
        self._variants.clear()

    @torch.no_grad()
    def features(self, latents_Nchw: Tensor) -> Tensor:
        """What the frozen U-Net holds of images, float32 [N, D], each by itself as in `latents`."""
        text = self.backbone.encode_text(self.backbone.tokenize([self.generic_prompt]))
        return torch.cat([block_features(self.backbone, x[None], text)[0] for x in latents_Nchw])

    def shot_features(self, shots: Sequence[PreparedImage], training: TrainingConfig) -> Tensor:
        """`features` [n, V, D] of shots and of copies in other colours, float16."""
        views = PRESETS[self.backbone.kind].features.views
        latents = torch.stack([self.variants(shot, training)[0][:views] for shot in shots])
        return self.features(latents.flatten(0, 1)).unflatten(0, latents.shape[:2]).half()


def _colours(training: TrainingConfig) -> tuple[object, ...]:
    """All that decides a shot's colour variants."""
    names = ("colour_variants", "brightness", "contrast", "saturation", "hue", "permute_channels", "flip", "seed")
    return tuple(getattr(training, name) for name in names)
