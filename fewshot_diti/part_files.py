"""Part files: a line of JSON for each image, so that a killed run goes on and memory holds no results."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from fewshot_diti.files import append, make_folder, write_atomically

Record = dict[str, Any]

_CHECK = "sha256"  # field of a line: the beginning of the hash of what stands before it


class Parts:
    """Records by their ids, in the part files of a folder, one per process. Memory holds only where each one stands.

    Lines that were cut off, that were damaged or that something else made are passed over. What was read once can be
    read again, whatever another run makes of the files meanwhile.

    Args:
        made_by: identifies what decides a record.
        own: number of the part file that gets new records.
    """

    def __init__(self, folder: Path, made_by: str, own: int) -> None:
        self.folder, self.made_by, self.own = folder, made_by, folder / f"part-{own:05d}.jsonl"
        self._files: dict[Path, IO[bytes]] = {}
        self._places: dict[str, tuple[Path, int]] = {}

    def drop_unusable(self) -> None:
        """Removes the lines that are passed over."""
        for path in sorted(self.folder.glob("part-*.jsonl")):
            with open(path, "rb") as file:
                write_atomically(path, (line for line in file if self._record(line) is not None))

    def read(self) -> None:
        """Finds the records of all part files that are there."""
        for path in sorted(self.folder.glob("part-*.jsonl")):
            file, place = self._open(path), 0
            file.seek(0)
            for line in file:
                if (record := self._record(line)) is not None:
                    self._places[record["image_id"]] = path, place
                place += len(line)

    def add(self, records: Mapping[str, Mapping[str, Any]]) -> None:
        """Appends records to this process's part file."""
        make_folder(self.folder)
        lines = {image_id: self._line({"image_id": image_id, **record}) for image_id, record in records.items()}
        place = append(self.own, b"".join(lines.values()))
        self._open(self.own)
        for image_id, line in lines.items():
            self._places[image_id] = self.own, place
            place += len(line)

    def __contains__(self, image_id: str) -> bool:
        return image_id in self._places

    def __getitem__(self, image_id: str) -> Record:
        """The record with its id; raises KeyError where it is not known."""
        path, place = self._places[image_id]
        file = self._open(path)
        file.seek(place)
        record = self._record(file.readline())
        if record is None:
            raise ValueError(f"{path} was damaged while it was in use; run the same command again.")
        return record

    def _open(self, path: Path) -> IO[bytes]:
        if path not in self._files:
            self._files[path] = file = open(path, "rb")  # noqa: SIM115, closed with this object
            weakref.finalize(self, file.close)
        return self._files[path]

    def _line(self, record: Mapping[str, Any]) -> bytes:
        text = json.dumps({**record, "made_by": self.made_by})
        return f'{text[:-1]}, "{_CHECK}": "{_hash(text)}"}}\n'.encode()

    def _record(self, line: bytes) -> Record | None:
        """What a line says; None where it cannot be used."""
        try:
            record = json.loads(line)
            check, made_by = record.pop(_CHECK), record.get("made_by")
            mine = made_by == self.made_by and isinstance(record["image_id"], str)
            if not mine or check != _hash(json.dumps(record)) or not line.endswith(b"\n"):
                return None
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):  # whatever else may stand there
            return None
        del record["made_by"]
        return dict(record)


class Records:
    """Records in the order of their items; each is read from its part file when its turn comes.

    Args:
        found: of each item its id, or the record itself where it has none.
    """

    def __init__(self, parts: Parts, found: Sequence[str | Record]) -> None:
        self._parts, self._found = parts, found

    def __len__(self) -> int:
        return len(self._found)

    def __iter__(self) -> Iterator[Record]:
        return (self._parts[x] if isinstance(x, str) else x for x in self._found)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
