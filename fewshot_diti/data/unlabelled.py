"""Images to classify, as a command names them: files, folders, patterns, a table, a data set."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from fewshot_diti.data.folders import IMAGE_SUFFIXES, is_image, visible_files
from fewshot_diti.data.hub import load_hub_images
from fewshot_diti.data.image_set import ImageSet, SplitError, unlabelled
from fewshot_diti.data.tables import listed_files, manifest_place, read_manifest

_PATTERN = "*?["


def list_images(
    named: Sequence[str], split: str | None = None, image_column: str | None = None
) -> tuple[ImageSet, list[Path]]:
    """Each image once, in the order named, folders in alphabetical order; and the folders' files that are no images.

    A path that is not there is listed beside others that are: it gets its reason where it is decoded.

    Args:
        named: image files; folders, searched at any depth; patterns, where no file has that name; manifest:FILE[@DIR],
            a table with the column path, relative to DIR or to the table's own folder; hub:ID, alone.
        split, image_column: of hub:ID; the column is by default "image".

    Raises:
        FileNotFoundError: none of the paths is there, a pattern matches nothing, or a folder without images.
        ValueError: a table or data set that cannot be read, or a split or column of other images.
    """
    kinds = {text.partition(":")[0] for text in named if not os.path.lexists(text)}
    if "hub" in kinds:
        if len(named) > 1:
            raise ValueError(f"{named[0]} and {named[1]}; pass a data set by itself.")
        return load_hub_images(named[0].removeprefix("hub:"), split, image_column or "image"), []
    if split is not None or image_column is not None:
        raise SplitError(f"{named[0]} has neither splits nor columns; pass them with hub:ID alone.")
    paths: list[str] = []
    others: list[Path] = []
    for text in _without_patterns(named):
        if text.startswith("manifest:") and not os.path.lexists(text):
            file, folder = manifest_place(text.removeprefix("manifest:"))
            paths += map(str, listed_files(file, folder, read_manifest(file, ("path",))))
        elif (root := Path(text)).is_dir():
            files = visible_files(root)
            inside = [str(path) for path in files if is_image(path)]
            if not inside:
                raise FileNotFoundError(f"{text} holds no images ({', '.join(IMAGE_SUFFIXES)}); name another folder.")
            paths += inside
            others += [path for path in files if not is_image(path)]
        else:
            paths.append(str(root))
    if not any(map(os.path.lexists, paths)):
        raise FileNotFoundError(f"There is no image file or folder {paths[0]}; check the path.")
    once = tuple(dict.fromkeys(paths))
    return unlabelled(once, once), others


def _without_patterns(named: Sequence[str]) -> list[str]:
    """Patterns replaced by the paths that they match, as a shell does it."""
    paths: list[str] = []
    for text in named:
        if os.path.lexists(text) or text.startswith("manifest:") or not any(c in text for c in _PATTERN):
            paths.append(text)
        elif found := sorted(glob.glob(text, recursive=True)):
            paths += found
        else:
            raise FileNotFoundError(f"The pattern {text} matches no file or folder; check it.")
    return paths
