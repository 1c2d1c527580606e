"""The backbone that a bank was trained on, found again on another machine."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from fewshot_diti.backbone import Backbone
from fewshot_diti.backbone_files import POCKET
from fewshot_diti.devices import as_dtype, default_device
from fewshot_diti.files import write_atomically

SEARCH_PATH = "FEWSHOT_DITI_BACKBONES"  # an environment variable


def find_backbone(public_name: str, hash: str, hint: str | Path | None = None, **options: Any) -> Backbone:
    """The backbone that something was made with, wherever it lies on this machine.

    Tried are `hint`, the name itself as a hub id, folder or "pocket", the folder that `remember_folder` noted for this
    hash, and the folders in the environment variable FEWSHOT_DITI_BACKBONES, which lists them as PATH does; the first
    with the right hash is taken.

    Args:
        public_name, hash: as of `Backbone`.
        hint: a folder or hub id to try first.
        options: as of `Backbone.from_pretrained`.

    Raises:
        FileNotFoundError: none of them is that backbone.
        ValueError: there is no such dtype.
    """
    as_dtype(options.get("dtype", "auto"), default_device())  # one that does not exist is not the fault of any folder
    # a single word is no hub id, but the last part of a folder's path
    named = [public_name] if "/" in public_name or public_name == POCKET or Path(public_name).is_dir() else []
    tried = []
    for name in dict.fromkeys(
        map(str, [*([hint] if hint else []), *named, *_remembered(hash), *folders_to_search(public_name)])
    ):
        try:
            found = Backbone.from_pretrained(name, **options)
        except (OSError, ValueError) as error:
            tried.append(f"{name!r} cannot be loaded: {error}")
            continue
        if found.hash == hash:
            return found
        tried.append(f"{name!r} has hash {found.hash}")
    if public_name == POCKET:
        raise FileNotFoundError(
            f"This was made with another edition of the pocket (hash {hash}), which another version of fewshot-diti "
            f"ships; install that version, or train again. Tried: {'; '.join(tried)}."
        )
    raise FileNotFoundError(
        f"Backbone {public_name!r} with hash {hash} is not there; pass backbone= with its folder or hub id, or list "
        f"the folder that holds it in the environment variable {SEARCH_PATH}. Tried: {'; '.join(tried) or 'nothing'}."
    )


def folders_to_search(name: str) -> list[Path]:
    """Folders of backbones in the folders that the environment variable `SEARCH_PATH` lists; those of that name first.

    The variable lists them as PATH does. Each is a backbone itself, or holds some.
    """
    listed = [Path(x) for x in os.environ.get(SEARCH_PATH, "").split(os.pathsep) if x]
    found = [folder for x in listed for folder in (x, *sorted(x.glob("*"))) if (folder / "unet").is_dir()]
    return sorted(found, key=lambda folder: folder.name != name.rsplit("/", 1)[-1])


def remember_folder(backbone: Backbone) -> None:
    """Notes where a backbone that was loaded from a folder lies on this machine, in the user's cache.

    A saved bank names no folder of the machine that it was made on; here it is found again all the same.
    """
    if Path(backbone.name).is_dir():
        with suppress(OSError):  # a home that cannot be written to
            write_atomically(
                _note(backbone.hash), str(Path(backbone.name).resolve()).encode("utf-8", "surrogateescape")
            )


def _remembered(hash: str) -> list[str]:
    try:
        folder = _note(hash).read_bytes().decode("utf-8", "surrogateescape")
    except OSError:
        return []
    return [folder] if Path(folder).is_dir() else []


def _note(hash: str) -> Path:
    return user_cache_path("fewshot-diti") / "backbones" / hash
