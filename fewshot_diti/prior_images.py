"""Prior images: what the backbone itself makes of the generic prompt, once, cached on disk, shared by all classes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from platformdirs import user_cache_path
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from fewshot_diti.backbone import Backbone
from fewshot_diti.distributed import process_state
from fewshot_diti.files import write_atomically
from fewshot_diti.progress import Progress

_STEPS, _GUIDANCE = 25, 7.5
_BATCH = 8


def prior_latents(
    backbone: Backbone, prompt: str, count: int, size: tuple[int, int], *, cache: Path | None = None
) -> Tensor:
    """Scaled latents [count, c, h, w] of images of `prompt`; processes share the work, the cache saves it.

    Args:
        size: (height, width) in pixels.
        cache: folder that all processes see; by default the user's cache.
    """
    state = process_state()
    key = repr((backbone.hash, backbone.dtype, prompt, size, _STEPS, _GUIDANCE))
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    folder = (cache or user_cache_path("fewshot-diti")) / "prior" / name
    # shared out before anyone looks for what is there: another process may be writing already
    mine = range(state.process_index, count, state.num_processes)
    todo = [i for i in mine if _kept(folder, i) is None]
    bar = Progress(len(todo), "prior images", "image")
    for i in range(0, len(todo), _BATCH):
        part = todo[i : i + _BATCH]
        latents = backbone.generate_latents(prompt, part, size=size, steps=_STEPS, guidance_scale=_GUIDANCE)
        for p, latent in zip(part, latents, strict=True):
            write_atomically(folder / f"{p:05d}.safetensors", save_tensors({"latent": latent.contiguous()}))
        bar.update(len(part))
    bar.close()
    state.wait_for_everyone()
    return torch.stack([load_tensors((folder / f"{i:05d}.safetensors").read_bytes())["latent"] for i in range(count)])


def _kept(folder: Path, number: int) -> Tensor | None:
    """A prior image's latent; None where the file is missing or cannot be read, and is to be made again."""
    try:
        return load_tensors((folder / f"{number:05d}.safetensors").read_bytes())["latent"]
    except (OSError, SafetensorError, KeyError):
        return None
