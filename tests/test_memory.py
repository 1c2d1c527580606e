"""Freed memory is kept for the next tensor."""

from __future__ import annotations

import os
import platform
from typing import Any

import pytest
import torch

from fewshot_diti import memory
from fewshot_diti.memory import keep_freed_pages, return_freed_pages


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep pages")
def test_the_pages_of_a_freed_tensor_serve_the_next_until_they_are_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    keep_freed_pages()
    size = 64 * 2**20
    pages = size // os.sysconf("SC_PAGE_SIZE")

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(size // 4)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    assert min(faults() for _ in range(8)) < 0.1 * pages  # the first need pages, and alignment may ask for a few more
    return_freed_pages()
    assert faults() > 0.5 * pages


def test_where_large_blocks_are_refused_nothing_else_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any threshold that is set ends glibc's own adjustment of the others."""
    asked: list[tuple[Any, ...]] = []
    for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(memory, "_glibc", lambda *call: asked.append(call) or 0)
    keep_freed_pages()
    assert asked == [("mallopt", -3, 2**28)]
