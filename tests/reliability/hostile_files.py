"""Files that were damaged, and files that an attacker wrote."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Files = dict[str, bytes]

DROP = object()
VALUES: tuple[Any, ...] = (None, True, -1, 0, 10**12, 1e300, float("nan"), float("inf"), "x", "", [], {}, [[1]], DROP)
DEEP = b"[" * 100_000
NOT_JSON = (b"", b"\xff\xfe\x00", DEEP, b"[]", b"null", b'{"a": 1', b"1" * 10_000, b'"x"')
HEADER_BOMBS = ((2**62).to_bytes(8, "little"), (90_000_000).to_bytes(8, "little") + b" " * 1000)


class Bomb:
    """What makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def pickle_bombs(folder: Path) -> dict[str, bytes]:
    """A pickle, and the archive of torch.save, that make a folder when they are read."""
    import io

    import torch

    archive = io.BytesIO()
    torch.save({"rows": Bomb(folder)}, archive)
    return {"pickle": pickle.dumps(Bomb(folder)), "torch.save": archive.getvalue()}


def files_of(folder: Path) -> Files:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write(folder: Path, files: Files) -> None:
    """The folder holds these files and no others."""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def signed(files: Files) -> Files:
    """The files of a bank with a manifest that fits them."""
    names = json.loads(files["manifest.json"])["files"]
    listed = {n: {"sha256": hashlib.sha256(files[n]).hexdigest(), "size": len(files[n])} for n in names if n in files}
    checksum = hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()
    return files | {"manifest.json": json.dumps({"format": 2, "files": listed, "checksum": checksum}).encode()}


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a JSON tree, containers too."""
    if path:
        yield path
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, (*path, key))


def edited(tree: Any, path: tuple[Any, ...], value: Any) -> bytes:
    """The JSON with another value in one place, or without that place."""
    tree = copy.deepcopy(tree)
    at = tree
    for key in path[:-1]:
        at = at[key]
    if value is DROP:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return json.dumps(tree).encode()


def damaged(files: Files, count: int, seed: int = 0) -> Iterator[tuple[str, Files]]:
    """`count` times one bit of some file is flipped, or a file is cut, grown, emptied, left out, or is another's."""
    draw, names = random.Random(seed), sorted(files)
    for _ in range(count):
        name = draw.choice(names)
        content, kind = files[name], draw.choices(("flip", "cut", "grow", "drop", "swap"), (80, 10, 3, 3, 4))[0]
        if kind == "drop":
            yield f"{name} dropped", {n: c for n, c in files.items() if n != name}
            continue
        if kind == "flip":
            at, bit = draw.randrange(len(content)), draw.randrange(8)
            changed, what = content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :], f"bit {at}.{bit}"
        elif kind == "cut":
            at = draw.randrange(len(content))
            changed, what = content[:at], f"cut at {at}"
        elif kind == "grow":
            changed, what = content + draw.randbytes(draw.randrange(1, 100)), "grown"
        else:
            other = draw.choice([n for n in names if n != name])
            changed, what = files[other], f"replaced by {other}"
        yield f"{name} {what}", files | {name: changed}
