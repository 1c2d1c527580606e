"""The networks of the pocket Stable Diffusion, untrained, and what pre-training adds to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fewshot_diti.attention import attention_for_training
from fewshot_diti.presets import PRESETS
from recipes.pocket.latents import image_size

FEATURES = PRESETS["pocket"].features


@contextmanager
def features_kept(unet: UNet2DConditionModel) -> Iterator[list[Tensor]]:
    """What the block that features are taken from gives, [B, c, h, w] of every pass inside the context."""
    kept: list[Tensor] = []
    block = unet.up_blocks[-FEATURES.block]
    handle = block.register_forward_hook(lambda _, __, output: kept.append(output))
    try:
        yield kept
    finally:
        handle.remove()


class TextToNoise(nn.Module):
    """Text encoder and U-Net in one forward, so that data-parallel wrappers see one call.

    Args:
        num_variants: that a linear head tells apart by the mean of the features; 0: no head, and logits are None.
    """

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel, num_variants: int = 0) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder
        self.head: nn.Module | None = None
        if num_variants:
            width = unet.config.block_out_channels[FEATURES.block - 1]
            self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_variants))

    def forward(self, noisy: Tensor, timesteps: Tensor, input_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        with attention_for_training(noisy), features_kept(self.unet) as kept:
            text = self.text_encoder(input_ids).last_hidden_state
            predicted = self.unet(noisy, timesteps, text).sample
        return predicted, None if self.head is None else self.head(kept[0].mean((2, 3)))


def build_scheduler(prediction_type: str) -> DDIMScheduler:
    """Stable Diffusion's own noise schedule."""
    return DDIMScheduler(
        prediction_type=prediction_type,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def build_text_encoder(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextModel:
    """An untrained CLIP text encoder for the tokenizer."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=max(1, width // 64),
            max_position_embeddings=tokenizer.model_max_length,
            hidden_act="gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_unet(
    vae: AutoencoderKL,
    text_width: int,
    *,
    block_out_channels: Sequence[int],
    layers_per_block: int,
    norm_num_groups: int,
    head_size: int,
) -> UNet2DConditionModel:
    """An untrained U-Net with Stable Diffusion's four levels, sized for the autoencoder's latents."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    height, width = image_size(vae)
    return UNet2DConditionModel(
        sample_size=(height // factor, width // factor),
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        block_out_channels=tuple(block_out_channels),
        layers_per_block=layers_per_block,
        cross_attention_dim=text_width,
        # diffusers' name; on Stable Diffusion's U-Nets it counts heads
        attention_head_dim=tuple(c // head_size for c in block_out_channels),
        norm_num_groups=norm_num_groups,
        use_linear_projection=True,
    )
