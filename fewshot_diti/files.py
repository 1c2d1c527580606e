"""Files that are either whole or not there, and folders that ship with the package."""

from __future__ import annotations

import os
import tempfile
from importlib import resources
from pathlib import Path


def shipped(name: str) -> Path:
    """The folder of that name among what ships with the package: images or weights."""
    return Path(str(resources.files("fewshot_diti"))) / "assets" / name


def check_writable(folder: str | Path) -> None:
    """Makes the folder where it is missing; raises ValueError where it cannot be made or written to."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{folder} is no folder that can be written to ({error}); pass another folder.") from error


def write_atomically(path: str | Path, content: bytes) -> None:
    """Writes `content` to `path`: a temporary file in the same folder, fsync, then `os.replace`.

    A reader sees the old file or the new one, never a part; missing parent folders are made.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files private; the finished file gets the mode that open() would have given it.
        umask = os.umask(0o077)  # reading it sets it; files that other threads make meanwhile are private
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
