"""Benchmarks beside FGVC-Aircraft that TiF (CVPR 2024) reports on: ISIC 2019, VeRi-776, DukeMTMC-reID."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from fewshot_diti.data.folders import raise_no_layout
from fewshot_diti.data.image_set import ImageSet, image_files_set
from fewshot_diti.data.tables import read_csv, read_utf8

ISIC2019_CLASSES = {
    "MEL": "Melanoma",
    "NV": "Melanocytic Nevus",
    "BCC": "Basal Cell Carcinoma",
    "AK": "Actinic Keratosis",
    "BKL": "Benign Keratosis-like Lesions",
    "DF": "Dermatofibroma",
    "VASC": "Vascular Lesion",
    "SCC": "Squamous Cell Carcinoma",
}
DUKE_PERSONS, DUKE_GALLERY_IMAGES = 150, 16


def load_isic2019(folder: str | Path, split: str) -> ImageSet:
    """ISIC 2019's official training images; half of each class is `test`, the rest `train`.

    The challenge's own test images are no part of it, as published. The published halves were drawn without a seed;
    here an image's half follows from its name in the ground truth.

    Args:
        folder: holds ISIC_2019_Training_Input/ and ISIC_2019_Training_GroundTruth.csv.

    Raises:
        FileNotFoundError: the layout or an image is not there.
        ValueError: another split, or a row of the ground truth without exactly one of the eight classes.
    """
    _check_split(split)
    images, table = Path(folder) / "ISIC_2019_Training_Input", Path(folder) / "ISIC_2019_Training_GroundTruth.csv"
    _check_layout(
        folder,
        (images, table),
        "ISIC 2019: it must hold ISIC_2019_Training_Input/ and ISIC_2019_Training_GroundTruth.csv. "
        "Get that table and ISIC_2019_Training_Input.zip (https://challenge.isic-archive.com/data/#2019), unpack the "
        "images beside the table and pass its folder.",
    )
    of_class: dict[str, list[str]] = {name: [] for name in ISIC2019_CLASSES.values()}
    rows = read_csv(table)
    missing = [c for c in ("image", *ISIC2019_CLASSES) if not rows or c not in rows[0]]
    if missing:
        raise ValueError(f"{table} lacks the columns {missing}; get it again from the challenge.")
    for row in rows:
        classes = [name for code, name in ISIC2019_CLASSES.items() if row[code] in ("1", "1.0")]
        if len(classes) != 1:
            raise ValueError(f"{table}: image {row['image']} has the classes {classes}; it must have exactly one.")
        of_class[classes[0]].append(row["image"])
    paths, names = [], []
    for name, members in of_class.items():
        members.sort(key=lambda image: hashlib.sha256(image.encode()).hexdigest())
        half = len(members) // 2
        chosen = members[:half] if split == "test" else members[half:]
        paths += [images / f"{image}.jpg" for image in chosen]
        names += [name] * len(chosen)
    return _image_set(paths, names, tuple(ISIC2019_CLASSES.values()))


def load_veri(folder: str | Path, split: str) -> ImageSet:
    """VeRi-776's test vehicles: `train` is the gallery (name_test.txt) without the queries, `test` the queries.

    Args:
        folder: holds image_test/, image_query/, name_test.txt and name_query.txt.

    Raises:
        FileNotFoundError: the layout or an image is not there.
        ValueError: another split.
    """
    _check_split(split)
    root = Path(folder)
    lists = {"train": root / "name_test.txt", "test": root / "name_query.txt"}
    _check_layout(
        folder,
        (root / "image_test", root / "image_query", *lists.values()),
        "VeRi-776: it must hold image_test/, image_query/, name_test.txt and name_query.txt. Ask its "
        "authors for VeRi.zip (https://github.com/JDAI-CV/VeRidataset), unpack it and pass its folder VeRi.",
    )
    names = {key: read_utf8(file).split() for key, file in lists.items()}
    queries = set(names["test"])
    names["train"] = [name for name in names["train"] if name not in queries]
    image_folder = root / ("image_test" if split == "train" else "image_query")
    vehicles = tuple(sorted({name[:4] for name in names["train"]}))
    return _image_set([image_folder / name for name in names[split]], [name[:4] for name in names[split]], vehicles)


def load_duke(folder: str | Path, split: str) -> ImageSet:
    """DukeMTMC-reID's test persons: `train` is the gallery, `test` the queries.

    As published, the 150 persons with the most queries among those with 16 gallery images or more; of persons with
    equally many, those with the smaller number.

    Args:
        folder: holds bounding_box_test/ and query/.

    Raises:
        FileNotFoundError: the layout is not there.
        ValueError: another split.
    """
    _check_split(split)
    gallery, query = Path(folder) / "bounding_box_test", Path(folder) / "query"
    _check_layout(
        folder,
        (gallery, query),
        "DukeMTMC-reID: it must hold bounding_box_test/ and query/. Its authors have withdrawn the "
        "data; where you hold a copy (DukeMTMC-reID.zip), unpack it and pass its folder DukeMTMC-reID.",
    )
    files = {"train": sorted(gallery.glob("*.jpg")), "test": sorted(query.glob("*.jpg"))}
    in_gallery = Counter(path.name[:4] for path in files["train"])
    queries = Counter(path.name[:4] for path in files["test"] if in_gallery[path.name[:4]] >= DUKE_GALLERY_IMAGES)
    persons = tuple(sorted(sorted(queries, key=lambda person: (-queries[person], person))[:DUKE_PERSONS]))
    chosen = [path for path in files[split] if path.name[:4] in persons]
    return _image_set(chosen, [path.name[:4] for path in chosen], persons)


def _image_set(paths: Sequence[Path], names: Sequence[str], class_names: tuple[str, ...]) -> ImageSet:
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(paths)} images are not there, {missing[0]} first.")
    return image_files_set(paths, names, class_names)


def _check_layout(folder: str | Path, parts: Sequence[Path], layout: str) -> None:
    if not all(part.exists() for part in parts):
        raise_no_layout(folder, layout)


def _check_split(split: str) -> None:
    if split not in ("train", "test"):
        raise ValueError(f"split {split!r}; pass one of train, test.")
