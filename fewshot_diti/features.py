"""Features of the frozen U-Net: what its blocks hold of an image, with noise or without.

Shapes in names: B batch, c, h, w latents, L text tokens, D values of a feature.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewshot_diti.backbone import Backbone
from fewshot_diti.presets import PRESETS


def chosen_block(backbone: Backbone) -> tuple[str, nn.Module]:
    """The block that describes an image, by the preset for this kind of backbone, with its name."""
    ups = backbone.unet.up_blocks
    place = len(ups) - PRESETS[backbone.kind].features.block
    return f"up {place}", ups[place]


def named_blocks(backbone: Backbone) -> dict[str, nn.Module]:
    """All blocks of the U-Net, the decoder's first."""
    unet = backbone.unet
    middle = {} if unet.mid_block is None else {"mid": unet.mid_block}  # distilled models have none
    ups = {f"up {i}": block for i, block in enumerate(unet.up_blocks)}
    return ups | middle | {f"down {i}": block for i, block in enumerate(unet.down_blocks)}


@torch.no_grad()
def block_features(
    backbone: Backbone,
    latents_Bchw: Tensor,
    text_1LD: Tensor,
    *,
    noise_Bchw: Tensor | None = None,
    timestep: float | None = None,
    blocks: Mapping[str, nn.Module] | None = None,
    positions: tuple[int, int] | None = None,
) -> list[Tensor]:
    """What blocks hold of images, one float32 [B, D] each on the CPU, from one pass through the U-Net.

    Args:
        text_1LD: embedding of the text that the U-Net reads.
        noise_Bchw: that the images get; by default none.
        timestep: that the U-Net is given, as a share of the schedule; by default the preset's, as `positions`.
        blocks: modules by name; by default `chosen_block`.
        positions: (height, width) that a block's map is averaged down to at most.
    """
    preset = PRESETS[backbone.kind].features
    timestep, positions = preset.timestep if timestep is None else timestep, positions or preset.positions
    kept: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor | tuple[Tensor, ...]) -> None:
        maps = output[0] if isinstance(output, tuple) else output  # down blocks return their skips too
        height, width = (min(a, b) for a, b in zip(maps.shape[2:], positions, strict=True))
        kept[name] = F.adaptive_avg_pool2d(maps.float(), (height, width)).flatten(1).cpu()

    blocks = dict([chosen_block(backbone)]) if blocks is None else blocks
    text = text_1LD.expand(len(latents_Bchw), -1, -1)
    times = torch.full((len(latents_Bchw),), round(timestep * backbone.num_train_timesteps), device=backbone.device)
    latents = latents_Bchw.to(backbone.device)
    noise = torch.zeros_like(latents) if noise_Bchw is None else noise_Bchw.to(backbone.device)
    with backbone.lock:  # the hooks see every pass, those of other threads too
        handles = [
            block.register_forward_hook(lambda _, __, output, name=name: keep(name, output))
            for name, block in blocks.items()
        ]
        try:
            backbone.errors(latents, noise, times, text)
        finally:
            for handle in handles:
                handle.remove()
    return [kept[name] for name in blocks]
