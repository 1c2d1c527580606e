"""What the frozen U-Net gives in one pass, and the trainable decoder that shifts its prediction towards an image.

Shapes in names: B batch, c, h, w latents, L text tokens, W width of the text, D width of the feature, T timesteps of
the schedule.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from fewshot_diti.attention import attention_for_training
from fewshot_diti.backbone import Backbone


class Call(NamedTuple):
    """The arguments that a block of the frozen decoder was called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden_states(self) -> Tensor:
        """What the block reads from the block before it: the first argument, named or not."""
        found: Tensor = self.args[0] if self.args else self.kwargs["hidden_states"]
        return found

    def repeat(self, block: nn.Module, hidden_states: Tensor) -> Tensor:
        """The output of `block` for other hidden states; skips, timestep and text stay as they were."""
        if self.args:
            found: Tensor = block(hidden_states, *self.args[1:], **self.kwargs)
        else:
            found = block(**self.kwargs | {"hidden_states": hidden_states})
        return found


class FrozenPass(NamedTuple):
    """What one pass of the frozen U-Net gives.

    Attributes:
        noise_Bchw: the noise it predicts, eps, in the dtype of the noisy latents.
        calls: of the blocks of `decoder_blocks`.
    """

    noise_Bchw: Tensor
    calls: list[Call]


def decoder_blocks(unet: UNet2DConditionModel) -> list[nn.Module]:
    """The blocks after the encoder, in their order: the middle block, where there is one, and all up blocks."""
    middle = [] if unet.mid_block is None else [unet.mid_block]
    return [*middle, *unet.up_blocks]


@torch.no_grad()
def frozen_pass(backbone: Backbone, noisy_Bchw: Tensor, timesteps_B: Tensor, text_1LW: Tensor) -> FrozenPass:
    """One pass of the backbone's U-Net, without gradients.

    Args:
        noisy_Bchw: x_t, fp32.
        text_1LW: embedding of the text that the U-Net reads.
    """
    calls: list[Call] = []
    with backbone.lock:  # the hooks see every pass, those of other threads too
        handles = [
            block.register_forward_pre_hook(lambda _, args, kwargs: calls.append(Call(args, kwargs)), with_kwargs=True)
            for block in decoder_blocks(backbone.unet)
        ]
        try:
            text = text_1LW.expand(len(noisy_Bchw), -1, -1)
            predicted = backbone.unet(noisy_Bchw.to(backbone.dtype), timesteps_B, text).sample
        finally:
            for handle in handles:
                handle.remove()
    return FrozenPass(as_noise(backbone, predicted.to(noisy_Bchw), noisy_Bchw, timesteps_B), calls)


def as_noise(backbone: Backbone, predicted_Bchw: Tensor, noisy_Bchw: Tensor, timesteps_B: Tensor) -> Tensor:
    """The noise in what the U-Net predicts: eps = sqrt(abar) v + sqrt(1 - abar) x_t (Salimans and Ho, appendix D)."""
    if backbone.prediction_type == "epsilon":
        return predicted_Bchw
    abar_T = backbone.alphas_cumprod
    signal, noise = (at_timesteps(x_T, timesteps_B, noisy_Bchw) for x_T in (abar_T.sqrt(), (1 - abar_T).sqrt()))
    return signal * predicted_Bchw + noise * noisy_Bchw


def at_timesteps(values_T: Tensor, timesteps_B: Tensor, like_Bchw: Tensor) -> Tensor:
    """Values of a schedule at the timesteps, [B, 1, 1, 1] in the dtype of the latents and on their device."""
    return values_T.to(like_Bchw.dtype).to(like_Bchw.device)[timesteps_B][:, None, None, None]


class GradientEstimator(nn.Module):
    """G(x_t, t, z), an estimate of the gradient of log p(z | x_t) in x_t (PDAE).

    Trainable copies of the frozen decoder's blocks read what the frozen encoder gave them, and z scales and shifts
    what each of their residual blocks normalises: h -> (1 + s) GN(h) + b. Scale, shift and the last convolution start
    at zero, so G is 0 before training.

    Args:
        unet: of the backbone; it stays as it is.
        dims: D.
    """

    def __init__(self, unet: UNet2DConditionModel, dims: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(copy.deepcopy(block) for block in decoder_blocks(unet))
        self.norm = copy.deepcopy(unet.conv_norm_out)
        self.out = copy.deepcopy(unet.conv_out)
        width = unet.time_embedding.linear_2.out_features
        self.embed = nn.Linear(dims, width)
        self.modulations = nn.ModuleList(nn.Linear(width, 2 * x.out_channels) for x in self._resnets())
        for parameter in (*self.out.parameters(), *self.modulations.parameters()):
            nn.init.zeros_(parameter)
        self.float().requires_grad_(True)

    def forward(self, calls: Sequence[Call], z_BD: Tensor) -> Tensor:
        """G, float32 [B, c, h, w], for what the frozen blocks were called with."""
        hidden = calls[0].hidden_states
        training = attention_for_training(hidden) if torch.is_grad_enabled() else nullcontext()
        with training, self._modulated(z_BD):
            for call, block in zip(calls, self.blocks, strict=True):
                hidden = call.repeat(block, hidden)
        found: Tensor = self.out(F.silu(self.norm(hidden))).float()
        return found

    def _resnets(self) -> list[ResnetBlock2D]:
        return [module for module in self.blocks.modules() if isinstance(module, ResnetBlock2D)]

    @contextmanager
    def _modulated(self, z_BD: Tensor) -> Iterator[None]:
        """A context in which z scales and shifts the second norm of each residual block, as no timestep does.

        By hooks: the blocks keep the forward of diffusers, and their weights the names.
        """
        embedded = F.silu(self.embed(z_BD))
        handles = [
            resnet.norm2.register_forward_hook(partial(_scale_and_shift, modulation(embedded)))
            for resnet, modulation in zip(self._resnets(), self.modulations, strict=True)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _scale_and_shift(both: Tensor, _module: nn.Module, _args: object, normalised: Tensor) -> Tensor:
    scale, shift = both[:, :, None, None].chunk(2, dim=1)
    return (1 + scale) * normalised + shift
