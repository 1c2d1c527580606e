"""A file system that fails: the n-th call of one kind, on files below one folder."""

from __future__ import annotations

import builtins
import errno
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load

KINDS = ("open", "write", "fsync", "replace", "unlink", "mkdir", "rmdir", "chmod")


class FailingFiles:
    """Counts calls of one kind on files below `root`; the one with this number, from 1, fails.

    Of a write that fails half is written before.
    """

    def __init__(self, root: Path, kind: str, number: int, error: int = errno.ENOSPC) -> None:
        self.root, self.kind, self.number, self.error, self.count = root.resolve(), kind, number, error, 0

    def _below(self, place: Any) -> bool:
        if isinstance(place, int):
            place = os.readlink(f"/proc/self/fd/{place}")
        return Path(os.path.abspath(os.fspath(place))).is_relative_to(self.root)

    def strike(self, place: Any) -> None:
        """Raises OSError where it is time to fail."""
        if self._below(place):
            self.count += 1
            if self.count == self.number:
                raise OSError(self.error, os.strerror(self.error))

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            if self.kind == "open":
                low, high = os.open, builtins.open

                def low_open(path: Any, flags: int, *rest: Any, **more: Any) -> int:
                    if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                        self.strike(path)
                    return low(path, flags, *rest, **more)

                def high_open(path: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
                    if set(mode) & set("wax+") and not isinstance(path, int):
                        self.strike(path)
                    return high(path, mode, *rest, **more)

                patch.setattr(os, "open", low_open)
                patch.setattr(builtins, "open", high_open)
            elif self.kind == "write":
                fdopen, high = os.fdopen, builtins.open
                patch.setattr(os, "fdopen", lambda fd, *rest, **more: _Halved(fdopen(fd, *rest, **more), self, fd))

                def halved_open(path: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
                    file = high(path, mode, *rest, **more)
                    return _Halved(file, self, path) if set(mode) & set("wax+") else file

                patch.setattr(builtins, "open", halved_open)
            else:
                whole = getattr(os, self.kind)

                def failing(place: Any, *rest: Any, **more: Any) -> Any:
                    self.strike(place)
                    return whole(place, *rest, **more)

                patch.setattr(os, self.kind, failing)
            yield


class _Halved:
    """A file whose `write` may fail in the middle."""

    def __init__(self, file: Any, faults: FailingFiles, place: Any) -> None:
        self._file, self._faults, self._place = file, faults, place

    def write(self, content: Any) -> int:
        try:
            self._faults.strike(self._place)
        except OSError:
            self._file.write(content[: len(content) // 2])
            self._file.flush()
            raise
        return int(self._file.write(content))

    def writelines(self, pieces: Iterable[Any]) -> None:
        for piece in pieces:
            self.write(piece)

    def __enter__(self) -> _Halved:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def contents(folder: Path) -> dict[str, Any]:
    """What the files below a folder hold, without times: by name, so that two runs can be compared."""
    return {str(p.relative_to(folder)): _content(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def hidden(folder: Path) -> list[str]:
    """Names below a folder that a user does not see."""
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.name.startswith("."))


def _content(path: Path) -> Any:
    content = path.read_bytes()
    if path.suffix == ".safetensors":  # whose head has its metadata in any order
        size = int.from_bytes(content[:8], "little")
        facts = json.loads(content[8 : 8 + size]).get("__metadata__", {})
        tensors = {name: x.numpy().tobytes() for name, x in load(content).items() if name != "seconds"}
        return {k: v for k, v in facts.items() if k not in ("seconds", "sha256")}, tensors
    if path.name == "log.jsonl":
        return [_without_times(json.loads(line)) for line in content.splitlines()]
    return _without_times(json.loads(content)) if path.suffix == ".json" and path.parent.name != "bank" else content


def _without_times(record: Any) -> Any:
    if isinstance(record, dict):
        return {
            k: v for k, v in record.items() if "second" not in k and k not in ("peak_memory", "output_dir", "checksum")
        }
    return record
