"""`fewshot-diti score`: images through a bank, to a table and JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from accelerate.utils import gather_object
from rich.console import Console
from tyro.conf import Positional, arg

from fewshot_diti.backbone import CompileMode, DtypeName, load_backbone
from fewshot_diti.bank import Bank, bank_fingerprint
from fewshot_diti.classifier import DiTiClassifier
from fewshot_diti.cost import announce_time
from fewshot_diti.data import ImageGeometry, image_id, open_image
from fewshot_diti.data.folders import IMAGE_SUFFIXES, is_image, passed_over, visible_files
from fewshot_diti.distributed import process_state
from fewshot_diti.files import write_atomically
from fewshot_diti.part_files import spread_over_processes
from fewshot_diti.reports import prediction_table, printable
from fewshot_diti.scoring import in_flight

_TOP = 3


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Classifies images with a bank: a table of the best classes, and JSON lines.

    Under `accelerate launch` or `torchrun` the images spread over the processes; the results stay the same.

    Attributes:
        images: image files, and folders that are searched for images at any depth.
        bank: folder that `fewshot-diti train` wrote.
        output: file for one JSON line an image: path, image_id, label, probabilities of the best three classes, margin
            (second smallest score minus smallest), whether one class was left before the trials ran out, evaluations,
            and the scores of all classes (null off the shortlist). A file of that name is replaced. Beside it, in
            FILE.parts, each process keeps what it has scored, so that the same command goes on where it was cut short.
        backbone: folder or hub id of the bank's backbone, where it has moved since.
        dtype: of U-Net and text encoder; auto is bfloat16 where the hardware has it, else float32.
        batch_size: evaluations in one forward; lower it where memory runs out. By default as at training.
        compile: mode in which torch compiles the U-Net for full batches, such as default, or reduce-overhead for CUDA
            graphs; takes a minute or more before the first image, and a C++ compiler.

    Raises:
        ValueError: no image is named.
    """

    images: Annotated[Positional[tuple[str, ...]], arg(metavar="IMAGE_OR_DIR...")]
    bank: Path
    output: Path = Path("predictions.jsonl")
    backbone: str | None = None
    dtype: DtypeName = "auto"
    batch_size: int | None = None
    compile: CompileMode | None = None

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size}; pass a whole number of at least 1.")
        if not self.images:
            raise ValueError("No images; name image files or folders.")


def score(config: ScoreConfig, console: Console) -> int:
    """Scores images over the processes, prints the table, writes JSON lines; returns 1 where an image is broken.

    Raises:
        OSError, ValueError: an image path, the bank or its backbone cannot be loaded.
    """
    paths, others = _list_images(config.images)
    parts = config.output.with_name(f"{config.output.name}.parts")
    if os.path.lexists(config.output) and not (config.output.is_file() and parts.is_dir()):
        raise ValueError(
            f"--output {config.output} is there already and no output of score; remove it, or name another file."
        )
    backbone = load_backbone(config.backbone or Bank.load(config.bank).backbone_name, config.dtype, config.compile)
    classifier = DiTiClassifier.from_pretrained(config.bank, backbone)
    if config.batch_size is not None:
        classifier.scoring = replace(classifier.scoring, batch_size=config.batch_size)
    if len(classes := classifier.classes_.tolist()) < 2:
        raise ValueError(f"{config.bank} holds the classes {classes}; scoring takes two or more to choose among.")
    ids, broken = _identify(paths, classifier.geometry)
    first: dict[str, str] = {}  # one path of each picture, however many copies of it there are
    for path in (path for path in paths if path in ids):
        first.setdefault(ids[path], path)
    evaluations = len(first) * classifier.scoring.evaluations(len(classes))
    announce_time(backbone, classifier.geometry.size, evaluations, "scoring")
    made_by = f"{bank_fingerprint(config.bank)} in {backbone.dtype}"
    at_once = in_flight(classifier.scoring.schedule(len(classes)))
    found = spread_over_processes(first, partial(_predictions, classifier), parts, made_by, at_once=at_once)
    records = [{"path": p, "image_id": ids[p], **found[ids[p]]} for p in paths if p in ids]
    if process_state().is_main_process:
        lines = "".join(json.dumps(record) + "\n" for record in records)  # ASCII: a path may be no UTF-8
        write_atomically(config.output, lines.encode())
    console.print(prediction_table(records))
    console.out(f"JSON lines: {config.output}")
    for path in (path for path in paths if path in broken):
        console.out(f"not scored: {printable(broken[path])}")
    if others:
        console.out(f"{passed_over(others)}; images end in {', '.join(IMAGE_SUFFIXES)}")
    process_state().wait_for_everyone()  # the launcher stops all processes when one ends with 1
    return 1 if broken else 0


def _identify(paths: Sequence[str], geometry: ImageGeometry) -> tuple[dict[str, str], dict[str, str]]:
    """Image id of each path that can be used, and what is wrong with the others; the processes share the reading."""
    state = process_state()
    ids, broken = {}, {}
    for path in paths[state.process_index :: state.num_processes]:
        try:
            picture = open_image(path)
            geometry.check(picture, path)
            ids[path] = image_id(picture)
        except ValueError as error:
            broken[path] = str(error)
    return dict(gather_object(list(ids.items()))), dict(gather_object(list(broken.items())))


def _list_images(named: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Each file once, in the order named, folders in alphabetical order; and the folders' files that are no images.

    Raises:
        FileNotFoundError: a path that is not there, or a folder without images.
    """
    paths: list[str] = []
    others: list[Path] = []
    for name in named:
        root = Path(name)
        if not root.exists():
            raise FileNotFoundError(f"There is no image file or folder {name}; check the path.")
        if root.is_dir():
            files = visible_files(root)
            inside = [str(path) for path in files if is_image(path)]
            if not inside:
                raise FileNotFoundError(f"{name} holds no images ({', '.join(IMAGE_SUFFIXES)}); name another folder.")
            paths += inside
            others += [path for path in files if not is_image(path)]
        else:
            paths.append(str(root))
    return list(dict.fromkeys(paths)), others


def _predictions(classifier: DiTiClassifier, paths: Sequence[str]) -> list[dict[str, Any]]:
    """Label, probabilities of the best classes, margin, scores and cost of each image; the label keeps its type."""
    labels, found = classifier.classes_.tolist(), []
    for decision in classifier.decide(paths):
        values = decision.scores.tolist()
        probabilities = classifier.probabilities(decision.scores[None])[0].tolist()
        order = sorted(range(len(labels)), key=lambda c: (c != decision.label, values[c]))
        found.append(
            {
                "label": labels[decision.label],
                "probabilities": {str(labels[c]): probabilities[c] for c in order[:_TOP]},
                "margin": values[order[1]] - values[order[0]],
                "decided": decision.decided,
                "evaluations": decision.evaluations,
                "scores": {str(label): s for label, s in zip(labels, decision.json_scores(), strict=True)},
            }
        )
    return found
