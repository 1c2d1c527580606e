"""Images of a `datasets` data set: from the hub, a local folder, or one that `save_to_disk` wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import datasets
import numpy as np
from pyarrow.lib import ArrowException

from fewshot_diti.data.image_set import ImageSet, check_has_split, check_one_of, index_labels, unlabelled
from fewshot_diti.data.images import ImageSource


def load_hub(
    id_or_path: str, split: str | None = None, image_column: str = "image", label_column: str = "label"
) -> ImageSet:
    """A split of a `datasets` data set, by hub id, local folder, or folder written by `save_to_disk`.

    ClassLabel names become the class names; other labels become texts, and then only those of this split are known.
    Scalar columns become attributes.

    Raises:
        ValueError: no such split or column, no row, or an image without a label.
    """
    stored = _load(id_or_path, split)
    for column in (image_column, label_column):
        check_one_of(f"column of {id_or_path}", column, stored.column_names)
    images = _image_column(stored, id_or_path, image_column)
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
    return ImageSet(
        images=images,
        labels=labels,
        class_names=class_names,
        names=_row_names(id_or_path, split, len(images)),
        attributes=texts,
    )


def load_hub_images(id_or_path: str, split: str | None = None, image_column: str = "image") -> ImageSet:
    """The images of a split, without labels; otherwise as `load_hub`."""
    stored = _load(id_or_path, split)
    check_one_of(f"column of {id_or_path}", image_column, stored.column_names)
    images = _image_column(stored, id_or_path, image_column)
    return unlabelled(images, _row_names(id_or_path, split, len(images)))


class StoredImages(Sequence[ImageSource]):
    """The images of a `datasets.Dataset`, each read when it is asked for.

    Raises:
        ValueError: not one column of images, or a row without an image when it is asked for.
    """

    def __init__(self, stored: datasets.Dataset) -> None:
        self._images = _image_column(stored, "the data set", _name_of_images(stored))

    @staticmethod
    def can_hold(images: object) -> TypeGuard[datasets.Dataset]:
        """Whether these images are a data set."""
        return isinstance(images, datasets.Dataset)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, row: Any) -> Any:
        return [image() for image in self._images[row]] if isinstance(row, slice) else self._images[row]()


def is_stream(images: object) -> TypeGuard[datasets.IterableDataset]:
    """Whether these images are a data set that is read from its first row to its last."""
    return isinstance(images, datasets.IterableDataset)


def streamed_images(stream: datasets.IterableDataset) -> Iterator[ImageSource]:
    """The images of a `datasets.IterableDataset`, one at a time in memory.

    Raises:
        ValueError: not one column of images, or, when it comes, a row without an image.
    """
    if stream.features is None:
        raise ValueError(
            "The streamed data set does not know what its columns hold, as after a map; give it features, as in "
            "stream.cast(datasets.Features(image=datasets.Image()))."
        )
    column = _name_of_images(stream)
    stream = stream.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return (_image_in(cells[column]) for cells in stream)


def _name_of_images(stored: datasets.Dataset | datasets.IterableDataset) -> str:
    """The one column of images; raises ValueError where there are none or several."""
    columns = [name for name, feature in stored.features.items() if isinstance(feature, datasets.Image)]
    if len(columns) != 1:
        raise ValueError(
            f"The data set has {len(columns)} columns of images ({', '.join(stored.column_names)} in all); pass "
            "one with select_columns, or cast it with cast_column(name, datasets.Image())."
        )
    return columns[0]


def _load(id_or_path: str, split: str | None) -> datasets.Dataset:
    """A split with its rows; raises ValueError where there is no such split, or no row."""
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
        try:
            stored = datasets.load_dataset(id_or_path, split=split)
        except RuntimeError as error:  # a data set whose loading is a program
            raise ValueError(f"{id_or_path} cannot be loaded ({error}); pass a data set of files.") from error
    if isinstance(stored, datasets.DatasetDict):
        check_has_split(id_or_path, split, list(stored))
        stored = stored[split]
    if not len(stored):
        raise ValueError(f"{id_or_path} {split or ''} holds no images; pass another data set or split.")
    return stored


def _image_column(stored: datasets.Dataset, name: str, column: str) -> list[Callable[[], ImageSource]]:
    """The images of a column, each read when it is called; raises ValueError where the column holds none."""
    try:  # they are decoded by `decode`, as all images are
        stored = stored.cast_column(column, datasets.Image(decode=False))
    except (ArrowException, TypeError) as error:
        raise ValueError(
            f"Column {column!r} of {name} holds {stored.features[column]}, not images; name the one that does, as in "
            "hub:ID@image,label."
        ) from error
    cells = stored[column]  # lazy: an image is read when its row is asked for
    return [partial(_stored_image, cells, row) for row in range(len(stored))]


def _row_names(id_or_path: str, split: str | None, count: int) -> tuple[str, ...]:
    return tuple(f"{id_or_path} {split or ''} row {row}".replace("  ", " ") for row in range(count))


def _stored_image(column: Sequence[dict[str, Any] | None], row: int) -> ImageSource:
    """The image in a row of a data set's column."""
    return _image_in(column[row])


def _image_in(cell: dict[str, Any] | None) -> ImageSource:
    """The file of an image in a cell of a data set: its bytes, or its path; raises ValueError for an empty cell."""
    if cell is None or (cell["bytes"] is None and not cell["path"]):
        raise ValueError("the row has no image; filter such rows out")
    return cell["path"] if cell["bytes"] is None else cell["bytes"]


def _texts(stored: datasets.Dataset, column: str) -> tuple[str, ...]:
    """A scalar column as texts, ClassLabels by name; "" for None and for ClassLabel's -1 (no label)."""
    feature, values = stored.features[column], list(stored[column])
    if isinstance(feature, datasets.ClassLabel):
        return tuple("" if value is None or value < 0 else feature.int2str(value) for value in values)
    return tuple("" if value is None else str(value) for value in values)
