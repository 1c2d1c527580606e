"""Freed memory is kept for the next tensor."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import pytest
import torch

from fewshot_diti import memory
from fewshot_diti.memory import keep_freed_pages, return_freed_pages

ENVIRONMENT = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep pages")
@pytest.mark.skipif(HUGE.exists() and "[always]" in HUGE.read_text(), reason="huge pages: too few faults to count")
@pytest.mark.skipif("GLIBC_TUNABLES" in os.environ, reason="glibc has read GLIBC_TUNABLES and keeps what it likes")
def test_the_pages_of_a_freed_tensor_serve_the_next_until_they_are_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    for name in ENVIRONMENT:
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
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(memory, "_glibc", lambda *call: asked.append(call) or 0)
    keep_freed_pages()
    assert asked == [("mallopt", -3, 2**28)]


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_what_the_environment_says_of_memory_stands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setenv(name, "1")
    monkeypatch.setattr(memory, "_glibc", lambda *call: asked.append(call) or 1)
    keep_freed_pages()
    assert not asked
