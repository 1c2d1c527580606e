"""Sources of labelled images: FGVC-Aircraft's layout, manifests, the hub, the bundled images; `load_images` for all."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import datasets
import numpy as np
from pyarrow.lib import ArrowException

from fewshot_diti.data.benchmarks import load_duke, load_isic2019, load_veri
from fewshot_diti.data.folders import find_file, folder_splits, load_folder, raise_no_layout
from fewshot_diti.data.image_set import ImageSet, check_has_split, image_files_set, index_labels
from fewshot_diti.data.images import ImageSource
from fewshot_diti.data.tables import read_csv, read_manifest, read_utf8
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
    _check("split", split, get_args(FgvcSplit))
    _check("level", level, get_args(FgvcLevel))
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
    paths = [find_file(root / row["path"]) for row in chosen]
    inside = os.path.join(os.path.abspath(root), "")
    if outside := [str(path) for path in paths if not os.path.abspath(path).startswith(inside)]:
        raise ValueError(
            f"{file} names {len(outside)} images that do not lie in {root}, {outside[0]} first; name the folder that "
            f"the images lie in: manifest:{file}@DIR."
        )
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


def load_hub(
    id_or_path: str, split: str | None = None, image_column: str = "image", label_column: str = "label"
) -> ImageSet:
    """A split of a `datasets` data set, by hub id, local folder, or folder written by `save_to_disk`.

    ClassLabel names become the class names; other labels become texts, and then only those of this split are known.
    Scalar columns become attributes.

    Raises:
        ValueError: no such split or column, no row, or an image without a label.
    """
    folder = Path(id_or_path)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        try:
            stored = datasets.load_from_disk(id_or_path)
        except IndexError as error:  # how `datasets` fails on a set without rows
            raise ValueError(f"{id_or_path} holds no images; pass another data set.") from error
        except (ArrowException, ValueError) as error:
            raise ValueError(f"{id_or_path} is damaged or cut short ({error}); save the data set again.") from error
        if isinstance(stored, datasets.Dataset):
            check_has_split(id_or_path, split, [str(stored.split)] if stored.split else [])
    else:
        stored = datasets.load_dataset(id_or_path, split=split)
    if isinstance(stored, datasets.DatasetDict):
        check_has_split(id_or_path, split, list(stored))
        stored = stored[split]
    if not len(stored):
        raise ValueError(f"{id_or_path} {split or ''} holds no images; pass another data set or split.")
    for column in (image_column, label_column):
        _check(f"column of {id_or_path}", column, stored.column_names)
    try:
        stored = stored.cast_column(
            image_column, datasets.Image(decode=False)
        )  # decoded by `decode`, as all images are
    except (ArrowException, TypeError) as error:
        raise ValueError(
            f"Column {image_column!r} of {id_or_path} holds {stored.features[image_column]}, not images; name the one "
            "that does, as in hub:ID@image,label."
        ) from error
    texts = {
        key: _texts(stored, key)
        for key, feature in stored.features.items()
        if key != image_column and isinstance(feature, datasets.Value | datasets.ClassLabel)
    }
    if label_column not in texts or stored.features[label_column].dtype.startswith("float"):
        raise ValueError(
            f"Column {label_column!r} of {id_or_path} holds {stored.features[label_column]}; labels are texts, whole "
            "numbers or ClassLabels. Name another column, as in hub:ID@image,label."
        )
    labels_as_text = texts.pop(label_column)
    if "" in labels_as_text:
        raise ValueError(f"Row {labels_as_text.index('')} of {id_or_path} has no {label_column}; filter such rows out.")
    feature = stored.features[label_column]
    if isinstance(feature, datasets.ClassLabel):
        class_names = tuple(feature.names)
        labels = np.array(feature.str2int(list(labels_as_text)), dtype=np.int64)
    else:
        labels, class_names = index_labels(labels_as_text)
    column = stored[image_column]  # lazy: an image is read when its row is asked for
    return ImageSet(
        images=[partial(_stored_image, column, row) for row in range(len(stored))],
        labels=labels,
        class_names=class_names,
        names=tuple(f"{id_or_path} {split or ''} row {row}".replace("  ", " ") for row in range(len(stored))),
        attributes=texts,
    )


def load_bundled(split: str = "train") -> ImageSet:
    """The images that ship: 12 aircraft variants with 24 train and 20 test images each (half in train's liveries).

    Raises:
        ValueError: a split other than train and test.
    """
    _check("split", split, ("train", "test"))
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
        file, _, root = place.rpartition("@")
        return load_manifest(file, split, root) if file and not Path(place).exists() else load_manifest(place, split)
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


def _check(what: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{what} {value!r}; pass one of {', '.join(allowed)}.")


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


def _stored_image(column: Sequence[dict[str, Any] | None], row: int) -> ImageSource:
    """The file of an image in a data set's column: its bytes, or its path; raises ValueError for an empty cell."""
    cell = column[row]
    if cell is None or (cell["bytes"] is None and not cell["path"]):
        raise ValueError("the row has no image; filter such rows out")
    return cell["path"] if cell["bytes"] is None else cell["bytes"]


def _texts(stored: datasets.Dataset, column: str) -> tuple[str, ...]:
    """A scalar column as texts, ClassLabels by name; "" for None and for ClassLabel's -1 (no label)."""
    feature, values = stored.features[column], list(stored[column])
    if isinstance(feature, datasets.ClassLabel):
        return tuple("" if value is None or value < 0 else feature.int2str(value) for value in values)
    return tuple("" if value is None else str(value) for value in values)
