"""Prior images: what the backbone itself makes of the generic prompt, once, cached on disk, shared by all classes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from accelerate import PartialState
from platformdirs import user_cache_path
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from fewshot_diti.backbone import Backbone
from fewshot_diti.files import write_atomically

_STEPS, _GUIDANCE = 25, 7.5


def prior_latents(
    backbone: Backbone, prompt: str, count: int, size: tuple[int, int], *, seed: int = 0, cache: Path | None = None
) -> Tensor:
    """Scaled latents [count, c, h, w] of images of `prompt`; processes share the work, the cache saves it.

    Args:
        size: (height, width) in pixels.
        cache: folder; by default the user's cache.
    """
    state = PartialState()
    key = repr((backbone.hash, prompt, size, seed, _STEPS, _GUIDANCE))
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    folder = (cache or user_cache_path("fewshot-diti")) / "prior" / name
    todo = [i for i in range(count) if not (folder / f"{i:05d}.safetensors").is_file()]
    mine = todo[state.process_index :: state.num_processes]
    for i in range(0, len(mine), 8):
        part = mine[i : i + 8]
        latents = backbone.generate_latents(
            prompt,
            [seed * 100_003 + p for p in part],
            size=size,
            steps=_STEPS,
            guidance_scale=_GUIDANCE,
            batch_size=8,
        )
        for p, latent in zip(part, latents, strict=True):
            write_atomically(folder / f"{p:05d}.safetensors", save_tensors({"latent": latent.contiguous()}))
    state.wait_for_everyone()
    return torch.stack([load_tensors((folder / f"{i:05d}.safetensors").read_bytes())["latent"] for i in range(count)])
