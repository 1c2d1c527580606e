"""Latents of the images that a representation is learned from, encoded once.

Shapes in names: N images, V views, B batch, c, h, w latents.
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
        views_NVchw: means of versions of each image, for methods that compare these (`simclr.views_of`).

    Raises:
        ValueError: no image, two different shapes, or views of another number of images.
    """

    mean_Nchw: Tensor
    std_Nchw: Tensor
    views_NVchw: Tensor | None = None

    def __post_init__(self) -> None:
        if not len(self.mean_Nchw) or self.mean_Nchw.shape != self.std_Nchw.shape:
            shapes = tuple(self.mean_Nchw.shape), tuple(self.std_Nchw.shape)
            raise ValueError(
                f"Latents with shapes {shapes[0]} and {shapes[1]}; give two of the same, of 1 image or more."
            )
        if self.views_NVchw is not None and len(self.views_NVchw) != len(self):
            raise ValueError(f"Views of {len(self.views_NVchw)} images beside latents of {len(self)}; give the same.")

    def __len__(self) -> int:
        return len(self.mean_Nchw)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all values, 16 hex characters."""
        digest = hashlib.sha256(self.mean_Nchw.contiguous().numpy().data)
        digest.update(self.std_Nchw.contiguous().numpy().data)
        if self.views_NVchw is not None:
            digest.update(self.views_NVchw.contiguous().numpy().data)
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
        views = None if self.views_NVchw is None else self.views_NVchw[rows]
        return Latents(mean_Nchw=self.mean_Nchw[rows], std_Nchw=self.std_Nchw[rows], views_NVchw=views)


def kept_latents(cache: Path, made_from: Mapping[str, str], encode: Callable[[], dict[str, Tensor]]) -> Latents:
    """What `encode` gives, kept as float16 in a file: the fields of `Latents` without their shapes.

    Args:
        made_from: identifies images and autoencoder; a file that was made from others, or is damaged, is replaced.
    """
    kept = kept_tensors(cache, made_from)
    if kept is None or not {"mean", "std"} <= kept.keys() or not all(x.isfinite().all() for x in kept.values()):
        kept = {name: tensor.half().contiguous() for name, tensor in encode().items()}
        keep_tensors(cache, kept, made_from)
    return Latents(mean_Nchw=kept["mean"], std_Nchw=kept["std"], views_NVchw=kept.get("views"))
