"""Trials: timesteps, and noise that depends on (seed, image id, trial number) alone.

Batches, order, shards and resuming cannot change a trial. Shapes in names: S trials, T timesteps of the schedule.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def stream(*key: object) -> np.random.Generator:
    """A counter-based random stream named by its key (Philox; Salmon et al., SC 2011)."""
    digest = hashlib.sha256("\0".join(map(repr, key)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], np.uint64)))


def torch_generator(*key: object) -> torch.Generator:
    """A torch generator seeded by its key."""
    return torch.Generator().manual_seed(int(stream(*key).integers(2**62)))


def trial_noise(seed: int, image_id: str, trials: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise [trials, *shape], fp32, of the given trial numbers of one image."""
    noise = np.stack([stream(seed, image_id, int(t)).standard_normal(shape, np.float32) for t in trials])
    return torch.from_numpy(noise)


def even_grid(num_trials: int, lo: int, hi: int) -> Tensor:
    """Timesteps of `num_trials` trials, evenly spaced inside [lo, hi): midpoints of equal parts, int64 [S].

    The same on every machine. even_grid(500, 0, 1000) is the published 1, 3, .., 999. More trials than timesteps
    repeat timesteps (with other noise). ValueError unless num_trials >= 1 and 0 <= lo < hi.
    """
    if num_trials < 1 or not 0 <= lo < hi:
        raise ValueError(f"no grid of {num_trials} trials in [{lo}, {hi}); num_trials >= 1 and 0 <= lo < hi")
    return lo + (2 * torch.arange(num_trials) + 1) * (hi - lo) // (2 * num_trials)


def drawn_grid(density_T: Tensor, num_trials: int) -> Tensor:
    """Timesteps of `num_trials` trials, stratified: the density's quantiles at midpoints of equal parts, int64 [S].

    The inverse CDF, so that an even density gives `even_grid`. Ascending. ValueError: num_trials below 1.
    """
    if num_trials < 1:
        raise ValueError(f"no grid of {num_trials} trials; num_trials >= 1")
    cdf_T = density_T.double().cumsum(0)
    quantiles = (2 * torch.arange(num_trials, dtype=torch.float64) + 1) / (2 * num_trials) * cdf_T[-1].cpu()
    # a quantile at the end of a timestep's share belongs to the next one, whatever the sum was rounded to
    return torch.searchsorted(cdf_T.cpu(), quantiles * (1 + 1e-9), right=True)
