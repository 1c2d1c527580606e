"""Features of a frozen U-Net: what its blocks hold of an image at a time-step, under the generic prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from fewshot_diti.backbone import Backbone
from fewshot_diti.baselines.base import KeptFeatures
from fewshot_diti.baselines.probe import Features
from fewshot_diti.data.images import ImageGeometry, ImageSource

TIMESTEPS = (0.06, 0.2, 0.4)  # as shares of the schedule


class UnetFeatures:
    """All blocks' features of images at some time-steps, without noise, one pass through the U-Net a time-step.

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
        positions: tuple[int, int] = (8, 16),
        batch_size: int = 16,
    ) -> None:
        self.backbone, self.geometry, self.prompt = backbone, geometry, prompt
        self.positions, self.batch_size = positions, batch_size
        unet = backbone.unet
        # the best on val images of the pocket first: it is taken where the shots cannot choose
        last = len(unet.up_blocks) - 2
        ups = sorted(range(len(unet.up_blocks)), key=lambda i: i != last)
        self._blocks = {f"up {i}": unet.up_blocks[i] for i in ups}
        self._blocks |= {"mid": unet.mid_block} | {f"down {i}": block for i, block in enumerate(unet.down_blocks)}
        self._kept = {share: KeptFeatures(partial(self._compute, share=share)) for share in TIMESTEPS}

    def candidates(self) -> dict[str, Features]:
        """Features [N, d] of each block at each time-step, the one to take unasked first."""
        return {
            f"{name}, t = {round(share * self.backbone.num_train_timesteps)}": partial(self._block, name, share)
            for name in self._blocks
            for share in TIMESTEPS
        }

    def _block(self, name: str, share: float, images: Sequence[ImageSource]) -> np.ndarray:
        rows = self._kept[share](images)
        place = list(self._blocks).index(name)
        start = sum(self._widths[:place])
        return rows[:, start : start + self._widths[place]].astype(np.float32)

    @torch.no_grad()
    def _compute(self, images: list[Image.Image], share: float) -> np.ndarray:
        """All blocks' features side by side, float16 [N, sum of widths]."""
        t = round(share * self.backbone.num_train_timesteps)
        rows = []
        for start in range(0, len(images), self.batch_size):
            pixels = torch.stack([self.geometry.pixels(i) for i in images[start : start + self.batch_size]])
            parts = self._pass(self.backbone.encode_images(pixels)[0].to(self.backbone.device), t)
            self._widths = [part.shape[1] for part in parts]
            rows.append(torch.cat(parts, 1))
        return torch.cat(rows).numpy()

    def _pass(self, latents_Bchw: Tensor, t: int) -> list[Tensor]:
        """Each block's pooled map [B, d] in one pass."""
        kept: dict[str, Tensor] = {}

        def keep(name: str, output: Tensor | tuple[Tensor, ...]) -> None:
            maps = output[0] if isinstance(output, tuple) else output  # down blocks return their skips too
            height, width = (min(a, b) for a, b in zip(maps.shape[2:], self.positions, strict=True))
            kept[name] = F.adaptive_avg_pool2d(maps.float(), (height, width)).flatten(1).half().cpu()

        handles = [
            block.register_forward_hook(lambda _, __, output, name=name: keep(name, output))
            for name, block in self._blocks.items()
        ]
        backbone, count = self.backbone, len(latents_Bchw)
        text = backbone.encode_text(backbone.tokenize([self.prompt])).expand(count, -1, -1)
        times = torch.full((count,), t, device=latents_Bchw.device)
        backbone.errors(latents_Bchw, torch.zeros_like(latents_Bchw), times, text)
        for handle in handles:
            handle.remove()
        return [kept[name] for name in self._blocks]
