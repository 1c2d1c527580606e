"""Sources of labelled images: FGVC-Aircraft's layout, manifests, the hub, the bundled images; `load_images` for all."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from fewshot_diti.data.benchmarks import load_duke, load_isic2019, load_veri
from fewshot_diti.data.folders import folder_splits, load_folder, raise_no_layout
from fewshot_diti.data.hub import load_hub
from fewshot_diti.data.image_set import ImageSet, check_has_split, check_one_of, image_files_set
from fewshot_diti.data.tables import listed_files, manifest_place, read_csv, read_manifest, read_utf8
from fewshot_diti.files import shipped

FgvcLevel = Literal["variant", "family", "manufacturer"]
FgvcSplit = Literal["train", "val", "trainval", "test"]

_SPECS = (
    "DIR (a folder with one sub-folder of images per class), bundled, fgvc:DIR[@level], isic2019:DIR, veri:DIR, "
    "duke:DIR, folder:DIR, manifest:FILE[@DIR], hub:ID[@image_column,label_column]"
)
_BENCHMARKS = {"isic2019": load_isic2019, "veri": load_veri, "duke": load_duke}
_ONE_AIRLINE = {"Hop!": "Hop", "American Airlines": "American"}


def load_fgvc(folder: str | Path, split: str, level: str = "variant") -> ImageSet:
    """FGVC-Aircraft in its official directory layout; variant, family and manufacturer are attributes at every level.

    An `attributes.csv` (first column `image`) beside the lists adds its columns; a column `airline` is normalised.

    Args:
        folder: the folder that holds `images/`, or its parent (where that folder is called `data`).
        split: train, val, trainval or test.
        level: variant, family or manufacturer.

    Raises:
        FileNotFoundError: the layout is not there.
        ValueError: an unknown split or level.
    """
    check_one_of("split", split, get_args(FgvcSplit))
    check_one_of("level", level, get_args(FgvcLevel))
    candidates = [Path(folder), Path(folder) / "data"]
    root = next((c for c in candidates if (c / "images").is_dir()), None)
    if root is None or not (root / f"images_{level}_{split}.txt").is_file():
        raise_no_layout(
            folder,
            f"FGVC-Aircraft: it or its data/ must hold images/ and images_{level}_{split}.txt. Unpack "
            "fgvc-aircraft-2013b.tar.gz (https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/) and pass its folder.",
        )
    lists = {
        key: _read_fgvc_list(path)
        for key in get_args(FgvcLevel)
        if (path := root / f"images_{key}_{split}.txt").is_file()
    }
    images = list(lists[level])
    if not images:
        raise ValueError(f"{root / f'images_{level}_{split}.txt'} lists no images; unpack the data set again.")
    attributes = {key: tuple(by_image.get(image, "") for image in images) for key, by_image in lists.items()}
    if (root / "attributes.csv").is_file():
        table = read_csv(root / "attributes.csv")
        if table and "image" not in table[0]:
            raise ValueError(f"{root / 'attributes.csv'} has the columns {list(table[0])}; one must be image.")
        rows = {row["image"]: row for row in table}
        for key in dict.fromkeys(key for row in rows.values() for key in row if key not in ("image", *lists)):
            attributes[key] = tuple(rows.get(image, {}).get(key, "") for image in images)
    if "airline" in attributes:
        attributes["airline"] = tuple(normalize_airline(name) for name in attributes["airline"])
    plural = {"variant": "variants", "family": "families", "manufacturer": "manufacturers"}[level]
    if not (root / f"{plural}.txt").is_file():
        raise FileNotFoundError(
            f"{root / f'{plural}.txt'} is missing: it lists the classes. Unpack the data set again."
        )
    known = [line.strip() for line in read_utf8(root / f"{plural}.txt").splitlines() if line.strip()]
    unknown = sorted(set(attributes[level]) - set(known))
    if unknown:
        raise ValueError(f"images_{level}_{split}.txt of {root} names {unknown}, which {plural}.txt does not list.")
    paths = [root / "images" / f"{image}.jpg" for image in images]
    return ImageSet(
        images=paths,
        labels=np.array([known.index(name) for name in attributes[level]], dtype=np.int64),
        class_names=tuple(known),
        names=tuple(map(str, paths)),
        attributes=attributes,
    )


def load_manifest(file: str | Path, split: str | None = None, image_root: str | Path | None = None) -> ImageSet:
    """A CSV, JSON (a list of objects) or JSONL table with `path`, `label`, optionally `split`; others are attributes.

    The classes are those of all splits, so that labels agree between them.

    Args:
        file: the table.
        split: which rows to take.
        image_root: folder that relative paths start from, by default the table's own. A path that leads out of it is
            refused, so that a table from elsewhere cannot name any file of this machine.

    Raises:
        FileNotFoundError: the manifest or an image is missing.
        ValueError: another file type, no row, a row without path or label, a path that leads out of the folder, a split
            that is not there, or a row without one where others have it.
    """
    file = Path(file)
    root = file.parent if image_root is None else Path(image_root)
    rows = read_manifest(file)
    splits = list(dict.fromkeys(row["split"] for row in rows if row.get("split")))
    if splits and (without := [n for n, row in enumerate(rows, start=1) if not row.get("split")]):
        raise ValueError(
            f"{len(without)} rows of {file} have no split, row {without[0]} first, and others have; name one of "
            f"{', '.join(splits)} in every row, or leave the column out."
        )
    check_has_split(str(file), split, splits)
    chosen = [row for row in rows if split is None or row.get("split") == split]
    paths = listed_files(file, root, chosen)
    if missing := [str(path) for path in paths if not os.path.isfile(path)]:
        raise FileNotFoundError(
            f"{file} names {len(missing)} images that are not there, {missing[0]} first; paths are relative to {root}."
        )
    columns = dict.fromkeys(key for row in rows for key in row if key not in ("path", "label"))
    return image_files_set(
        paths,
        [row["label"] for row in chosen],
        [row["label"] for row in rows],
        {key: tuple(row.get(key, "") for row in chosen) for key in columns},
    )


def load_bundled(split: str = "train") -> ImageSet:
    """The images that ship: 12 aircraft variants with 24 train and 20 test images each (half in train's liveries).

    Raises:
        ValueError: a split other than train and test.
    """
    check_one_of("split", split, ("train", "test"))
    folder = shipped("aircraft")
    table = read_csv(folder / "attributes.csv")
    rows = [row for row in table if row["split"] == split]
    return image_files_set(
        [folder / "images" / f"{row['image']}.jpg" for row in rows],
        [row["variant"] for row in rows],
        [row["variant"] for row in table],
        {key: tuple(row[key] for row in rows) for key in table[0] if key != "image"},
    )


def load_images(spec: str, split: str | None = None) -> ImageSet:
    """Images by a one-line description, as commands and recipes take it.

    Args:
        spec: a folder; bundled; fgvc:DIR[@level]; isic2019:DIR; veri:DIR; duke:DIR; folder:DIR; manifest:FILE[@DIR],
            where DIR is the folder that the images lie in; hub:ID[@image_column,label_column].
        split: as the source names its splits; None for a source without any.

    Raises:
        FileNotFoundError, ValueError: another description, or as the source's own loader.
    """
    kind, _, place = spec.partition(":")
    if spec == "bundled" or (kind in ("fgvc", *_BENCHMARKS) and place):
        if split is None:
            raise ValueError(f"{spec} has splits; pass one, such as train or test.")
        if spec == "bundled":
            return load_bundled(split)
        if kind in _BENCHMARKS:
            return _BENCHMARKS[kind](place, split)
        folder, _, level = place.rpartition("@")
        return load_fgvc(folder, split, level) if level in get_args(FgvcLevel) else load_fgvc(place, split)
    if kind == "folder" and place:
        return load_folder(place, split)
    if kind == "manifest" and place:
        file, root = manifest_place(place)
        return load_manifest(file, split, root)
    if kind == "hub" and place:
        id_or_path, _, columns = place.rpartition("@")
        return load_hub(id_or_path, split, *columns.split(",")) if columns.count(",") == 1 else load_hub(place, split)
    if spec and (":" not in spec or re.match(r"[A-Za-z]:[\\/]", spec) or os.path.lexists(spec)):
        return load_folder(spec, split)
    raise ValueError(f"Images {spec!r}; pass one of {_SPECS}.")


def training_splits(spec: str) -> tuple[str | None, str | None]:
    """The splits that are trained on and validated on where none is named: train, and val where the source has both.

    None for a folder that is one pool, and for manifests and the hub: theirs are named by the user.
    """
    kind, _, place = spec.partition(":")
    if kind == "fgvc" and place:
        folder, _, level = place.rpartition("@")
        folder, level = (folder, level) if level in get_args(FgvcLevel) else (place, "variant")
        lists = (root / f"images_{level}_val.txt" for root in (Path(folder), Path(folder) / "data"))
        return "train", "val" if any(path.is_file() for path in lists) else None
    if spec == "bundled" or (kind in _BENCHMARKS and place):
        return "train", None
    root = Path(place) if kind == "folder" and not os.path.isdir(spec) else Path(spec)
    splits = folder_splits(root) if root.is_dir() else []
    return ("train" if "train" in splits else None, "val" if {"train", "val"} <= set(splits) else None)


def normalize_airline(name: str) -> str:
    """One spelling an airline of the bundled renders: Hop! is Hop, American Airlines is American, Default is ""."""
    return "" if name.lower() == "default" else _ONE_AIRLINE.get(name, name)


def _read_fgvc_list(path: Path) -> dict[str, str]:
    """Image -> class of one of the official lists; raises ValueError naming a line without a class."""
    classes: dict[str, str] = {}
    for number, line in enumerate(read_utf8(path).splitlines(), start=1):
        image, _, name = line.strip().partition(" ")
        if image and not name:
            raise ValueError(f"Line {number} of {path} is {line!r}; it must hold an image and its class.")
        if image and classes.setdefault(image, name.strip()) != name.strip():
            raise ValueError(
                f"Line {number} of {path} gives image {image} the class {name.strip()!r}, an earlier line "
                f"{classes[image]!r}; keep one."
            )
    return classes
