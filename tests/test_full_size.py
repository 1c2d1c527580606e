"""Stable Diffusion 2.0-base at full size, from its published configs and without its weights."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from threading import RLock
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from fewshot_diti.lora import Layout, adapted, find_targets

BLOCKS = {
    "narrow": ("down_blocks.2", "mid_block", "up_blocks.1"),
    "medium": ("down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.1", "up_blocks.2"),
    "all": (*(f"down_blocks.{i}" for i in range(3)), "mid_block", *(f"up_blocks.{i}" for i in range(1, 4))),
}


def config(name: str) -> dict[str, Any]:
    fields = json.loads((Path(__file__).parent / "configs" / f"{name}.json").read_text())
    return {k: v for k, v in fields.items() if k not in ("source", "torch_dtype")}


@pytest.fixture(scope="module")
def unet() -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(config("sd2_unet"))


@pytest.fixture(scope="module")
def text_encoder() -> CLIPTextModel:
    with torch.device("meta"):
        return CLIPTextModel(CLIPTextConfig(**config("sd2_text_encoder")))


def published_unet_names(blocks: str) -> set[str]:
    """Attention blocks of each part: two going down, one in the middle, three going up."""
    names = set()
    for block in BLOCKS[blocks]:
        for i in range({"d": 2, "m": 1, "u": 3}[block[0]]):
            transformer = f"{block}.attentions.{i}.transformer_blocks.0"
            names |= {
                f"{transformer}.{attention}.{linear}"
                for attention in ("attn1", "attn2")
                for linear in ("to_q", "to_k", "to_v", "to_out.0")
            }
            names.add(f"{transformer}.ff.net.0.proj")
    return names


@pytest.mark.parametrize(
    ("blocks", "count", "unet_parameters"),
    [("narrow", 54, 3_022_848), ("medium", 99, 4_364_288), ("all", 144, 5_116_928)],
)
def test_lora_lands_on_the_published_modules(
    unet: UNet2DConditionModel, text_encoder: CLIPTextModel, blocks: str, count: int, unet_parameters: int
) -> None:
    targets = find_targets(unet, text_encoder, blocks)
    in_unet = [t for t in targets if t.network == "unet"]
    in_text = [t for t in targets if t.network == "text_encoder"]
    assert {t.name for t in in_unet} == published_unet_names(blocks)
    assert {t.name for t in in_text} == {
        f"encoder.layers.{i}.self_attn.{p}_proj" for i in range(23) for p in ("q", "k", "v", "out")
    }
    assert (len(in_unet), len(in_text)) == (count, 92)
    assert Layout(tuple(in_unet), 16).num_parameters == unet_parameters
    assert Layout(tuple(in_text), 16).num_parameters == 92 * 16 * 2 * 1024


def test_an_evaluation_at_512_pixels_takes_804_gflop(unet: UNet2DConditionModel) -> None:
    """A multiplication and an addition count as two; convolutions, linears and attention's two products are counted."""
    assert sum(p.numel() for p in unet.parameters()) == 865_910_724
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), torch.device("meta"):
        unet(torch.empty(1, 4, 64, 64), torch.empty(1, dtype=torch.long), torch.empty(1, 77, 1024))
    assert counter.get_total_flops() == pytest.approx(804e9, rel=0.01)


def test_the_full_unet_runs_forward_and_backward_with_adapters_of_two_classes(
    unet: UNet2DConditionModel, text_encoder: CLIPTextModel
) -> None:
    """At 64 pixels, so latents of 8 x 8; 3.5 GB of random weights."""
    layout = Layout(find_targets(unet, text_encoder), 4)
    unet = unet.to_empty(device="cpu").requires_grad_(False)
    for name, p in unet.named_parameters():
        # matrices keep the scale of what passes through them, norms start as the identity
        if p.ndim > 1:
            p.uniform_(-1, 1).mul_((3 / p[0].numel()) ** 0.5)
        else:
            p.fill_(1.0 if name.endswith("weight") else 0.0)
    g = torch.Generator().manual_seed(0)
    rows = torch.stack([layout.initial_row(g) for _ in range(2)]).requires_grad_()
    networks = SimpleNamespace(networks={"unet": unet, "text_encoder": text_encoder}, lock=RLock())
    latents, text = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 77, 1024, generator=g)
    with adapted(networks, layout, rows):
        out = unet(latents, torch.tensor([10, 500]), text).sample
    out[0].square().mean().backward()
    assert out.isfinite().all()
    assert rows.grad is not None
    for target, (_, b) in layout.split(rows.grad).items():
        assert b[0].any() == (target.network == "unet"), target
    assert not rows.grad[1].any(), "the class of the other sample"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 8 * 2**20
