"""`fewshot-diti explain`: why images get their labels, a picture of each."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import Positional, arg

from fewshot_diti.backbone import DtypeName
from fewshot_diti.bank_files import bank_fingerprint
from fewshot_diti.commands.loading import check_can_choose, check_counts, load_classifier
from fewshot_diti.data.folders import IMAGE_SUFFIXES, passed_over
from fewshot_diti.data.unlabelled import list_images
from fewshot_diti.explain import Explanation
from fewshot_diti.files import alone_in, check_writable, write_atomically
from fewshot_diti.hub import saved_folder
from fewshot_diti.lora_files import file_names
from fewshot_diti.progress import Progress
from fewshot_diti.reports import printable

RECORDS = "explanations.jsonl"


@dataclass(frozen=True, kw_only=True)
class ExplainConfig:
    """Explains predictions: a picture for each image with the most similar shots of the most probable classes, what
    each source of evidence gives, and where on the image and at which timesteps the class tokens differ.

    Attributes:
        images: as `score` takes them.
        bank: folder that `fewshot-diti train` wrote, or user/repo on the hub.
        output_dir: folder that gets a PNG for each image, named by the image's file and id and by the bank, and
            explanations.jsonl with a line of figures for each image. Those of an earlier explain stay, but for images
            explained again by the same bank; no other file is replaced.
        top: classes that are named.
        split: of hub:ID.
        image_column: of hub:ID, by default image.
        backbone: folder or hub id of the bank's backbone, where it has moved since.
        dtype: of U-Net and text encoder; auto is bfloat16 where the hardware has it, else float32.
        batch_size: evaluations in one forward; lower it where memory runs out. By default as at training.
        quiet: prints nothing but errors and warnings.

    Raises:
        ValueError: a value is out of its range.
    """

    images: Annotated[Positional[tuple[str, ...]], arg(metavar="IMAGE_OR_DIR...")]
    bank: str
    output_dir: Path
    top: int = 3
    split: str | None = None
    image_column: str | None = None
    backbone: str | None = None
    dtype: DtypeName = "auto"
    batch_size: int | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.top < 2:
            raise ValueError(f"top={self.top}; pass 2 or more classes to compare.")
        check_counts(self, "batch_size")
        if not self.images:
            raise ValueError("No images; name image files or folders.")


def explain(config: ExplainConfig, console: Console) -> int:
    """Writes the pictures; returns 1 where an image cannot be read.

    Raises:
        OSError, ValueError: an image path, the bank or its backbone cannot be loaded.
    """
    images, others = list_images(config.images, config.split, config.image_column)
    folder = saved_folder(config.bank)
    bank = bank_fingerprint(folder)
    classifier = load_classifier(folder, config.backbone, config.dtype, config.batch_size)
    check_can_choose(classifier, config.bank)
    check_writable(config.output_dir)
    records = config.output_dir / RECORDS
    _lines(records)  # refuses a file of another origin before any work
    explained = 0
    with Progress(len(images), "explanations", "image") as bar:
        for row, path in enumerate(images.names):
            try:
                image = classifier.encoder_.prepare(images.decode(row))
                explanation = classifier.explain(image, config.top)
            except (OSError, ValueError) as error:
                console.out(f"not explained: {printable(str(error))}")
                continue
            [stem] = file_names([Path(path).stem]).values()
            # no file of the user's, and the same whenever it is written again
            name = f"{stem}-{image.id[:12]}-{bank[:8]}.png"
            write_atomically(config.output_dir / name, explanation.figure())
            record = {"path": path, "picture": name, "bank": bank, **_record(explanation)}
            with alone_in(config.output_dir):  # another explain may write there too
                lines = _lines(records) | {(path, name): json.dumps(record)}
                write_atomically(records, "".join(f"{line}\n" for line in lines.values()).encode())
            explained += 1
            bar.update()
            label, picture = printable(str(explanation.label)), printable(str(config.output_dir / name))
            console.out(f"{printable(path)}: {label}, {picture}")
    if others:
        console.out(f"{printable(passed_over(others))}; images end in {', '.join(IMAGE_SUFFIXES)}")
    return 1 if explained < len(images) else 0


def _lines(file: Path) -> dict[tuple[str, str], str]:
    """What is known of each image and its picture; raises a ValueError where no `explain` wrote the file."""
    if not os.path.lexists(file):
        return {}
    try:
        records = [(json.loads(line), line) for line in file.read_text("utf-8").splitlines()]
        return {(str(record["path"]), str(record["picture"])): line for record, line in records}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{file} is there already and no output of explain; remove it, or pass another --output_dir."
        ) from error


def _record(x: Explanation) -> dict[str, object]:
    """What JSON holds of an explanation: all but the pictures."""
    return {
        "label": x.label,
        "rival": x.rival,
        "probabilities": {str(label): p for label, p in x.probabilities.items()},
        "sources": {name: {str(label): p for label, p in of.items()} for name, of in x.sources.items()},
        "neighbours": {
            str(label): [{"place": n.place, "similarity": n.similarity} for n in found]
            for label, found in x.neighbours.items()
        },
        "timesteps": list(x.timesteps),
        "differences": x.differences.tolist(),
        "standard_errors": x.standard_errors.tolist(),
    }
