"""Prior images: what the backbone itself makes of the generic prompt, once, cached on disk, shared by all classes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from platformdirs import user_cache_path
from torch import Tensor

from fewshot_diti.backbone import Backbone
from fewshot_diti.distributed import process_state
from fewshot_diti.kept_tensors import keep_tensors, kept_tensors
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
    shape = backbone.latent_channels, *(side // backbone.vae_scale_factor for side in size)
    todo = [i for i in mine if _kept(folder, i, shape) is None]
    bar = Progress(len(todo), "prior images", "image")
    for i in range(0, len(todo), _BATCH):
        part = todo[i : i + _BATCH]
        latents = backbone.generate_latents(prompt, part, size=size, steps=_STEPS, guidance_scale=_GUIDANCE)
        for p, latent in zip(part, latents, strict=True):
            keep_tensors(_file(folder, p), {"latent": latent}, {})
        bar.update(len(part))
    bar.close()
    state.wait_for_everyone()
    kept = [_kept(folder, i, shape) for i in range(count)]
    if damaged := [str(_file(folder, i)) for i, latent in enumerate(kept) if latent is None]:
        raise ValueError(f"{damaged[0]} was changed or cut short while it was in use; start again.")
    return torch.stack([latent for latent in kept if latent is not None])


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def _kept(folder: Path, number: int, shape: tuple[int, ...]) -> Tensor | None:
    """A prior image's latent, None where it is not there, whole and finite; it is to be made again then."""
    latent = (kept_tensors(_file(folder, number), {}) or {}).get("latent")
    whole = latent is not None and latent.dtype == torch.float32 and latent.shape == shape and latent.isfinite().all()
    return latent if whole else None
