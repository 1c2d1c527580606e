"""Everything about processes: this one among them, work that they share, and files that let a killed run go on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from torch import Tensor

from fewshot_diti.files import first_in
from fewshot_diti.part_files import Parts, Record, Records

_TIMEOUT = timedelta(days=7)  # processes meet after their whole shares, which may end hours apart

T = TypeVar("T")
P = TypeVar("P")


def process_state() -> PartialState:
    """Rank, number of processes and device; the same object each time.

    `PartialState()` alone takes no notice of ACCELERATE_USE_CPU, nor of `torchrun` on a machine without a GPU: two
    processes on CPUs would each be the only one.
    """
    launched_on_cpus = "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or launched_on_cpus, timeout=_TIMEOUT)


def my_share(count: int) -> list[int]:
    """The positions of 0..count-1 that this process works on."""
    with process_state().split_between_processes(list(range(count))) as mine:
        return list(mine)


def gather(items: Sequence[T]) -> list[T]:
    """The items of all processes, in the order of the processes."""
    process_state()  # else accelerate makes one of its own, which may know of this process alone
    return list(gather_object(list(items)))


def gather_from(compute: Callable[[], Sequence[T]]) -> list[T]:
    """The items that `compute` gives on all processes, in their order.

    Raises:
        Exception: as `compute`, on all processes.
    """
    found: list[T | Exception]
    try:
        found = list(compute())
    except Exception as error:  # the others wait for this process
        found = [error]
    items: list[T] = []
    for item in gather(found):
        if isinstance(item, Exception):
            raise item
        items.append(item)
    return items


def share(count: int, compute: Callable[[list[int]], Tensor], shape: tuple[int, ...]) -> Tensor:
    """What `compute` gives for each of `count` positions, [count, *shape]: each process computes its share, all get
    the whole.

    Raises:
        Exception: as `compute`, on all processes.
    """
    mine = my_share(count)
    parts = gather_from(lambda: [compute(mine)] if mine else [])
    return torch.cat(parts) if parts else torch.empty(0, *shape)


def by_main(compute: Callable[[], T]) -> T:
    """What `compute` gives on the main process; all get it.

    Raises:
        Exception: as `compute`, on all processes.
    """
    return gather_from(lambda: [compute()] if process_state().is_main_process else [])[0]


@contextmanager
def main_alone_in(folder: Path, place: Path) -> Iterator[None]:
    """`files.first_in` for a run of several processes: the main one keeps other runs out."""
    if not process_state().is_main_process:
        yield
        return
    with first_in(folder, place):
        yield


def predict_shared(
    items: Sequence[T],
    read: Callable[[T], P],
    identify: Callable[[P], str],
    predict: Callable[[Sequence[P]], Sequence[Record]],
    folder: Path,
    made_by: str,
    *,
    at_once: int,
    advance: Callable[[], None] = lambda: None,
) -> Records:
    """What `predict` gives for every item, in their order; the processes share the items.

    An item that cannot be read gets the record {"error": reason, "missing": whether it is not there at all}. Of items
    with one id the first that a process meets is predicted.

    Args:
        read: an item to what `predict` takes; raises ValueError or OSError where it cannot.
        identify: the id of what was read; records are kept by it.
        folder: gets `part-*.jsonl`, one per process, with lines as soon as they are known. Lines of an earlier run are
            kept, and their ids are not predicted again.
        made_by: identifies what decides a prediction; lines that something else made are dropped.
        at_once: items per call of `predict`, at most.
        advance: called for each item that this process is done with, for progress.
    """
    state = process_state()
    parts = Parts(folder, made_by, state.process_index)
    if state.is_main_process:
        parts.drop_unusable()
    state.wait_for_everyone()
    parts.read()
    state.wait_for_everyone()  # no process writes before all have read
    found: list[tuple[int, str | Record]] = []
    waiting: dict[str, tuple[P, list[int]]] = {}

    def finish() -> None:
        parts.add(dict(zip(waiting, predict([item for item, _ in waiting.values()]), strict=True)))
        found.extend((position, image_id) for image_id, (_, positions) in waiting.items() for position in positions)
        waiting.clear()

    for position in my_share(len(items)):
        try:
            item = read(items[position])
        except (ValueError, OSError) as error:
            found.append((position, {"error": str(error), "missing": isinstance(error, FileNotFoundError)}))
        else:
            image_id = identify(item)
            if image_id in parts:
                found.append((position, image_id))
            else:
                waiting.setdefault(image_id, (item, []))[1].append(position)
        if len(waiting) == at_once:
            finish()
        advance()
    if waiting:
        finish()
    everything = sorted(gather(found), key=lambda pair: pair[0])
    if state.num_processes > 1:
        parts.read()  # what the others have added
    return Records(parts, [record for _, record in everything])
