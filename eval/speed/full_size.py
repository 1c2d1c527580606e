"""Stable Diffusion 2.0's U-Net at full size with random weights: what it costs, without a download."""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from fewshot_diti.backbone import Backbone
from fewshot_diti.bank import Bank, ClassToken
from fewshot_diti.data.images import ImageGeometry
from fewshot_diti.lora import Layout, find_targets
from fewshot_diti.memory import peak_memory
from fewshot_diti.racing import racing
from fewshot_diti.scoring import Scorer, decide
from fewshot_diti.trials import even_grid

# stabilityai/stable-diffusion-2-base, unet/config.json; what is not here is diffusers' default
SD2_UNET = {
    "sample_size": 64,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}


def gflop_of_an_evaluation(size: int = 512) -> float:
    """GFLOP of one sample through the U-Net at `size` pixels, counted without computing."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD2_UNET)
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            side = size // 8
            unet(torch.empty(1, 4, side, side), torch.empty(1, dtype=torch.long), torch.empty(1, 77, 1024))
    return float(counter.get_total_flops()) / 1e9


def random_backbone() -> Backbone:
    """Stable Diffusion 2.0 with its U-Net at full size, fp32 on the CPU; autoencoder and text encoder are stand-ins."""
    torch.manual_seed(0)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD2_UNET)
    unet = unet.to_empty(device="cpu")
    for name, p in unet.named_parameters():
        if p.ndim > 1:  # matrices keep the scale of the activations
            nn.init.normal_(p, std=p[0].numel() ** -0.5)
        else:
            nn.init.constant_(p, float(name.endswith("weight")))
    tokenizer = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[], model_max_length=77)
    text = CLIPTextConfig(
        vocab_size=2,
        hidden_size=1024,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=16,
        eos_token_id=1,
    )
    return Backbone(
        name="random Stable Diffusion 2.0",
        vae=AutoencoderKL(
            block_out_channels=(32,) * 4,
            latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        ),
        tokenizer=tokenizer,
        text_encoder=CLIPTextModel(text),
        unet=unet,
        scheduler=DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def full_size_round(*, classes: int = 4, trials: int = 4, size: int = 256, rank: int = 16) -> dict[str, Any]:
    """A race of two looks among random class tokens: seconds, and the process's peak memory in GB."""
    backbone = random_backbone()
    layout = Layout(find_targets(backbone.unet, backbone.text_encoder), rank)
    g = torch.Generator().manual_seed(0)
    rows = 0.02 * torch.randn(classes, layout.num_parameters, generator=g)
    tokens = tuple(
        ClassToken(label=c, prompt="", num_shots=1, unet_scale=1.0, text_encoder_scale=1.0) for c in range(classes)
    )
    bank = Bank(
        tokens=tokens,
        layout=layout,
        rows=rows,
        backbone_name=backbone.name,
        backbone_hash=backbone.hash,
        geometry=ImageGeometry(size=(size, size)),
    )
    scorer = Scorer(backbone, bank, batch_size=classes * 2)  # all classes in one batch of the first look
    latents: Tensor = torch.randn(1, 4, size // 8, size // 8, generator=g)
    start = perf_counter()
    grid = even_grid(trials, 0, backbone.num_train_timesteps).tolist()
    found = decide(scorer, latents, ["an image"], grid, torch.ones(trials), racing(trials, confidence=0.9))[0]
    return {
        "classes": classes,
        "evaluations": found.evaluations,
        "size_px": size,
        "seconds": perf_counter() - start,
        "peak_memory_gb": None if (peak := peak_memory(backbone.device)) is None else peak / 2**30,
        "lora_linears": len(layout.targets),
    }
