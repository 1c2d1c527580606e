"""Noise that depends on (seed, image id, trial number) alone: batches, order, shards and resuming cannot change it."""

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
