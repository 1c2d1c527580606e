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
from fewshot_diti.commands.loading import check_can_choose, check_counts, load_classifier
from fewshot_diti.data.unlabelled import list_images
from fewshot_diti.explain import Explanation
from fewshot_diti.files import check_writable, write_atomically
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
        bank: folder that `fewshot-diti train` wrote.
        output_dir: folder that gets a PNG for each image, named by the image's file and id, and explanations.jsonl with
            the figures in it; that of an earlier explain is replaced, and no other file.
        top: classes that are named.
        backbone: folder or hub id of the bank's backbone, where it has moved since.
        dtype: of U-Net and text encoder; auto is bfloat16 where the hardware has it, else float32.
        batch_size: evaluations in one forward; lower it where memory runs out. By default as at training.
        quiet: prints nothing but errors and warnings.

    Raises:
        ValueError: a value is out of its range.
    """

    images: Annotated[Positional[tuple[str, ...]], arg(metavar="IMAGE_OR_DIR...")]
    bank: Path
    output_dir: Path
    top: int = 3
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
    images, _ = list_images(config.images)
    classifier = load_classifier(config.bank, config.backbone, config.dtype, config.batch_size)
    check_can_choose(classifier, config.bank)
    check_writable(config.output_dir)
    _check_records(config.output_dir / RECORDS)
    lines: list[str] = []
    try:
        with Progress(len(images), "explanations", "image") as bar:
            for row, path in enumerate(images.names):
                try:
                    image = classifier.encoder_.prepare(images.decode(row))
                    explanation = classifier.explain(image, config.top)
                except (OSError, ValueError) as error:
                    console.out(f"not explained: {printable(str(error))}")
                    continue
                finally:
                    bar.update()
                [stem] = file_names([Path(path).stem]).values()
                name = f"{stem}-{image.id[:12]}.png"  # no file of the user's, and the same whenever it is written again
                write_atomically(config.output_dir / name, explanation.figure())
                lines.append(json.dumps({"path": path, "picture": name, **_record(explanation)}) + "\n")
                label, picture = printable(str(explanation.label)), printable(str(config.output_dir / name))
                console.out(f"{printable(path)}: {label}, {picture}")
    finally:  # also where it is interrupted, or the disk is full
        write_atomically(config.output_dir / RECORDS, "".join(lines).encode())
    return 1 if len(lines) < len(images) else 0


def _check_records(file: Path) -> None:
    """Raises a ValueError where a file of the name is there that no `explain` wrote."""
    if not os.path.lexists(file):
        return
    try:
        ours = all("picture" in json.loads(line) for line in file.read_bytes().splitlines())
    except (OSError, ValueError, TypeError, RecursionError):
        ours = False
    if not ours:
        raise ValueError(f"{file} is there already and no output of explain; remove it, or pass another --output_dir.")


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
