"""Images to classify, as a command names them: files, folders, patterns, a table, a data set."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from fewshot_diti.data.folders import IMAGE_SUFFIXES, is_image, visible_files, walk_files
from fewshot_diti.data.hub import load_hub_images
from fewshot_diti.data.image_set import ImageSet, SplitError, unlabelled
from fewshot_diti.data.tables import listed_files, manifest_place, read_manifest
from fewshot_diti.shards import Listing, Shard

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
    if (stored := _stored(named, split, image_column)) is not None:
        return stored, []
    paths: list[str] = []
    others: list[Path] = []
    for path, usable in _files(named, visible_files):
        paths.append(path) if usable else others.append(Path(path))
    if not any(map(os.path.lexists, paths)):
        raise FileNotFoundError(f"There is no image file or folder {paths[0]}; check the path.")
    once = tuple(dict.fromkeys(paths))
    return unlabelled(once, once), others


def list_shard(
    named: Sequence[str], shard: Shard, split: str | None = None, image_column: str | None = None
) -> tuple[ImageSet, Listing]:
    """The images of a shard in alphabetical order, and what tells whether another job has seen the same images.

    Memory holds the names of the shard and of one folder at a time; tables and data sets are read whole.

    Args:
        named: one folder, table or data set, as of `list_images`.

    Raises:
        FileNotFoundError, ValueError: as `list_images`, or something else is named.
    """
    listing = Listing()

    def mine(name: str) -> bool:
        listing.add(name)
        return shard.holds(name)

    if (stored := _stored(named, split, image_column)) is not None:
        return stored.subset(row for row, name in enumerate(stored.names) if mine(name)), listing
    if len(named) > 1 or not (os.path.isdir(named[0]) or named[0].startswith("manifest:")):
        raise ValueError(f"{' '.join(named[:2])}: a shard is of one folder, manifest:FILE or hub:ID; pass that alone.")
    paths = tuple(sorted(path for path, usable in _files(named, walk_files) if usable and mine(path)))
    if paths and not any(map(os.path.lexists, paths)):
        raise FileNotFoundError(f"There is no image file {paths[0]}; check the path.")
    return unlabelled(paths, paths), listing


def _stored(named: Sequence[str], split: str | None, image_column: str | None) -> ImageSet | None:
    """The images of hub:ID; None where files are named."""
    kinds = {text.partition(":")[0] for text in named if not os.path.lexists(text)}
    if "hub" in kinds:
        if len(named) > 1:
            raise ValueError(f"{named[0]} and {named[1]}; pass a data set by itself.")
        return load_hub_images(named[0].removeprefix("hub:"), split, image_column or "image")
    if split is not None or image_column is not None:
        raise SplitError(f"{named[0]} has neither splits nor columns; pass them with hub:ID alone.")
    return None


def _files(named: Sequence[str], walk: Callable[[Path], Iterable[Path]]) -> Iterator[tuple[str, bool]]:
    """The files that are named, and whether each is an image; `walk` lists those of a folder."""
    for text in _without_patterns(named):
        if text.startswith("manifest:") and not os.path.lexists(text):
            file, folder = manifest_place(text.removeprefix("manifest:"))
            for path in dict.fromkeys(listed_files(file, folder, read_manifest(file, ("path",)))):
                yield str(path), True
        elif (root := Path(text)).is_dir():
            usable = False
            for path in walk(root):
                usable |= (found := is_image(path))
                yield str(path), found
            if not usable:
                raise FileNotFoundError(f"{text} holds no images ({', '.join(IMAGE_SUFFIXES)}); name another folder.")
        else:
            yield str(root), True


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
