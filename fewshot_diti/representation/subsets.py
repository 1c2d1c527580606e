"""Which dimensions of a feature belong to which timesteps (Yue et al., DiTi, ICLR 2024).

The timesteps are cut into s subsets of equal length, i(t) = floor(s t / T), counted from 0; each has dimensions of its
own, the first dimensions those of the smallest timesteps.

Shapes in names: B batch, D width of the feature, T timesteps of the schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from fewshot_diti.timesteps import snr

Stages = Literal["published", "snr", "loss", "even"]

NUM_SUBSETS = 64
PUBLISHED_ENDS = (50, 100, 300, 500, 1000)
PUBLISHED_DIMS = (10, 25, 327, 100, 50)


@dataclass(frozen=True, kw_only=True)
class Subsets:
    """Dimensions by timestep.

    Attributes:
        sizes: number of dimensions of each subset, from small timesteps to large ones.
        num_timesteps: T.

    Raises:
        ValueError: no subset, more subsets than timesteps, or an empty one.
    """

    sizes: tuple[int, ...]
    num_timesteps: int

    def __post_init__(self) -> None:
        if not 1 <= len(self.sizes) <= self.num_timesteps or min(self.sizes) < 1:
            raise ValueError(
                f"Sizes {self.sizes} of subsets of {self.num_timesteps} timesteps; pass 1 to {self.num_timesteps} "
                "sizes of at least 1."
            )

    @property
    def dims(self) -> int:
        """D."""
        return sum(self.sizes)

    @cached_property
    def subset_of_dim_D(self) -> Tensor:
        """The subset that each dimension belongs to, int64 [D]."""
        return torch.arange(len(self.sizes)).repeat_interleave(torch.tensor(self.sizes))

    def subset_of(self, timesteps_B: Tensor) -> Tensor:
        """i(t) of each timestep, int64 [B]."""
        return timesteps_B * len(self.sizes) // self.num_timesteps

    def own(self, timesteps_B: Tensor) -> Tensor:
        """K, the dimensions of the timestep's own subset, bool [B, D]."""
        return self.subset_of_dim_D.to(timesteps_B.device) == self.subset_of(timesteps_B)[:, None]

    def earlier(self, timesteps_B: Tensor) -> Tensor:
        """R, the dimensions of the subsets of smaller timesteps, bool [B, D]."""
        return self.subset_of_dim_D.to(timesteps_B.device) < self.subset_of(timesteps_B)[:, None]

    def band(self, start: int, end: int) -> slice:
        """The dimensions of the subsets that begin at timesteps start <= t < end.

        Raises:
            ValueError: no subset begins there.
        """
        first = _first_timesteps(len(self.sizes), self.num_timesteps)
        inside = [i for i, t in enumerate(first) if start <= t < end]
        if not inside:
            raise ValueError(
                f"No subset begins at a timestep of [{start}, {end}); subsets begin at {', '.join(map(str, first))}."
            )
        return slice(sum(self.sizes[: inside[0]]), sum(self.sizes[: inside[-1] + 1]))


def sizes_of_stages(
    num_timesteps: int, ends: Sequence[int] = PUBLISHED_ENDS, dims: Sequence[int] = PUBLISHED_DIMS
) -> tuple[int, ...]:
    """Sizes of the published 64 subsets: each stage shares its dimensions evenly, its last subset takes the rest.

    A subset belongs to the stage of its first timestep.

    Args:
        ends: timestep at which each stage ends.
        dims: of each stage.

    Raises:
        ValueError: a stage has fewer dimensions than subsets, or none of these.
    """
    first = _first_timesteps(NUM_SUBSETS, num_timesteps)
    sizes: list[int] = []
    for start, end, width in zip((0, *ends), ends, dims, strict=False):
        count = sum(start <= t < end for t in first)
        if not 1 <= count <= width:
            raise ValueError(
                f"The stage of timesteps [{start}, {end}) has {width} dimensions for {count} subsets; pass other ends."
            )
        sizes += [width // count] * (count - 1) + [width - width // count * (count - 1)]
    return tuple(sizes)


def ends_of_equal_snr(alphas_cumprod: Tensor) -> tuple[int, ...]:
    """Timesteps of a schedule [T] with the signal-to-noise ratios that the published one has at the published ends.

    That one has linear betas from 1e-4 to 0.02. The last end is the end of the schedule.
    """
    published = snr((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)).log()
    own = snr(alphas_cumprod).log().cpu()
    return (*(int((own - published[end]).abs().argmin()) for end in PUBLISHED_ENDS[:-1]), len(own))


def sizes_by_loss(dims: int, loss_T: Tensor) -> tuple[int, ...]:
    """Sizes of 64 subsets in proportion to the loss over their timesteps, at least 1 each (Sainte-Lague's method).

    Args:
        dims: D.
        loss_T: the backbone's weighted error at each timestep.

    Raises:
        ValueError: fewer dimensions than subsets.
    """
    if dims < NUM_SUBSETS:
        raise ValueError(f"{dims} dimensions for {NUM_SUBSETS} subsets; pass {NUM_SUBSETS} or more.")
    subset_T = torch.arange(len(loss_T)) * NUM_SUBSETS // len(loss_T)
    shares = torch.zeros(NUM_SUBSETS, dtype=torch.float64).index_add_(0, subset_T, loss_T.double().cpu())
    sizes = torch.ones(NUM_SUBSETS, dtype=torch.int64)
    for _ in range(dims - NUM_SUBSETS):
        sizes[(shares / (sizes + 0.5)).argmax()] += 1
    return tuple(sizes.tolist())


def even_sizes(dims: int) -> tuple[int, ...]:
    """Sizes of 64 subsets of equal size, "balanced" as published.

    Raises:
        ValueError: 64 does not divide the dimensions.
    """
    if dims < 1 or dims % NUM_SUBSETS:
        raise ValueError(f"{dims} dimensions are not {NUM_SUBSETS} subsets of equal size; pass a multiple of it.")
    return (dims // NUM_SUBSETS,) * NUM_SUBSETS


def _first_timesteps(num_subsets: int, num_timesteps: int) -> list[int]:
    """The smallest t of each subset."""
    return [-(-i * num_timesteps // num_subsets) for i in range(num_subsets)]
