"""Sizes of the backbones by arithmetic on their published settings, without a download: parameters, memory, work.

python -m eval.sizes
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from eval.speed.full_size import SD2_UNET
from fewshot_diti.backbone import Backbone
from fewshot_diti.cost import training_evaluations
from fewshot_diti.evaluation.table import rich_lines
from fewshot_diti.lora import Layout, find_targets
from fewshot_diti.presets import PRESETS, PUBLISHED_SHOTS, Kind, recommended

SD1_UNET = {"sample_size": 64, "cross_attention_dim": 768}
# of the text encoders of stable-diffusion-v1-5 and stable-diffusion-2-base; what is not here is transformers' default
SD1_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
SD2_TEXT = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
SD_VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4}


class Networks(NamedTuple):
    """What a size is counted of; any object with these three, such as a `Backbone`, will do."""

    vae: nn.Module
    text_encoder: nn.Module
    unet: nn.Module


def stable_diffusion(unet: dict[str, Any], text: dict[str, Any]) -> Networks:
    """A Stable Diffusion of these settings, without memory for its weights."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        text_encoder = CLIPTextModel(CLIPTextConfig(vocab_size=49408, **text))
        return Networks(AutoencoderKL(**blocks, **SD_VAE), text_encoder, UNet2DConditionModel(**unet))


def gflop(unet: Any, height: int, width: int) -> float:
    """GFLOP of one evaluation of a latent of this size, counted without computing."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
        latents = torch.empty(1, unet.config.in_channels, height, width)
        unet.to("meta")(latents, torch.empty(1), torch.empty(1, 77, unet.config.cross_attention_dim))
    return float(counter.get_total_flops()) / 1e9


def sizes(networks: Networks, kind: Kind, height: int, width: int) -> list[str]:
    """Millions of parameters, GB of weights, MB of a class token at 16 shots, GFLOP of an evaluation."""
    vae, text, unet = (sum(p.numel() for p in network.parameters()) for network in networks)
    training = recommended(16, kind).training
    targets = find_targets(networks.unet, networks.text_encoder, training.blocks)
    token = Layout(targets, training.rank).num_parameters
    return [
        f"{unet / 1e6:.0f}",
        f"{text / 1e6:.0f}",
        f"{vae / 1e6:.0f}",
        f"{(2 * (unet + text) + 4 * vae) / 1e9:.2f}",
        f"{4 * token / 1e6:.1f}",
        f"{gflop(networks.unet, height, width):.3g}",
    ]


def main() -> None:
    """Prints two tables."""
    pocket = Backbone.from_pretrained(dtype="float32", device="cpu")
    rows = [
        ["pocket, 128 x 64", *sizes(Networks(pocket.vae, pocket.text_encoder, pocket.unet), "pocket", 8, 16)],
        ["SD 1.5, 512 x 512", *sizes(stable_diffusion(SD1_UNET, SD1_TEXT), "stable-diffusion", 64, 64)],
        ["SD 2.0, 512 x 512", *sizes(stable_diffusion(SD2_UNET, SD2_TEXT), "stable-diffusion", 64, 64)],
    ]
    head = ["backbone", "U-Net", "text", "VAE", "weights, GB", "class, MB", "GFLOP"]
    caption = (
        "millions of parameters; GB of weights with U-Net and text encoder in 16 bits and the VAE in 32; MB of a class "
        "token in its file at 16 shots; GFLOP of an evaluation"
    )
    console = Console()
    console.print(rich_lines(head, rows, caption))
    lines = []
    for kind in PRESETS:
        settings = [recommended(k, kind) for k in PUBLISHED_SHOTS]
        lines.append([kind, *(f"{training_evaluations(s.training, s.scoring, 0, 1)}" for s in settings)])
    head = ["preset", *(f"{k} shots" for k in PUBLISHED_SHOTS)]
    console.print(rich_lines(head, lines, "evaluations of training one class, and of the prior images of all"))


if __name__ == "__main__":
    main()
