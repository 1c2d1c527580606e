"""Features of a frozen U-Net: what its blocks hold of an image at a timestep, under the generic prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image

from fewshot_diti.backbone import Backbone
from fewshot_diti.baselines.base import KeptFeatures
from fewshot_diti.baselines.probe import Features
from fewshot_diti.data.images import ImageGeometry, ImageSource
from fewshot_diti.features import block_features, chosen_block, named_blocks

TIMESTEPS = (0.06, 0.2, 0.4)  # as shares of the schedule


class UnetFeatures:
    """All blocks' features of images at some timesteps, without noise, one pass through the U-Net per timestep.

    Args:
        prompt: of the text that the U-Net reads.
        positions: a block's map is averaged down to at most (height, width) of these.
    """

    def __init__(
        self,
        backbone: Backbone,
        geometry: ImageGeometry,
        prompt: str,
        *,
        positions: tuple[int, int] | None = None,
        batch_size: int = 16,
    ) -> None:
        self.backbone, self.geometry, self.prompt = backbone, geometry, prompt
        self.positions, self.batch_size = positions, batch_size
        self._blocks = dict([chosen_block(backbone)]) | named_blocks(
            backbone
        )  # the first where the shots cannot choose
        self._kept = {share: KeptFeatures(partial(self._compute, share=share)) for share in TIMESTEPS}

    def candidates(self) -> dict[str, Features]:
        """Features [N, d] of each block at each timestep, the default first."""
        return {
            f"{name}, t = {round(share * self.backbone.num_train_timesteps)}": partial(self._block, name, share)
            for name in self._blocks
            for share in TIMESTEPS
        }

    def _block(self, name: str, share: float, images: Sequence[ImageSource], *, keep: bool = True) -> np.ndarray:
        rows = self._kept[share](images, keep=keep)
        place = list(self._blocks).index(name)
        start = sum(self._widths[:place])
        return rows[:, start : start + self._widths[place]].astype(np.float32)

    @torch.no_grad()
    def _compute(self, images: list[Image.Image], share: float) -> np.ndarray:
        """All blocks' features side by side, float16 [N, sum of widths]."""
        rows, text = [], self.backbone.encode_text(self.backbone.tokenize([self.prompt]))
        for start in range(0, len(images), self.batch_size):
            pixels = torch.stack([self.geometry.pixels(i) for i in images[start : start + self.batch_size]])
            latents = self.backbone.encode_images(pixels)[0]
            parts = block_features(
                self.backbone, latents, text, timestep=share, blocks=self._blocks, positions=self.positions
            )
            self._widths = [part.shape[1] for part in parts]
            rows.append(torch.cat(parts, 1).half())
        return torch.cat(rows).numpy()
