"""Folders of images: which files are images, which sub-folders are classes, which are splits."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NoReturn, get_args

from fewshot_diti.data.image_set import ImageSet, check_has_split, image_files_set, normalize_class_name

FolderSplit = Literal["train", "val", "test"]

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".avif", ".jp2"),
)
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".zst")
_OF_IMAGES = "a folder with one sub-folder of images per class"
_TABLES = (".csv", ".json", ".jsonl")
_SPLIT_WORDS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
# Made by operating systems and network drives, beside the names that start with a dot.
_SYSTEM_NAMES = {
    *("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
    *("lost+found", "@eadir", "@recycle", "#recycle", "#snapshot"),
}


def load_folder(folder: str | Path, split: str | None = None) -> ImageSet:
    """A folder with one sub-folder of images per class, either one pool (no split) or below `train`, `val` and `test`.

    The classes are those of all splits, so that labels agree between them. Hidden files, what operating systems leave
    behind, and saved banks are ignored; of other files that are no images a warning gives the number. A file or folder
    that cannot be read is listed all the same: whoever decodes it gets the reason.

    Raises:
        FileNotFoundError: the folder is missing or holds no image, or is a file.
        ValueError: a split is asked of a pool, none of a folder with splits, or one that is not there; folders that may
            be splits or classes; FGVC-Aircraft's layout; or a class folder's name that is no class name.
    """
    root = Path(folder)
    check_folder(root)
    splits = folder_splits(root)
    _check_layout(root, splits)
    check_has_split(str(root), split, splits)
    pool = root / split if split else root
    class_names = [c.name for s in splits or ["."] for c in _class_folders(root / s)]
    for name in class_names:
        try:
            normalize_class_name(name)
        except ValueError as error:
            raise ValueError(f"A class folder in {root}: {error}") from error
    files = visible_files(pool)
    # A folder that cannot be listed stands among the files; right below the pool it is a class folder.
    paths = [p for p in files if is_image(p) and (len(p.relative_to(pool).parts) > 1 or os.path.isdir(p))]
    if not paths:
        raise FileNotFoundError(
            f"{pool} holds no class sub-folder with images ({', '.join(IMAGE_SUFFIXES)}); make one sub-folder of "
            "images per class."
        )
    if len(paths) < len(files):
        warnings.warn(
            f"{pool}: {passed_over(set(files) - set(paths))}; images lie in a class's sub-folder and end in "
            f"{', '.join(IMAGE_SUFFIXES)}.",
            stacklevel=2,
        )
    return image_files_set(paths, [p.relative_to(pool).parts[0] for p in paths], class_names)


def check_folder(path: str | Path, wanted: str = _OF_IMAGES) -> None:
    """Raises a FileNotFoundError that says what the path is and what is wanted, where it is no folder."""
    if os.path.isdir(path):
        return
    suffix = Path(path).suffix.lower()
    if not os.path.lexists(path):
        message = f"There is no folder {path}; check the path."
    elif suffix in _ARCHIVES:
        message = f"{path} is an archive, not a folder; unpack it and pass the folder."
    elif suffix in _TABLES and wanted == _OF_IMAGES:
        message = f"{path} is a file, not a folder; a table of images is passed as manifest:{path}"
    elif os.path.islink(path) and not os.path.exists(path):
        message = f"{path} is a link to {os.readlink(path)}, which is not there; mend the link or pass a folder."
    else:
        message = f"{path} is a file, not a folder; pass {wanted}."
    raise FileNotFoundError(message)


def raise_no_layout(folder: str | Path, layout: str) -> NoReturn:
    """Raises a FileNotFoundError: the folder of a data set is missing, or does not hold it; `layout` begins with the
    data set's name and says what its folder holds and where to get it."""
    try:
        check_folder(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} It should hold {layout}") from None
    raise FileNotFoundError(f"{folder} is not {layout}")


def folder_splits(root: Path) -> list[str]:
    """Which of train, val and test stand in a folder with class sub-folders of their own."""
    return [s for s in get_args(FolderSplit) if os.path.isdir(root / s) and _class_folders(root / s)]


def is_image(path: Path) -> bool:
    """Whether a path from `visible_files` is to be opened as an image: its name ends as an image's, or it is a folder
    that cannot be listed, which gives its reason where it is opened."""
    return path.suffix.lower() in IMAGE_SUFFIXES or os.path.isdir(path)


def visible_files(root: Path) -> list[Path]:
    """`walk_files` in alphabetical order."""
    return sorted(walk_files(root))


def walk_files(root: Path) -> Iterator[Path]:
    """All files below a folder, one at a time, without hidden and system files and folders, and saved banks.

    Each folder is listed once. Links to folders are followed, after the folders that lie there themselves, except to a
    folder that they stand in. Nothing that lies in the folder is an error here: links to nothing, named pipes and
    devices count as files, and a sub-folder that cannot be listed is itself in the list.

    Raises:
        OSError: the folder itself cannot be listed.
    """
    seen: set[tuple[int, int]] = set()
    folders, links = [root], list[Path]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        try:
            status = folder.stat()
            with os.scandir(folder) as entries:
                inside = sorted(entries, key=lambda entry: entry.name)
        except OSError:
            if folder == root:
                raise
            yield folder
            continue
        if (status.st_dev, status.st_ino) in seen or (folder != root and _is_bank(folder)):
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in inside:
            path = folder / entry.name
            if not _is_visible(entry.name):
                continue
            if not os.path.isdir(path):
                yield path
            elif not entry.is_symlink():
                folders.append(path)
            elif not folder.resolve().is_relative_to(path.resolve()):
                links.append(path)


def passed_over(files: Iterable[Path]) -> str:
    """How many files are passed over, by suffix."""
    suffixes = Counter(path.suffix.lower() or "no suffix" for path in files)
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in sorted(suffixes.items()))
    return f"{'1 file is' if suffixes.total() == 1 else f'{suffixes.total()} files are'} passed over ({kinds})"


def _is_visible(name: str) -> bool:
    return name[0] != "." and name.lower() not in _SYSTEM_NAMES


def _is_bank(folder: Path) -> bool:
    return os.path.isfile(folder / "manifest.json") and (
        os.path.isfile(folder / "bank.json") or os.path.isfile(folder / "class_tokens.safetensors")
    )


def _class_folders(folder: Path) -> list[Path]:
    return [c for c in folder.iterdir() if _is_visible(c.name) and os.path.isdir(c) and not _is_bank(c)]


def _check_layout(root: Path, splits: Sequence[str]) -> None:
    """Raises ValueError where sub-folders may be splits or classes, or where the folder has FGVC-Aircraft's layout."""
    if (root / "images").is_dir() and any(root.glob("images_*_*.txt")):
        raise ValueError(f"{root} has FGVC-Aircraft's layout, not one sub-folder per class; pass fgvc:{root}.")
    folders = sorted(c.name for c in _class_folders(root))
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
            f"{', '.join(get_args(FolderSplit))}, each with one sub-folder per class."
        )
