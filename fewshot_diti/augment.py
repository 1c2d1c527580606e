"""Colour-jittered copies of a shot, drawn from (seed, image id, copy number) alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional

from fewshot_diti.config import TrainingConfig
from fewshot_diti.trials import stream

_ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))


def colour_variants(pixels_CHW: Tensor, image_id: str, config: TrainingConfig) -> Tensor:
    """[K, 3, h, w] in [-1, 1]: the shot itself, then K - 1 jittered copies.

    Not `v2.ColorJitter`: it draws from torch's global generator, and other copies give other class tokens.
    """
    copies = [pixels_CHW]
    image = (pixels_CHW + 1) / 2
    for k in range(1, config.colour_variants):
        g = stream(config.seed, image_id, "colours", k)
        copy = image[list(_ORDERS[int(g.integers(6))])] if config.permute_channels else image
        copy = functional.adjust_brightness(copy, max(0.0, 1 + config.brightness * g.uniform(-1, 1)))
        copy = functional.adjust_contrast(copy, max(0.0, 1 + config.contrast * g.uniform(-1, 1)))
        copy = functional.adjust_saturation(copy, max(0.0, 1 + config.saturation * g.uniform(-1, 1)))
        copy = functional.adjust_hue(copy, config.hue * g.uniform(-1, 1))
        if config.flip and g.uniform() < 0.5:
            copy = copy.flip(-1)
        copies.append(copy * 2 - 1)
    return torch.stack(copies)
