"""Tensors that are kept on disk and can be computed again: a file that is damaged is as good as none."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, uint8

from fewshot_diti.files import write_atomically

_HASH = "sha256"  # in the metadata, beside what the tensors were made from


def keep_tensors(path: Path, tensors: Mapping[str, Tensor], made_from: Mapping[str, str]) -> None:
    """Writes tensors with a hash of their values, and texts that say what they were made from."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(tensors, {**made_from, _HASH: _hash(tensors)}))


def kept_tensors(path: Path, made_from: Mapping[str, str]) -> dict[str, Tensor] | None:
    """The tensors of a file that was made from the same; None where there is none, or it is damaged.

    A file without a hash, as of version 0.4, is taken as it is.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            found = dict(file.metadata() or {})
            hash_ = found.pop(_HASH, None)
            if found != dict(made_from):
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    except (SafetensorError, OSError, RuntimeError):
        return None
    return tensors if hash_ in (None, _hash(tensors)) else None


def _hash(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.flatten().view(uint8).numpy().data)
    return digest.hexdigest()
