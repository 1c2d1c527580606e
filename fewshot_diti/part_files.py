"""Images spread over processes, each writing what it finds to a part file of its own, so that a killed run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils import gather_object
from tqdm import tqdm

from fewshot_diti.files import write_atomically
from fewshot_diti.processes import process_state

Image = TypeVar("Image")


def spread_over_processes(
    images: Mapping[str, Image],
    predict: Callable[[Sequence[Image]], Sequence[dict[str, Any]]],
    folder: Path,
    made_by: str,
    *,
    at_once: int,
) -> dict[str, dict[str, Any]]:
    """What `predict` says of every image, in their order; each image is predicted once, by one process.

    Args:
        images: image id -> what `predict` gets.
        folder: gets `part-*.jsonl`, one a process, lines as soon as they are known; lines of an earlier run are kept,
            and their images are not predicted again.
        at_once: images that `predict` gets in one call, at most.
        made_by: identifies what decides a prediction; lines that another one made are dropped.
    """
    state = process_state()
    if state.is_main_process:
        _drop_unusable_lines(folder, made_by)
    state.wait_for_everyone()
    done = _read(folder)
    state.wait_for_everyone()  # no process writes before all have read
    folder.mkdir(parents=True, exist_ok=True)
    mine = [image for image in images if image not in done][state.process_index :: state.num_processes]
    new: dict[str, dict[str, Any]] = {}
    bar = tqdm(total=len(mine), desc="images", unit="image", disable=None if state.is_main_process else True)
    for start in range(0, len(mine), at_once):
        ids = mine[start : start + at_once]
        found = dict(zip(ids, predict([images[i] for i in ids]), strict=True))
        new |= found
        lines = [json.dumps({"image_id": i, **record, "made_by": made_by}) + "\n" for i, record in found.items()]
        with open(folder / f"part-{state.process_index:05d}.jsonl", "a", encoding="utf-8") as part:
            part.write("".join(lines))
        bar.update(len(ids))
    bar.close()
    known = done | dict(gather_object(list(new.items())))
    return {image: known[image] for image in images}


def _records(path: Path) -> list[dict[str, Any]]:
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


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    records = [record for path in sorted(folder.glob("part-*.jsonl")) for record in _records(path)]
    return {r["image_id"]: {k: v for k, v in r.items() if k not in ("image_id", "made_by")} for r in records}
