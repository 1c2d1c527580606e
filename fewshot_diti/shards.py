"""Scoring in shards: each job scores its share of the images into a file of its own, and the files are merged.

An image belongs to a shard by the hash of its name, so that each job finds its images by itself. The record of a shard
is written after its file: where there is no record, the shard is scored again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fewshot_diti.files import write_atomically
from fewshot_diti.prediction_files import parquet_pieces
from fewshot_diti.progress import Progress
from fewshot_diti.reports import printable

COUNTS = ("scored", "undecided", "rejected", "failed", "missing")  # of a shard's images
_MERGED = b"fewshot-diti shards"  # in the metadata of a merged file: how many
_NAMED = 20  # shards that an error names
_RECORD = re.compile(r"shard-(\d{5,})-of-(\d{5,})\.json")


@dataclass(frozen=True)
class Shard:
    """Shard `number`, from 1, of `of`."""

    number: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            raise ValueError(f"shard={self.number}/{self.of}; pass 1/{self.of} to {self.of}/{self.of}.")

    @classmethod
    def parse(cls, text: str) -> Shard:
        """The shard that a text such as "3/16" names.

        Raises:
            ValueError: the text names none, or there are more than 999,999.
        """
        if not re.fullmatch(r"\d{1,6}/[1-9]\d{0,5}", text, re.ASCII):
            raise ValueError(f"shard={text!r}; pass a number and how many there are, such as 3/16.")
        number, of = map(int, text.split("/"))
        return cls(number, of)

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def holds(self, name: str) -> bool:
        """Whether the image of this name belongs to the shard."""
        return _hash(name) % self.of == self.number - 1

    def file(self, folder: Path) -> Path:
        """Its predictions."""
        return folder / f"shard-{self.number:05d}-of-{self.of:05d}.parquet"

    def record(self, folder: Path) -> Path:
        """Says how the file was made, and with which hash it is whole."""
        return self.file(folder).with_suffix(".json")


@dataclass
class Listing:
    """All images that a job has seen, whichever shard they belong to: two jobs that saw the same have equal ones."""

    count: int = 0
    digest: int = 0

    def add(self, name: str) -> None:
        """Counts an image; the order of the images does not matter."""
        self.count, self.digest = self.count + 1, (self.digest + _hash(name)) % 2**64


def finished(folder: Path, shard: Shard, made_by: Mapping[str, Any], listing: Listing) -> dict[str, int] | None:
    """Counts of a shard that is there and whole; None where it is to be scored.

    Raises:
        ValueError: it was made in another way or when there were other images, or the folder holds shards of another
            number.
    """
    if others := sorted({int(m[2]) for m in _records(folder)} - {shard.of}):
        raise ValueError(
            f"{folder} holds shards of {others[0]}, not of {shard.of}; go on with that number, or pass another folder."
        )
    found = _read(folder, shard)
    if found is None:
        return None
    if differ := _different(found["made_by"], made_by):
        raise ValueError(f"{shard.record(folder)} was made with {differ}; pass another folder, or remove that file.")
    if found["images"] != [listing.count, listing.digest]:
        raise ValueError(
            f"{shard.record(folder)} was made when there were {found['images'][0]} images; now there are "
            f"{listing.count}, or some have other names. Pass another folder, or remove its shards and score all again."
        )
    return {name: int(found["counts"][name]) for name in COUNTS}


def finish(folder: Path, shard: Shard, made_by: Mapping[str, Any], listing: Listing, counts: Mapping[str, int]) -> None:
    """Writes the record of a shard whose file is written."""
    file = shard.file(folder)
    record = {
        "shard": str(shard),
        "made_by": dict(made_by),
        "images": [listing.count, listing.digest],
        "counts": {name: counts.get(name, 0) for name in COUNTS},
        "size": file.stat().st_size,
        "sha256": _sha256(file),
    }
    write_atomically(shard.record(folder), (json.dumps(record, indent=1) + "\n").encode())


def merge(folder: Path, output: Path) -> Counter[str]:
    """Writes the rows of all shards into one Parquet file, and returns how many images there are of each kind.

    Raises:
        FileNotFoundError: no shard is there.
        ValueError: shards are missing, damaged, of different numbers, or made from different images, banks or options;
            or an image stands twice.
    """
    if _RECORD.fullmatch(output.with_suffix(".json").name) or not _may_replace(output):
        raise ValueError(f"--output {output} is there already and no merged file, or has a shard's name; name another.")
    shards = _shards(folder)
    records = [_whole(folder, shard) for shard in shards]
    for shard, record in zip(shards, records, strict=True):
        if differ := _different(record["made_by"], records[0]["made_by"]):
            raise ValueError(
                f"{shard.record(folder)} was made with {differ} as in {shards[0].record(folder)}; remove the one that "
                "is wrong, and score its shard again."
            )
        if record["images"] != records[0]["images"]:
            raise ValueError(
                f"{shards[0]} was scored when there were {records[0]['images'][0]} images and {shard} when there were "
                f"{record['images'][0]}, or some with other names; remove the records of those that differ, such as "
                f"{shard.record(folder)}, and score these shards again."
            )
    counts = Counter[str]()
    for record in records:
        counts.update(record["counts"])
    known, listed = sum(counts[name] for name in ("scored", "failed", "missing")), records[0]["images"][0]
    if known != listed:
        raise ValueError(f"The shards in {folder} hold {known} of {listed} images; remove them and score all again.")
    write_atomically(output, parquet_pieces(_tables(folder, shards, records)))
    return counts


def _may_replace(output: Path) -> bool:
    """Whether nothing is there, or what `merge` wrote."""
    if not os.path.lexists(output):
        return True
    try:
        return _MERGED in (pq.read_schema(output).metadata or {})
    except (OSError, pa.ArrowInvalid):
        return False


def _tables(folder: Path, shards: Sequence[Shard], records: Sequence[Mapping[str, Any]]) -> Iterator[pa.Table]:
    """The rows, some at a time; each is checked to stand once."""
    schema = pq.read_schema(shards[0].file(folder))
    schema = schema.with_metadata({**(schema.metadata or {}), _MERGED: str(len(shards)).encode()})
    yield schema.empty_table()
    with Progress(len(shards), "merging", "shard") as bar:
        for shard, record in zip(shards, records, strict=True):
            seen = set[int]()
            with pq.ParquetFile(shard.file(folder)) as file:
                for batch in file.iter_batches():
                    for name in batch.column("path").to_pylist():
                        if not shard.holds(name) or (key := _hash(name)) in seen:
                            raise ValueError(
                                f"{shard.file(folder)} holds {printable(name)} twice, or it is another shard's image; "
                                f"remove {shard.record(folder)} and score --shard {shard} again."
                            )
                        seen.add(key)
                    yield pa.Table.from_batches([batch]).cast(schema)
            if len(seen) != record["counts"]["scored"] + record["counts"]["failed"]:
                raise ValueError(
                    f"{shard.file(folder)} holds {len(seen)} rows, not those of its record; remove that, and score "
                    f"--shard {shard} again."
                )
            bar.update()


def _shards(folder: Path) -> list[Shard]:
    """All shards of a folder."""
    found = _records(folder)
    if not found:
        raise FileNotFoundError(f"{folder} holds no shards; score into it with --shard 1/N to N/N first.")
    numbers = {int(m[2]) for m in found}
    if len(numbers) > 1:
        raise ValueError(f"{folder} holds shards of {' and of '.join(map(str, sorted(numbers)))}; keep those of one.")
    (of,) = numbers
    there = {int(m[1]) for m in found}
    if lacking := of - len(there):
        first = islice((str(Shard(n, of)) for n in range(1, of + 1) if n not in there), _NAMED)
        more = f" and {lacking - _NAMED} more" if lacking > _NAMED else ""
        raise ValueError(f"{folder} lacks {lacking} of {of} shards; score --shard {', '.join(first)}{more} first.")
    return [Shard(n, of) for n in range(1, of + 1)]


def _records(folder: Path) -> list[re.Match[str]]:
    """Names of the records that are there."""
    return [m for path in sorted(folder.glob("shard-*.json")) if (m := _RECORD.fullmatch(path.name))]


def _whole(folder: Path, shard: Shard) -> dict[str, Any]:
    found = _read(folder, shard)
    if found is None:
        raise ValueError(f"{shard.file(folder)} is damaged or not there; score --shard {shard} again.")
    return found


def _read(folder: Path, shard: Shard) -> dict[str, Any] | None:
    """The record of a shard that is whole, else None."""
    file = shard.file(folder)
    try:
        record: dict[str, Any] = json.loads(shard.record(folder).read_bytes())
        fits = record["size"] == file.stat().st_size and record["sha256"] == _sha256(file)
        counts = [record["counts"][name] for name in COUNTS]
        usable = record["shard"] == str(shard) and isinstance(record["made_by"], dict) and len(record["images"]) == 2
        return record if fits and usable and all(isinstance(x, int) for x in counts) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # damaged: as good as none
        return None


def _different(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What was made differently; "" where nothing was."""
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    return "; ".join(f"{name} {found.get(name)!r}, not {wanted.get(name)!r}" for name in names)


def _hash(name: str) -> int:
    # as a row of Parquet holds the name
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "backslashreplace")).digest()[:8], "big")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
