"""Folders of images: which files are images, which sub-folders classes, which splits."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, get_args

from fewshot_diti.data.image_set import ImageSet, check_has_split, index_labels

FolderSplit = Literal["train", "val", "test"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".avif")
_SPLIT_WORDS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}


def load_folder(folder: str | Path, split: str | None = None) -> ImageSet:
    """A folder of class sub-folders, either one pool (no split) or below `train`, `val` and `test` folders.

    The classes are those of all splits, so that labels agree between them. Hidden files are passed over; of others that
    are, such as loose images beside the class folders, a warning gives the number.

    Raises:
        FileNotFoundError: the folder is missing or holds no image.
        ValueError: a split is asked of a pool, none of a folder with splits, or one that is not there; folders that may
            be splits or classes; FGVC-Aircraft's layout; or the name of a class folder is not UTF-8.
    """
    root = Path(folder)
    if not root.is_dir():
        way_out = f"it is a file: a table of images is manifest:{root}" if root.is_file() else "check the path"
        raise FileNotFoundError(f"There is no folder {root} with one sub-folder of images a class; {way_out}.")
    splits = folder_splits(root)
    _check_layout(root, splits)
    check_has_split(str(root), split, splits)
    pool = root / split if split else root
    class_folders = [c for s in splits or ["."] for c in (root / s).iterdir() if c.is_dir() and c.name[0] != "."]
    files = visible_files(pool)
    paths = [p for p in files if is_image(p) and len(p.relative_to(pool).parts) > 1]
    if not paths:
        raise FileNotFoundError(
            f"{pool} holds no class sub-folder with images ({', '.join(IMAGE_SUFFIXES)}); make one sub-folder a class."
        )
    if len(paths) < len(files):
        warnings.warn(
            f"{pool}: {passed_over(set(files) - set(paths))}; images lie in a class's sub-folder and end in "
            f"{', '.join(IMAGE_SUFFIXES)}.",
            stacklevel=2,
        )
    for name in {c.name for c in class_folders}:
        if not name.isprintable():  # as bytes that are no UTF-8 are not
            raise ValueError(f"The name of the class folder {name!r} in {root} is no printable UTF-8; rename it.")
    labels, class_names = index_labels([p.relative_to(pool).parts[0] for p in paths], [c.name for c in class_folders])
    return ImageSet(images=paths, labels=labels, class_names=class_names, names=tuple(map(str, paths)))


def folder_splits(root: Path) -> list[str]:
    """Which of train, val and test stand in a folder with class sub-folders of their own."""
    return [
        name
        for name in get_args(FolderSplit)
        if (root / name).is_dir() and any(c.is_dir() and c.name[0] != "." for c in (root / name).iterdir())
    ]


def _check_layout(root: Path, splits: Sequence[str]) -> None:
    """Raises ValueError where sub-folders may be splits or classes, or where the folder has FGVC-Aircraft's layout."""
    if (root / "images").is_dir() and any(root.glob("images_*_*.txt")):
        raise ValueError(f"{root} has FGVC-Aircraft's layout, not one sub-folder a class; pass fgvc:{root}.")
    folders = sorted(c.name for c in root.iterdir() if c.is_dir() and not c.name.startswith("."))
    if splits:
        others = [name for name in folders if name not in splits and any(map(is_image, visible_files(root / name)))]
        if others:
            raise ValueError(
                f"{root} has the splits {', '.join(splits)} and beside them images in {', '.join(others)}; splits are "
                f"called {', '.join(get_args(FolderSplit))}. Rename or move what is none."
            )
    elif folders and {name.lower() for name in folders} <= _SPLIT_WORDS:
        raise ValueError(
            f"The sub-folders of {root} ({', '.join(folders)}) are named as splits, not as classes; call them "
            f"{', '.join(get_args(FolderSplit))}, each with one sub-folder a class."
        )


def is_image(path: Path) -> bool:
    """Whether a file's name ends as an image's."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def visible_files(root: Path) -> list[Path]:
    """All files below a folder in alphabetical order, without hidden ones and those in hidden folders.

    Links to folders are followed, except into a folder that they stand in; a link to nothing counts as a file, so that
    whoever opens it can name it.
    """
    found = []
    for folder, inside, names in os.walk(root, followlinks=True):
        here = Path(folder)
        inside[:] = [
            name
            for name in inside
            if name[0] != "."
            and not ((here / name).is_symlink() and here.resolve().is_relative_to((here / name).resolve()))
        ]
        paths = (here / name for name in names if name[0] != ".")
        found += [path for path in paths if path.is_file() or path.is_symlink()]
    return sorted(found)


def passed_over(files: Iterable[Path]) -> str:
    """How many files are passed over, by suffix."""
    suffixes = Counter(path.suffix.lower() or "no suffix" for path in files)
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(suffixes.items()))
    return f"{suffixes.total()} files are passed over ({kinds})"
