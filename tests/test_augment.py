"""Copies of shots in other colours."""

from __future__ import annotations

import torch

from fewshot_diti.augment import colour_variants
from fewshot_diti.config import TrainingConfig


def test_jitter_of_any_strength_gives_an_image() -> None:
    pixels = torch.rand(3, 8, 16) * 2 - 1
    strong = TrainingConfig(
        brightness=2.0, contrast=3.0, saturation=2.0, hue=0.5, permute_channels=True, colour_variants=16
    )
    copies = colour_variants(pixels, "an id", strong)
    assert torch.equal(copies[0], pixels)
    assert copies.isfinite().all() and copies.abs().max() <= 1 + 1e-6
