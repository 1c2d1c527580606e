"""How far apart classes are in the latents: the size d of the smallest edit between two classes, for the weights `tif`.

Source: TiF (Yue et al., CVPR 2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

DISTANCE_PERCENTILE = 0.1
PAIRS_IN_MEMORY = 2**24  # float64 distances held at once, 128 MiB


def attribute_distance(latents_NCHW: Tensor, labels_N: Tensor) -> float:
    """d of `tif`: the size of the smallest edit that turns a shot of one class into a shot of another.

    sqrt(sum over latent positions of the 0.1th percentile of the squared distance over channels, between shots of
    different classes). `latents_NCHW`: VAE means times the scaling factor; `labels_N`: integers. Each pair counts once.
    Holds about 128 MiB at a time, or one position's N x N pairs where those are more. ValueError with one class only.
    """
    apart_NN = _different_classes(latents_NCHW, labels_N).triu()
    return _summed_percentiles(latents_NCHW, lambda squared_PNN: squared_PNN[:, apart_NN])


def attribute_distance_released(latents_NCHW: Tensor, labels_N: Tensor) -> float:
    """d of `tif_released`, as TiF's published code takes it; like `attribute_distance`, with another percentile.

    The percentile is over all ordered pairs, an image with itself included, and the squared distance of pairs of one
    class is set to 100 instead of left out, so that d grows with the shots of a class.
    """
    same_NN = ~_different_classes(latents_NCHW, labels_N)
    return _summed_percentiles(latents_NCHW, lambda squared_PNN: squared_PNN.masked_fill(same_NN, 100.0).flatten(1))


def _different_classes(latents_NCHW: Tensor, labels_N: Tensor) -> Tensor:
    if latents_NCHW.ndim != 4 or labels_N.shape != latents_NCHW.shape[:1]:
        raise ValueError(
            f"latents {tuple(latents_NCHW.shape)} and labels {tuple(labels_N.shape)}; give [N, C, H, W] and [N]"
        )
    labels_N = labels_N.to(latents_NCHW.device)
    different_NN = labels_N[:, None] != labels_N
    if not different_NN.any():
        raise ValueError(f"all {len(labels_N)} shots are of one class; a distance between classes needs two or more")
    return different_NN


def _summed_percentiles(latents_NCHW: Tensor, pairs: Callable[[Tensor], Tensor]) -> float:
    total = 0.0
    for squared_PNN in _squared_distances(latents_NCHW):
        squared_PM = pairs(squared_PNN)
        rank = DISTANCE_PERCENTILE / 100 * (squared_PM.shape[1] - 1)
        # the few smallest are found on the latents' own device; numpy's percentile, on the CPU, takes far longer
        smallest_PK = squared_PM.topk(min(int(rank) + 2, squared_PM.shape[1]), largest=False).values
        below_P, above_P = smallest_PK[:, int(rank)], smallest_PK[:, -1]
        total += torch.lerp(below_P, above_P, rank % 1).sum().item()
    return math.sqrt(total)


def _squared_distances(latents_NCHW: Tensor) -> Iterator[Tensor]:
    positions_PNC = latents_NCHW.double().flatten(2).permute(2, 0, 1).contiguous()
    for chunk_PNC in positions_PNC.split(max(1, PAIRS_IN_MEMORY // len(latents_NCHW) ** 2)):
        # Not by matrix multiplication: |a|^2 + |b|^2 - 2 a b loses the smallest distances, the ones asked for.
        yield torch.cdist(chunk_PNC, chunk_PNC, compute_mode="donot_use_mm_for_euclid_dist").square()
