"""All that the package writes: files that are whole or not there, and folders that one program at a time uses."""

from __future__ import annotations

import errno
import glob
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_THREADS, _held = threading.RLock(), set[Path]()
LOCK = ".lock"  # the file in a folder that `first_in` locks
ANY = "?" * 8  # for `glob`: what `mkstemp` puts into a name


def shipped(name: str) -> Path:
    """The folder of that name among what ships with the package: images or weights."""
    return Path(str(resources.files("fewshot_diti"))) / "assets" / name


def check_writable(folder: str | Path) -> None:
    """Makes the folder where it is missing; raises ValueError where it cannot be made or written to."""
    try:
        make_folder(Path(folder))
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{folder} is no folder that can be written to ({error}); pass another folder.") from error


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """One thread at a time, and where the system can lock a folder one process, inside the context for a folder.

    Whoever comes later waits; the same thread may enter it again.
    """
    with _THREADS:
        if fcntl is None or folder.resolve() in _held:
            yield
            return
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            with suppress(OSError):  # network drives that have no locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            _held.add(folder.resolve())
            yield
        finally:
            _held.discard(folder.resolve())
            os.close(descriptor)


@contextmanager
def first_in(folder: Path, place: Path) -> Iterator[None]:
    """Makes a folder and keeps other processes out of it inside the context, where the system can lock a file; the
    lock ends with the process.

    Args:
        place: as the message names it.

    Raises:
        ValueError: another process is in it.
    """
    if fcntl is None:
        make_folder(folder)
        yield
        return
    lock = folder / LOCK
    descriptor: int | None = None
    while descriptor is None:
        make_folder(folder)
        with suppress(FileNotFoundError):  # who was in it has ended and removed it
            descriptor = _locked(lock, place)
    try:
        yield
    finally:
        with suppress(OSError):
            lock.unlink()  # before it is unlocked: later another process may have one of that name
        os.close(descriptor)


def _locked(lock: Path, place: Path) -> int | None:
    """Opens and locks the file; None where its owner has removed it meanwhile."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)  # network drives lock no file that is open to read
    try:
        with suppress(OSError):  # network drives that have no locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(
                    f"Another program is at work in {place}; wait until it is done, or let this one write elsewhere."
                ) from None
        if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
            return descriptor
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but hidden names and folders that are empty too, as work that was cut short
    leaves."""
    return all(
        path.name.startswith(".") or (path.is_dir() and not path.is_symlink() and is_empty(path))
        for path in folder.iterdir()
    )


def make_folder(folder: Path) -> None:
    """Makes a folder where it is missing, and its parents; they outlast a power cut."""
    missing = [x for x in (folder, *folder.parents) if not x.is_dir()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in reversed(missing):
        _sync(made.parent)


def write_atomically(path: str | Path, content: bytes | Iterable[bytes]) -> None:
    """Writes `content` to `path`: a temporary file in the same folder, fsync, `os.replace`, and fsync of the folder.

    `content` may come in pieces. A reader sees the old file or the new one, never a part; missing parent folders are
    made, and what a write of this file that was killed has left is removed.

    Raises:
        OSError: the folder cannot be made or written to; it names `path`.
    """
    path = Path(path)
    try:
        make_folder(path.parent)
        descriptor, temporary = _temporary(path)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.writelines([content] if isinstance(content, bytes) else content)
                file.flush()
                os.fsync(file.fileno())
                if fcntl is None:
                    file.close()  # Windows renames no open file
                # mkstemp makes files private; the finished file gets the mode that open() would have given it.
                umask = os.umask(0o077)  # reading it sets it; files that other threads make meanwhile are private
                os.umask(umask)
                os.chmod(temporary, 0o666 & ~umask)
                os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):  # the first error counts
                os.unlink(temporary)
            raise
        _sync(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def append(path: Path, content: bytes) -> int:
    """Writes `content` at the end of a file and returns where it begins; who reads the file passes over a last line
    that was cut off.

    Raises:
        OSError: as `write_atomically`.
    """
    try:
        with open(path, "ab") as file:
            place = file.tell()
            file.write(content)
        return place
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _temporary(path: Path) -> tuple[int, str]:
    """Opens a new hidden file beside `path`, and removes those that a killed process has left: they have no lock."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{ANY}"):
        if fcntl is not None:
            with suppress(OSError):
                descriptor = os.open(left, os.O_RDWR)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    left.unlink()
                finally:
                    os.close(descriptor)
    while True:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        if fcntl is None:
            return descriptor, name
        with suppress(OSError):  # network drives that have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor, name
        os.close(descriptor)  # another process has found it in the moment before it was locked


def _sync(folder: Path) -> None:
    """Makes the names in a folder outlast a power cut, where the system can."""
    if os.name == "nt":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder that can be written to and not be read
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot
            raise
    finally:
        os.close(descriptor)
