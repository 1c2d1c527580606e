"""Latents of the pre-training images, encoded once and kept in a file."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor

from fewshot_diti.hashes import hash_weights
from fewshot_diti.kept_tensors import keep_tensors, kept_tensors
from recipes.pocket.renders import Renders, false_colour_copy, random_crops


def image_size(vae: AutoencoderKL) -> tuple[int, int]:
    """(height, width) in pixels; Stable Diffusion's own autoencoders hold one number for both."""
    size = vae.config.sample_size
    return (size, size) if isinstance(size, int) else tuple(size)


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, pixels_NCHW: Tensor, accelerator: Accelerator) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents of uint8 images, fp16 [images, c, h, w] each."""
    means, stds = [], []
    vae = vae.to(accelerator.device, memory_format=torch.channels_last)
    for batch in pixels_NCHW.split(64):
        with accelerator.autocast():
            posterior = vae.encode(batch.to(accelerator.device).float() / 127.5 - 1).latent_dist
        means.append((posterior.mean * vae.config.scaling_factor).half().cpu().contiguous())
        stds.append((posterior.std * vae.config.scaling_factor).half().cpu().contiguous())
    return torch.cat(means), torch.cat(stds)


def cached_latents(
    vae: AutoencoderKL,
    renders: Renders,
    false_copies: int,
    accelerator: Accelerator,
    cache: Path,
    crops: tuple[float, float] = (0.0, 0.0),
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every render's latents, fp16 [1 + false_copies, images, c, h, w].

    The first of the leading axis is the image as it is, the others have shuffled colours, and are cropped by
    `random_crops` with this zoom and shift. Each is kept in a file of its own beside `cache`, so that an encoding that
    was cut short goes on; a file made by another autoencoder or of other images is replaced.
    """
    made_from = {"autoencoder": hash_weights(vae), "images": renders.fingerprint, "false_copies": str(false_copies)}
    if any(crops):
        made_from["crops"] = str(crops)
    means, stds = [], []
    for version in range(1 + false_copies):
        file = cache.with_name(f"{cache.stem}-{version}{cache.suffix}")
        if (kept := kept_tensors(file, made_from)) is None:
            images = renders.pixels_NCHW if version == 0 else false_colour_copy(renders, version - 1)
            if any(crops) and version:
                g = torch.Generator().manual_seed(version)
                for rows in torch.arange(len(images)).split(256):
                    images[rows] = random_crops(images[rows].float(), *crops, g).round().byte()
            mean, std = encode_latents(vae, images, accelerator)
            kept = {"mean": mean, "std": std}
            if accelerator.is_main_process:
                keep_tensors(file, kept, made_from)
        means.append(kept["mean"])
        stds.append(kept["std"])
    return torch.stack(means), torch.stack(stds)
