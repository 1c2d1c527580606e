"""The files of a bank: written whole or not at all, checked against a manifest, and read without running code."""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from safetensors import SafetensorError

from fewshot_diti.files import ANY, alone_in, make_folder, write_atomically

WEIGHTS, CLASSES, CONFIG, SETTINGS, CARD, PICTURE, MANIFEST = (
    "class_tokens.safetensors",
    "bank.json",
    "config.json",
    "classifier.json",
    "README.md",
    "held-out.png",
    "manifest.json",
)
FORMAT = 2
T = TypeVar("T")
_FILE = ("sha256", "size")  # what the manifest holds for each file
_HEX = 12
_HEAD = b"---\nlibrary_name: fewshot-diti\n"  # of every card; version 0.4 recorded no hashes of them
_PENDING = f".{'[0-9a-f]' * _HEX}.*"  # names of files until the manifest names them


def write_files(folder: str | Path, contents: Mapping[str, bytes], pages: Mapping[str, bytes]) -> None:
    """Writes the files of a bank, so that a reader sees the old bank or the new one whenever this is interrupted.

    Each file is first written beside the one it replaces, under a hidden name with its hash; the new manifest then
    makes them the bank, and last they take their names. Of several that save into one folder at the same time one waits
    for the other, and the bank of the last is there.

    Args:
        contents: by name.
        pages: for people, such as the model card: no reader needs them. One that somebody has changed since it was
            written, to add a licence, say, stays as it is, with a warning.
    """
    folder = Path(folder)
    make_folder(folder)
    facts = {n: {"sha256": _sha256(c), "size": len(c)} for n, c in {**contents, **pages}.items()}
    files = {name: facts[name] for name in contents}
    with alone_in(folder):
        before = _pages(folder)
        kept = [name for name in pages if _is_foreign(folder, name, before)]
        everything = {**contents, **{name: content for name, content in pages.items() if name not in kept}}
        pending = {name: _pending(folder, name, facts[name]) for name in everything}
        for name, content in everything.items():
            write_atomically(pending[name], content)
        hashes = {name: "" if name in kept else facts[name]["sha256"] for name in pages}
        manifest = {"format": FORMAT, "files": files, "checksum": _checksum(files), "pages": hashes}
        write_atomically(folder / MANIFEST, to_json(manifest))
        for name, content in everything.items():
            try:
                pending[name].replace(folder / name)
            except FileNotFoundError:  # another save has cleared it away, where the system has no lock
                write_atomically(folder / name, content)
        for name in set(before or ()) - set(pages):  # of an earlier save that had more of them
            if not _is_foreign(folder, name, before):
                (folder / name).unlink(missing_ok=True)
        for left_over in (*folder.glob(_PENDING), *folder.glob(f".{_PENDING}.{ANY}")):  # of saves that were killed
            left_over.unlink(missing_ok=True)
    for name in kept:
        warnings.warn(
            f"{folder / name} was not written here, or was changed since, and stays as it is; remove it to get a new "
            "one with the next save.",
            stacklevel=3,
        )


def _pages(folder: Path) -> dict[str, str] | None:
    """Hashes of the pages that the last save wrote, by name, "" of one that it left alone; None where nothing is known,
    as of a bank of version 0.4."""
    try:
        pages = json.loads((folder / MANIFEST).read_bytes())["pages"]
        return {name: hash for name, hash in pages.items() if Path(name).name == name and isinstance(hash, str)}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None


def _is_foreign(folder: Path, name: str, before: dict[str, str] | None) -> bool:
    """Whether there is a page that no save wrote, or that was changed since."""
    try:
        there = (folder / name).read_bytes()
    except OSError:
        return False
    if before is None:
        return not there.startswith(_HEAD)
    hash = before.get(name, "")
    # a save that was cut short behind its manifest left the page of the one before it
    return _sha256(there) != hash and not _pending(folder, name, {"sha256": hash}).exists()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def cut_short(folder: Path) -> bool:
    """Whether a save into the folder was killed: what it wrote is there under hidden names, a bank or not."""
    return any(folder.glob(_PENDING))


@contextmanager
def written_here(folder: str | Path) -> Iterator[None]:
    """Raises a ValueError that names the folder where what the files of a bank hold cannot be used: records that lack a
    field or have one too many, which another version wrote, or values and shapes that no version writes."""
    try:
        yield
    except (ValueError, SafetensorError, RecursionError, RuntimeError) as error:  # of weights of other shapes
        raise ValueError(f"{folder} holds no bank that can be used: {error} Copy it again, or train again.") from error
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{folder} was written by another version of fewshot-diti ({error}); take that version, or train again."
        ) from error


