"""Everything about processes: this one among them, work that they share, and part files that let a killed run go on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from torch import Tensor

from fewshot_diti.files import write_atomically

_TIMEOUT = timedelta(days=7)  # processes meet after their whole shares, which may end hours apart

T = TypeVar("T")
P = TypeVar("P")
Record = dict[str, Any]


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
) -> list[Record]:
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
    if state.is_main_process:
        _drop_unusable_lines(folder, made_by)
    state.wait_for_everyone()
    known = _read(folder)
    state.wait_for_everyone()  # no process writes before all have read
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"part-{state.process_index:05d}.jsonl"
    found: list[tuple[int, Record]] = []
    waiting: dict[str, tuple[P, list[int]]] = {}

    def finish() -> None:
        records = predict([item for item, _ in waiting.values()])
        lines = []
        for (image_id, (_, positions)), record in zip(waiting.items(), records, strict=True):
            known[image_id] = dict(record)
            lines.append(json.dumps({"image_id": image_id, **record, "made_by": made_by}) + "\n")
            found.extend((position, {"image_id": image_id, **record}) for position in positions)
        with open(part, "a", encoding="utf-8") as file:
            file.write("".join(lines))
        waiting.clear()

    for position in my_share(len(items)):
        try:
            item = read(items[position])
        except (ValueError, OSError) as error:
            found.append((position, {"error": str(error), "missing": isinstance(error, FileNotFoundError)}))
        else:
            image_id = identify(item)
            if image_id in known:
                found.append((position, {"image_id": image_id, **known[image_id]}))
            else:
                waiting.setdefault(image_id, (item, []))[1].append(position)
        if len(waiting) == at_once:
            finish()
        advance()
    if waiting:
        finish()
    return [record for _, record in sorted(gather(found), key=lambda pair: pair[0])]


def _records(path: Path) -> list[Record]:
    """What a part file holds; a line that was cut off is passed over."""
    records = []
    for line in path.read_bytes().split(b"\n"):
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return [record for record in records if isinstance(record, dict) and "image_id" in record]


def _drop_unusable_lines(folder: Path, made_by: str) -> None:
    """Removes lines that were cut off or that something else made."""
    for path in sorted(folder.glob("part-*.jsonl")):
        kept = [record for record in _records(path) if record.get("made_by") == made_by]
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept).encode())


def _read(folder: Path) -> dict[str, Record]:
    records = [record for path in sorted(folder.glob("part-*.jsonl")) for record in _records(path)]
    return {r["image_id"]: {k: v for k, v in r.items() if k not in ("image_id", "made_by")} for r in records}
