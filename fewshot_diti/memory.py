"""Batches that memory is too small for."""

from __future__ import annotations

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
