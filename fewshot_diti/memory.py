"""Memory: smaller batches where it runs out, the peak in use, and freed pages that are kept for the next tensor."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size


def halved(size: int, error: RuntimeError) -> int:
    """The batch size to try after a batch of `size` ended in `error`: half of it.

    Raises:
        RuntimeError: `error`, where it is not about memory or the batch cannot be halved.
    """
    if size == 1 or not should_reduce_batch_size(error):
        raise error
    clear_device_cache()
    return size // 2


def peak_memory(device: torch.device) -> int | None:
    """Peak memory in bytes: on CUDA and XPU of the tensors since the last reset, elsewhere of the process so far.

    None on Windows.
    """
    if device.type in ("cuda", "xpu"):
        peak: int = getattr(torch, device.type).max_memory_allocated(device)
        return peak
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # man 3 mallopt


def keep_freed_pages() -> None:
    """Makes glibc keep freed blocks of up to 256 MB for the next tensor.

    By default it returns blocks of 32 MB and more to the system at once, which then clears every page of the next
    block: half of the time of a wide linear on a batch of 96. Kept are 1 GB at the end of the heap, and everything
    below memory that is in use; threads other than the main one keep smaller blocks. Nothing is changed with another C
    library, with an old glibc that refuses such blocks, or where the environment sets these thresholds.
    """
    if any(x in os.environ for x in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")):
        return
    if _glibc("mallopt", _M_MMAP_THRESHOLD, 2**28):
        _glibc("mallopt", _M_TRIM_THRESHOLD, 2**30)


def return_freed_pages() -> None:
    """Returns freed memory to the system once, so that the memory of the process is the memory in use."""
    _glibc("malloc_trim", 0)


def _glibc(function: str, *arguments: int) -> int:
    """The result of a function that only glibc has; 0, which means failure, with another C library."""
    found: Any = getattr(ctypes.CDLL(None), function, None) if sys.platform == "linux" else None
    return found(*arguments) if found is not None else 0
