"""Splits that other projects published as path lists: CoOp's JSON, TiF's split files, plain text."""

from __future__ import annotations

import io
import json
import pickletools
import re
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from fewshot_diti.data.folders import IMAGE_SUFFIXES
from fewshot_diti.data.image_set import ImageSet, index_labels

_LINE = re.compile(rf"(.+?(?:{'|'.join(map(re.escape, IMAGE_SUFFIXES))}))(?:\s+(\S.*))?", re.IGNORECASE)
_STRUCTURE = ("PROTO", "EMPTY_LIST", "EMPTY_DICT", "MARK", "SETITEM", "SETITEMS", "APPEND", "APPENDS", "STOP")
_NO_PICKLES = (
    "is a pickle, and pickles are never read: they can run any code. Draw shots with sample_shots, or write the paths "
    "to a text file, one 'path label' a line."
)


def import_path_list(file: str | Path, image_root: str | Path, split: str = "train") -> ImageSet:
    """The images of a published split; `sample_shots(..., "all", seed)` turns a few-shot list into `Shots`.

    Read are CoOp's `split_zhou_*.json` ({split: [[path, label, class name], ...]}), the released TiF split files
    (`*.data`, archives of torch.save; only their plain values are read, nothing is unpickled), and text files with one
    'path label' or one path a line, the class then being the name of the folder that the image lies in.

    Args:
        file: the list.
        image_root: folder that the paths start from; leading folders of the list's own machine are dropped as needed.
        split: which of CoOp's lists (train, val, test); the other kinds hold one list.

    Raises:
        FileNotFoundError: the list or one of its images is not there.
        ValueError: a pickle (CoOp's few-shot draws are), an unknown split, or a line that cannot be read.
    """
    content = Path(file).read_bytes()
    suffix = Path(file).suffix.lower()
    if zipfile.is_zipfile(io.BytesIO(content)):
        entries = known = _tif_entries(content, str(file))
    elif content.startswith(b"\x80") or suffix in (".pkl", ".pickle"):
        raise ValueError(f"{file} {_NO_PICKLES}")
    elif suffix == ".json":
        lists = _coop_lists(content, str(file))
        if split not in lists:
            raise ValueError(f"{file} has no list {split!r}; pass one of {list(lists)}.")
        entries, known = lists[split], [entry for each in lists.values() for entry in each]
    else:
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is no UTF-8 ({error}); save it as UTF-8, or get the file again.") from error
        entries = known = _text_entries(text, str(file))
    if not entries:
        raise ValueError(f"{file} lists no images.")
    classes = sorted({(number, class_name) for _, number, class_name in known})
    numbers = [number for number, _ in classes]
    if not len(classes) == len(set(numbers)) == len({class_name for _, class_name in classes}):
        raise ValueError(f"{file} gives a label two class names, or a class name two labels; correct the list.")
    paths = [_resolve(Path(image_root), path) for path, _, _ in entries]
    listed = {path: entry for path, (entry, _, _) in zip(paths, entries, strict=True)}
    for path, (entry, _, _) in zip(paths, entries, strict=True):
        if listed[path] != entry:
            raise ValueError(f"{file} lists {entry} and {listed[path]}, and both lead to {path}; check image_root.")
    return ImageSet(
        images=paths,
        labels=np.searchsorted(numbers, [number for _, number, _ in entries]),
        class_names=tuple(class_name for _, class_name in classes),
        names=tuple(map(str, paths)),
    )


def _coop_lists(content: bytes, file: str) -> dict[str, list[tuple[str, int, str]]]:
    """(path, label, class name) of each entry, by split."""
    try:
        return {
            split: [(str(path), int(label), str(class_name)) for path, label, class_name in entries]
            for split, entries in json.loads(content).items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is no split of CoOp ({error}): it must hold {{split: [[path, label, class name], ...]}}."
        ) from error


def _text_entries(text: str, file: str) -> list[tuple[str, int, str]]:
    """(path, label, class name) of each line that is not blank."""
    pairs = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None or not (match[2] or PurePosixPath(match[1]).parent.name):
            raise ValueError(
                f"Line {number} of {file} is {line!r}; a line is 'path label' or a path whose folder is the class, and "
                f"the path ends in one of {', '.join(IMAGE_SUFFIXES)}."
            )
        pairs.append((match[1], match[2] or PurePosixPath(match[1]).parent.name))
    labels, class_names = index_labels([class_name for _, class_name in pairs])
    return [(path, int(label), class_names[label]) for (path, _), label in zip(pairs, labels, strict=True)]


def _tif_entries(content: bytes, file: str) -> list[tuple[str, int, str]]:
    """(path, label, class name) of a released TiF split: torch.save of [{"classname": , "impath": , "label": }, ...].

    The archive's pickle program is listed by `pickletools.genops`, which runs nothing. A list of flat dictionaries
    needs only the few operations below; any other (one that would import or call something) is refused.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        programs = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(programs) != 1:
            raise ValueError(f"{file} is an archive, but no split file of TiF; it holds {archive.namelist()[:5]}.")
        program = archive.read(programs[0])
    values: list[Any] = []  # keys and values of all dictionaries, in turn
    memo: dict[Any, Any] = {}
    fresh = False  # whether the operation before gave a key or value, which a PUT then remembers
    for operation, argument, _ in pickletools.genops(program):
        if operation.name in ("BINUNICODE", "BININT", "BININT1", "BININT2"):
            values.append(argument)
        elif operation.name in ("BINGET", "LONG_BINGET") and argument in memo:
            values.append(memo[argument])
        elif operation.name in ("BINPUT", "LONG_BINPUT"):
            if fresh:
                memo[argument] = values[-1]
        elif operation.name not in _STRUCTURE:
            raise ValueError(f"{file} holds more than texts and numbers ({operation.name}): it {_NO_PICKLES}")
        fresh = operation.name.startswith(("BINUNICODE", "BININT", "BINGET", "LONG_BINGET"))
    entries = [
        dict(zip(values[i : i + 6 : 2], values[i + 1 : i + 6 : 2], strict=False)) for i in range(0, len(values), 6)
    ]
    if any(set(entry) != {"classname", "impath", "label"} for entry in entries):
        raise ValueError(f"{file} is no split file of TiF: its entries must have classname, impath and label.")
    return [(str(entry["impath"]), int(entry["label"]), str(entry["classname"])) for entry in entries]


def _resolve(root: Path, path: str) -> Path:
    """The listed image below `root`, by the longest tail of its path that is there."""
    parts = [part for part in PurePosixPath(path).parts if part != "/"]
    for start in range(len(parts)):
        candidate = root.joinpath(*parts[start:])
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"The listed image {path} is not below {root}, under any tail of its path; check image_root."
    )
