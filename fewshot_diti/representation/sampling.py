"""Images from features: DDIM and its inversion, by diffusers' schedulers.

Shapes in names: B batch, c, h, w latents, D width of the feature.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from torch import Tensor

from fewshot_diti.representation.model import Representation


def sample(representation: Representation, start_Bchw: Tensor, z_BD: Tensor, steps: int) -> Tensor:
    """Scaled latents fp32 [B, c, h, w] of images with these features (Song et al., DDIM, eq. 12, without noise).

    Args:
        start_Bchw: x_T, standard normal or from `invert`.
        steps: of the sampler.
    """
    return _walk(representation, DDIMScheduler, start_Bchw, z_BD, steps)


def invert(representation: Representation, latents_Bchw: Tensor, z_BD: Tensor, steps: int) -> Tensor:
    """The x_T, fp32 [B, c, h, w], from which `sample` with as many steps returns to the latents, up to the error of
    finite steps."""
    return _walk(representation, DDIMInverseScheduler, latents_Bchw, z_BD, steps)


def exchanged(z_a_BD: Tensor, z_b_BD: Tensor, dims: slice) -> Tensor:
    """Features a with some dimensions of b, [B, D]."""
    both = z_a_BD.clone()
    both[:, dims] = z_b_BD[:, dims]
    return both


@torch.no_grad()
def _walk(representation: Representation, kind: Any, latents_Bchw: Tensor, z_BD: Tensor, steps: int) -> Tensor:
    device = representation.backbone.device
    # latents are not clipped, as their range is not that of pixels
    scheduler = kind.from_config(representation.backbone.scheduler.config, prediction_type="epsilon", clip_sample=False)
    scheduler.set_timesteps(steps)
    x, z = latents_Bchw.to(device, torch.float32), z_BD.to(device)
    for t in scheduler.timesteps:
        noise = representation.predict_noise(x, t.to(device).expand(len(x)), z)
        x = scheduler.step(noise, t, x).prev_sample
    return x
