"""Batches that memory is too small for, and what has been used."""

from __future__ import annotations

import sys

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size


def halved(size: int, error: RuntimeError) -> int:
    """What to try after a batch of `size` ended in `error`: half of it.

    Raises:
        RuntimeError: `error`, where it is not about memory or the batch cannot be halved.
    """
    if size == 1 or not should_reduce_batch_size(error):
        raise error
    clear_device_cache()
    return size // 2


def peak_memory(device: torch.device) -> int | None:
    """Bytes: of this process so far, or on a GPU of its tensors since the last reset; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