def from_fields(cls: type[T], values: Any, *, complete: bool = True) -> T:
    """A dataclass of the fields that JSON holds, with tuples for its lists.

    Args:
        complete: no field that a preset fills is left out.

    Raises:
        ValueError: a value is of another type than its field, or no number.
        TypeError: a field is missing, or there is one too many.
    """
    values, hints = _tuples(values), _hints(cls)  # type: ignore[arg-type]
    for field in fields(cls):  # type: ignore[arg-type]
        value, hint = values.get(field.name, field.default), hints[field.name]
        filled = value is None and field.default is None  # by a preset, where `complete` allows it
        if ((filled and complete) or (field.name in values and not filled)) and not _fits(value, hint):
            raise ValueError(f"{field.name} is {str(value)[:80]!r}, which is no {getattr(hint, '__name__', hint)}.")
    return cls(**values)


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, as annotations of the configurations have it."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is tuple:
        hints = inner[:1] * len(value) if isinstance(value, tuple) and inner[1:] == (...,) else inner
        return isinstance(value, tuple) and len(value) == len(hints) and all(map(_fits, value, hints))
    if hint is float:  # whole numbers too, and infinity
        return type(value) in (int, float) and not math.isnan(value)
    return type(value) is (NoneType if hint is None else hint)


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def bank_fingerprint(folder: str | Path) -> str:
    """16 hex characters that change when any file of a saved bank does."""
    return hashlib.sha256(_manifest(Path(folder), "bank").read_bytes()).hexdigest()[:16]


def _manifest(folder: Path, what: str) -> Path:
    """The manifest; raises FileNotFoundError where there is none."""
    if not os.path.lexists(folder):
        raise FileNotFoundError(f"There is no folder {folder}; check the path.")
    if not (path := folder / MANIFEST).is_file():
        raise FileNotFoundError(f"{folder} holds no {MANIFEST}, so no complete {what}; save_pretrained writes one.")
    return path


def read_files(folder: str | Path, names: Iterable[str] | None = None, what: str = "bank") -> dict[str, bytes]:
    """Contents of files of a saved bank, each checked against the manifest; all of one save.

    Args:
        names: by default of all files that the manifest names.
        what: the folder holds, where it is no bank; for messages.

    Raises:
        FileNotFoundError: the folder holds no manifest, so no complete bank, or the manifest does not name the file.
        ValueError: a file, or the manifest itself, is not what was saved.
    """
    path = _manifest(Path(folder), what)
    while True:
        manifest = path.read_bytes()
        try:
            return _read_named(path, manifest, names, what)
        except (FileNotFoundError, ValueError):
            if path.read_bytes() == manifest:
                raise  # else a save has replaced the bank meanwhile


def _read_named(path: Path, content: bytes, names: Iterable[str] | None, what: str) -> dict[str, bytes]:
    """`read_files` of one manifest."""
    folder = path.parent
    try:
        manifest = json.loads(content)
        version = manifest["format"]
        files = {n: {k: f[k] for k in _FILE} for n, f in manifest["files"].items()} if version == FORMAT else {}
        if version == FORMAT and manifest.get("checksum", _checksum(files)) != _checksum(files):  # 0.4 wrote none
            raise ValueError("checksum")
        if any(Path(name).name != name for name in files):
            raise ValueError("a file in another folder")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is no {what}'s manifest; it was changed or cut short. Copy the {what} again."
        ) from error
    if version != FORMAT:
        raise ValueError(f"{path}: {what} format {version!r}; this version of fewshot-diti reads {FORMAT}. Upgrade.")
    contents = {}
    for name in files if names is None else names:
        if name not in files:
            raise FileNotFoundError(f"{path} names no {name}; it names {', '.join(sorted(files))}.")
        # a save that was cut short after its manifest leaves some files under their hidden names
        found = []
        for candidate in (_pending(folder, name, files[name]), folder / name):
            with suppress(FileNotFoundError):  # a save renames it in this moment
                if candidate.is_file():
                    found.append(candidate.read_bytes())
        whole = [c for c in found if _sha256(c) == files[name]["sha256"]]
        if not whole:
            raise ValueError(
                f"{folder / name} ({len(found[-1]) if found else 0} bytes) is not the file of {files[name]['size']} "
                f"bytes with the hash that {MANIFEST} names; it was changed or cut short. Save or copy the {what} "
                "again."
            )
        contents[name] = whole[0]
    return contents


def _checksum(files: Mapping[str, Any]) -> str:
    """Of what a manifest says, so that a name that was damaged is not taken for a file that was never there."""
    return _sha256(json.dumps(files, sort_keys=True).encode())


def _pending(folder: Path, name: str, file: Mapping[str, Any]) -> Path:
    """Where a file waits until the manifest names it."""
    return folder / f".{file['sha256'][:_HEX]}.{name}"


def to_json(value: object) -> bytes:
    """JSON as the files hold it."""
    return (json.dumps(value, indent=2) + "\n").encode()
