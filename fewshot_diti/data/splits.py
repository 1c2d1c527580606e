"""Splits that other projects published as path lists: CoOp's JSON, TiF's split files, plain text."""

from __future__ import annotations

import io
import os
import pickletools
import re
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from fewshot_diti.data.folders import IMAGE_SUFFIXES
from fewshot_diti.data.image_set import ImageSet, index_labels
from fewshot_diti.data.shots import Shots
from fewshot_diti.data.tables import decode_utf8, find_file, parse_json

_LINE = re.compile(rf"(.+?(?:{'|'.join(map(re.escape, IMAGE_SUFFIXES))}))(?:\s+(\S.*))?", re.IGNORECASE)
_STRUCTURE = ("PROTO", "EMPTY_LIST", "EMPTY_DICT", "MARK", "SETITEM", "SETITEMS", "APPEND", "APPENDS", "STOP")
_MAX_BYTES = 2**27  # of a list in an archive
_NO_PICKLES = (
    "is a pickle, and pickles are never read: they can run any code. Draw shots with sample_shots, or write the paths "
    "to a text file, one 'path label' a line."
)


def import_path_list(file: str | Path, image_root: str | Path, split: str = "train") -> ImageSet:
    """The images of a published split; `load_shots_file` turns a few-shot list into `Shots`.

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
        entries = known = _text_entries(decode_utf8(content, file), str(file))
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


def load_shots_file(path: str | Path, pool: ImageSet, image_root: str | Path | None = None) -> Shots:
    """Shots that someone else has drawn, as images of a pool: a file of `Shots.save`, or a list of `import_path_list`.

    The images are found in the pool by their pixels, so that the pool may have other file names and another order.
    They keep the order of the list; their classes are the pool's, which may have other names than in the list.

    Args:
        path: the file; of CoOp's lists the train list is taken.
        pool: the images that the shots are among.
        image_root: folder that the list's paths start from; by default the deepest folder that holds all of the pool's
            files, or where these are no files the list's own.

    Raises:
        FileNotFoundError: the list or one of its images is not there.
        ValueError: the file is neither, an image is not in the pool, or the list and the pool put images into classes
            in different ways.
    """
    path = Path(path)
    if path.suffix.lower() == ".json" and b'"image_ids"' in path.read_bytes():
        shots = Shots.load(path)
        shots.rows(pool)
        return shots
    listed = import_path_list(path, _folder_of(pool, path.parent) if image_root is None else image_root)
    rows: dict[str, list[int]] = {}
    for row, image in enumerate(pool.ids):
        rows.setdefault(image, []).append(row)
    missing = [(name, image) for name, image in zip(listed.names, listed.ids, strict=True) if image not in rows]
    if missing:
        raise ValueError(
            f"{path} lists {len(missing)} images whose pictures are not among the {len(pool)} of the pool "
            f"({', '.join(pool.names[:2])}, ...), first {missing[0][0]} (image id {missing[0][1]}); pass the images "
            "that the list was made from."
        )
    pool_class: dict[str, tuple[str, str]] = {}  # the list's class -> the pool's, and the image that shows it
    ids: dict[str, list[str]] = {}
    for image, label, name in zip(listed.ids, listed.labels, listed.names, strict=True):
        theirs, classes = listed.class_names[label], [pool.class_names[pool.labels[row]] for row in rows[image]]
        mine = theirs if theirs in classes else classes[0]
        known, first = pool_class.setdefault(theirs, (mine, name))
        if known != mine:
            raise ValueError(
                f"{path} has {first} and {name} in one class, {theirs!r}, and the pool in two, {known!r} and {mine!r}; "
                "pass the images that the list was made from."
            )
        if image not in ids.setdefault(mine, []):
            ids[mine].append(image)
    if len(ids) < len(pool_class):
        raise ValueError(
            f"{path} has {len(pool_class)} classes of images that are {len(ids)} classes of the pool: "
            f"{', '.join(f'{theirs!r} is {mine!r}' for theirs, (mine, _) in list(pool_class.items())[:5])}; pass the "
            "images that the list was made from."
        )
    counts = {len(drawn) for drawn in ids.values()}
    return Shots(
        k=counts.pop() if len(counts) == 1 else "all",
        seed=0,
        image_ids={name: tuple(ids[name]) for name in pool.class_names if name in ids},
    )


def _folder_of(pool: ImageSet, otherwise: Path) -> Path:
    """The deepest folder that holds all images of a pool, where they are files."""
    paths = [os.path.abspath(image) for image in pool.images if isinstance(image, str | Path)]
    return Path(os.path.commonpath(map(os.path.dirname, paths))) if paths else otherwise


def _coop_lists(content: bytes, file: str) -> dict[str, list[tuple[str, int, str]]]:
    """(path, label, class name) of each entry, by split."""
    lists = parse_json(decode_utf8(content, file), file)
    try:
        return {
            split: [(str(path), int(label), str(class_name)) for path, label, class_name in entries]
            for split, entries in lists.items()
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
        if archive.getinfo(programs[0]).file_size > _MAX_BYTES:
            raise ValueError(f"{file} unpacks to more than {_MAX_BYTES} bytes; no split is that large.")
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
        candidate = find_file(root.joinpath(*parts[start:]))
        if ".." not in parts[start:] and candidate.is_file():
            return candidate
    raise FileNotFoundError(
        f"The listed image {path} is not below {root}, under any tail of its path; check image_root."
    )
