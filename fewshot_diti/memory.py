"""Batches that memory is too small for, what has been used, and pages that are kept."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

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


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # man 3 mallopt


def keep_freed_pages() -> None:
    """Tells glibc to keep freed memory for the next tensor.

    That is blocks of up to 256 MB: of these 1 GB at the end of the heap and, without a bound, all below memory in use.
    Other threads than the main one keep smaller blocks.

    By itself it hands back blocks of 32 MB at once, and the system clears each page anew: half of the time of a wide
    linear on a batch of 96. Nothing is done with another C library, with an old glibc that refuses blocks of this size,
    or where the environment says what to do.
    """
    if any(x in os.environ for x in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")):
        return
    if _glibc("mallopt", _M_MMAP_THRESHOLD, 2**28):
        _glibc("mallopt", _M_TRIM_THRESHOLD, 2**30)


def return_freed_pages() -> None:
    """The opposite, once: what is free goes back to the system, so that what is in use can be told."""
    _glibc("malloc_trim", 0)


def _glibc(function: str, *arguments: int) -> int:
    """What a function of glibc's own returns; 0, its word for failure, where there is none."""
    found: Any = getattr(ctypes.CDLL(None), function, None) if sys.platform == "linux" else None
    return found(*arguments) if found is not None else 0
