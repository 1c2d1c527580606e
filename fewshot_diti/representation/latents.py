"""Latents of the images that a representation is learned from, encoded once.

Shapes in names: N images, B batch, c, h, w latents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from fewshot_diti.kept_tensors import keep_tensors, kept_tensors


@dataclass(frozen=True, kw_only=True, eq=False)
class Latents:
    """Scaled latents of images, as the VAE gives them.

    Attributes:
        mean_Nchw, std_Nchw: of the VAE's posterior, on the CPU.

    Raises:
        ValueError: no image, or two different shapes.
    """

    mean_Nchw: Tensor
    std_Nchw: Tensor

    def __post_init__(self) -> None:
        if not len(self.mean_Nchw) or self.mean_Nchw.shape != self.std_Nchw.shape:
            shapes = tuple(self.mean_Nchw.shape), tuple(self.std_Nchw.shape)
            raise ValueError(
                f"Latents with shapes {shapes[0]} and {shapes[1]}; give two of the same, of 1 image or more."
            )

    def __len__(self) -> int:
        return len(self.mean_Nchw)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all values, 16 hex characters."""
        digest = hashlib.sha256(self.mean_Nchw.contiguous().numpy().data)
        digest.update(self.std_Nchw.contiguous().numpy().data)
        return digest.hexdigest()[:16]

    def spread(self, count: int) -> Latents:
        """At most `count` of the images, evenly over all of them."""
        return self.rows(torch.arange(0, len(self), -(-len(self) // count)))

    def draw(self, rows: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
        """Means, which the encoder reads, and a sample of the posterior, which is noised; fp32 [B, c, h, w] each."""
        mean, std = (x[rows].float() for x in (self.mean_Nchw, self.std_Nchw))
        return mean, mean + std * torch.randn(mean.shape, generator=g)

    def rows(self, rows: Tensor) -> Latents:
        """Those at some positions, or where a mask says so."""
        return Latents(mean_Nchw=self.mean_Nchw[rows], std_Nchw=self.std_Nchw[rows])


def kept_latents(cache: Path, made_from: Mapping[str, str], encode: Callable[[], tuple[Tensor, Tensor]]) -> Latents:
    """What `encode` gives, means and standard deviations [N, c, h, w], kept as float16 in a file.

    Args:
        made_from: identifies images and autoencoder; a file that was made from others, or is damaged, is replaced.
    """
    kept = kept_tensors(cache, made_from)
    if kept is not None and kept.keys() == {"mean", "std"} and all(x.isfinite().all() for x in kept.values()):
        return Latents(mean_Nchw=kept["mean"], std_Nchw=kept["std"])
    mean, std = (x.half().contiguous() for x in encode())
    keep_tensors(cache, {"mean": mean, "std": std}, made_from)
    return Latents(mean_Nchw=mean, std_Nchw=std)
