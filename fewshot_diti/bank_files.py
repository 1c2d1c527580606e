"""The files of a bank: written whole or not at all, checked against a manifest, and read without running code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fewshot_diti.files import write_atomically

WEIGHTS, CLASSES, CONFIG, SETTINGS, CARD, MANIFEST = (
    "class_tokens.safetensors",
    "bank.json",
    "config.json",
    "classifier.json",
    "README.md",
    "manifest.json",
)
FORMAT = 2
_FILE = ("sha256", "size")  # what the manifest holds for each file
_HEX = 12


def write_files(folder: str | Path, contents: Mapping[str, bytes], card: str) -> None:
    """Writes the files of a bank, so that a reader sees the old bank or the new one whenever this is interrupted.

    Each file is first written beside the one it replaces, under a hidden name with its hash; the new manifest then
    makes them the bank, and last they take their names. The model card is for people: no reader needs it.
    """
    folder = Path(folder)
    files = {n: {"sha256": hashlib.sha256(c).hexdigest(), "size": len(c)} for n, c in contents.items()}
    for name, content in contents.items():
        write_atomically(_pending(folder, name, files[name]), content)
    write_atomically(folder / MANIFEST, to_json({"format": FORMAT, "files": files}))
    for name in contents:
        _pending(folder, name, files[name]).replace(folder / name)
    for left_over in folder.glob("." + "[0-9a-f]" * _HEX + ".*"):
        left_over.unlink()
    write_atomically(folder / CARD, card.encode())


@contextmanager
def written_here(folder: str | Path) -> Iterator[None]:
    """Raises a ValueError where records of a bank lack a field or have one too many: another version wrote them."""
    try:
        yield
    except (TypeError, KeyError) as error:
        raise ValueError(
            f"{folder} was written by another version of fewshot-diti ({error}); take that version, or train again."
        ) from error


def bank_fingerprint(folder: str | Path) -> str:
    """16 hex characters that change when any file of a saved bank does."""
    return hashlib.sha256((Path(folder) / MANIFEST).read_bytes()).hexdigest()[:16]


def read_files(folder: str | Path, names: Iterable[str]) -> dict[str, bytes]:
    """Contents of files of a saved bank, each checked against the manifest.

    Raises:
        FileNotFoundError: the folder holds no manifest, so no complete bank, or the manifest does not name the file.
        ValueError: a file, or the manifest itself, is not what was saved.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {MANIFEST}, so no complete bank; save_pretrained writes one.")
    try:
        manifest = json.loads(path.read_bytes())
        version = manifest["format"]
        files = {n: {k: f[k] for k in _FILE} for n, f in manifest["files"].items()} if version == FORMAT else {}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no bank's manifest; it was changed or cut short. Copy the bank again.") from error
    if version != FORMAT:
        raise ValueError(f"{path}: bank format {version!r}; this version of fewshot-diti reads {FORMAT}. Upgrade.")
    contents = {}
    for name in names:
        if name not in files:
            raise FileNotFoundError(f"{path} names no {name}; it names {', '.join(sorted(files))}.")
        # a save that was cut short after its manifest leaves some files under their hidden names
        found = [p.read_bytes() for p in (_pending(folder, name, files[name]), folder / name) if p.is_file()]
        whole = [c for c in found if hashlib.sha256(c).hexdigest() == files[name]["sha256"]]
        if not whole:
            raise ValueError(
                f"{folder / name} ({len(found[-1]) if found else 0} bytes) is not the file of {files[name]['size']} "
                f"bytes that {MANIFEST} names; it was changed or cut short. Save or copy the bank again."
            )
        contents[name] = whole[0]
    return contents


def _pending(folder: Path, name: str, file: Mapping[str, Any]) -> Path:
    """Where a file waits until the manifest names it."""
    return folder / f".{file['sha256'][:_HEX]}.{name}"


def to_json(value: object) -> bytes:
    """JSON as the files hold it."""
    return (json.dumps(value, indent=2) + "\n").encode()
