"""An initialisation that makes an AutoencoderKL a linear map, so that it learns from the first step.

From diffusers' own initialisation an autoencoder spends most of a short run on passing an image through two dozen
random nonlinear layers. Here every residual branch starts at zero, the convolutions around them are orthogonal, and the
two nonlinear outputs (GroupNorm, SiLU, convolution) are set so that they pass signals unchanged:

- silu(x) - silu(-x) = x, so a signal that two channels carry, once with each sign, passes a SiLU;
- a constant pair (CARRIER, -CARRIER) in a group of a GroupNorm outweighs the signals' own variance, and signals in
  pairs have no mean, so the norm divides by a constant.
"""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

CARRIER = 8.0
_LOG_VARIANCE = -6.0  # of the posterior at the start
_REST = 0.1  # scale of an output's weights on channels that carry no signal


@torch.no_grad()
def linear_start(vae: AutoencoderKL) -> None:
    """Initialises an autoencoder without attention as a linear map of random orthogonal layers.

    Raises:
        ValueError: the last encoder or decoder level has too few channels per group for the signals.
    """
    encoder, decoder = vae.encoder, vae.decoder
    linear = [encoder.conv_in, decoder.conv_in]
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
            linear += [] if module.conv_shortcut is None else [module.conv_shortcut]
        elif isinstance(module, Downsample2D | Upsample2D):
            linear.append(module.conv)
    for conv in linear:
        nn.init.orthogonal_(conv.weight.flatten(1))
        nn.init.zeros_(conv.bias)
    latents = vae.config.latent_channels
    before = encoder.down_blocks[-1].resnets[0].conv_shortcut or encoder.down_blocks[-2].downsamplers[0].conv
    _pass_signals(before, encoder.conv_norm_out, encoder.conv_out, latents)
    encoder.conv_out.weight[latents:] = 0
    encoder.conv_out.bias[latents:] = _LOG_VARIANCE
    before = decoder.up_blocks[-1].resnets[0].conv_shortcut or decoder.up_blocks[-2].upsamplers[0].conv
    _pass_signals(before, decoder.conv_norm_out, decoder.conv_out, vae.config.out_channels)
    for conv in (vae.quant_conv, vae.post_quant_conv):
        nn.init.eye_(conv.weight.flatten(1))
        nn.init.zeros_(conv.bias)


def _pass_signals(before: nn.Conv2d, norm: nn.GroupNorm, out: nn.Conv2d, signals: int) -> None:
    """Lets the first `signals` output channels be linear in what `before` computes.

    A group holds the carriers in its first two channels, then pairs of opposite sign, then free channels.
    """
    size = norm.num_channels // norm.num_groups
    per_group = -(-signals // norm.num_groups)
    if 2 + 2 * per_group > size:
        raise ValueError(
            f"{norm.num_channels} channels in {norm.num_groups} groups cannot carry {signals} signals: a group needs "
            f"{2 + 2 * per_group} channels and has {size}; use fewer groups or more channels."
        )
    assert before.bias is not None and out.bias is not None, "diffusers' convolutions have biases"
    gain = CARRIER * (2 / size) ** 0.5  # undoes the norm's division
    middle = out.kernel_size[0] // 2
    out.weight *= _REST
    nn.init.zeros_(out.bias)
    for group in range(-(-signals // per_group)):
        first = group * size
        before.weight[first : first + 2] = 0
        before.bias[first], before.bias[first + 1] = CARRIER, -CARRIER
        out.weight[:signals, first : first + 2 + 2 * per_group] = 0
        for i in range(min(per_group, signals - group * per_group)):
            plus = first + 2 + 2 * i
            before.weight[plus + 1] = -before.weight[plus]
            out.weight[group * per_group + i, plus, middle, middle] = gain
            out.weight[group * per_group + i, plus + 1, middle, middle] = -gain
