"""`fewshot-diti score`: images through a bank, to a table and JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console
from tyro.conf import Positional, arg

from fewshot_diti.backbone import CompileMode, DtypeName, load_backbone
from fewshot_diti.backbone_search import find_backbone
from fewshot_diti.bank import Bank
from fewshot_diti.classifier import DiTiClassifier
from fewshot_diti.data.folders import IMAGE_SUFFIXES, is_image, passed_over, visible_files
from fewshot_diti.distributed import Record, process_state
from fewshot_diti.encoding import PreparedImage
from fewshot_diti.evaluation.run import predict_images
from fewshot_diti.files import write_atomically
from fewshot_diti.reports import prediction_table, printable

_TOP = 3


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Classifies images with a bank: a table of the best classes, and JSON lines.

    Under `accelerate launch` or `torchrun` the images spread over the processes; the results stay the same.

    Attributes:
        images: image files, and folders that are searched for images at any depth.
        bank: folder that `fewshot-diti train` wrote.
        output: file for one JSON line per image: path, image_id, label, probabilities of the best three classes, margin
            (second smallest score minus smallest), whether one class was left before the trials ran out, evaluations,
            and the scores of all classes (null off the shortlist); or path and error. What is not
            there gets no line. Only an earlier output of score is replaced. Beside it, in FILE.parts, each process
            keeps what it has scored, so that the same command goes on where it was cut short.
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
    bank = Bank.from_pretrained(config.bank)
    if config.backbone is None:
        how: dict[str, Any] = {"dtype": config.dtype, "compile": config.compile}
        backbone = find_backbone(bank.backbone_name, bank.backbone_hash, **how)
    else:
        backbone = load_backbone(config.backbone, config.dtype, config.compile)
    classifier = DiTiClassifier.from_pretrained(config.bank, backbone)
    if config.batch_size is not None:
        classifier.prediction = replace(classifier.current_prediction(), batch_size=config.batch_size)
    if len(classes := classifier.classes_.tolist()) < 2:
        raise ValueError(f"{config.bank} holds the classes {classes}; scoring takes two or more to choose among.")
    predict = partial(_predictions, classifier)
    found = predict_images(classifier, paths, lambda path: path, predict, parts, config.bank)
    records: list[Record] = [{"path": path, **record} for path, record in zip(paths, found, strict=True)]
    scored = [record for record in records if "error" not in record]
    if process_state().is_main_process:
        # a link to nothing, or a file that has gone since, is no image; ASCII, because a path may be no UTF-8
        rows = [{k: v for k, v in record.items() if k != "missing"} for record in records if not record.get("missing")]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(config.output, lines.encode())
    console.print(prediction_table(scored))
    console.out(f"JSON lines: {config.output}")
    for record in records:
        if "error" in record:
            console.out(f"not scored: {printable(record['error'])}")
    if others:
        console.out(f"{printable(passed_over(others))}; images end in {', '.join(IMAGE_SUFFIXES)}")
    process_state().wait_for_everyone()  # the launcher stops all processes when one ends with 1
    return 1 if len(scored) < len(records) else 0


def _list_images(named: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Each file once, in the order named, folders in alphabetical order; and the folders' files that are no images.

    A path that is not there is listed beside others that are: it gets its reason where it is opened.

    Raises:
        FileNotFoundError: none of the paths is there, or a folder without images.
    """
    paths: list[str] = []
    others: list[Path] = []
    if not any(map(os.path.lexists, named)):
        raise FileNotFoundError(f"There is no image file or folder {named[0]}; check the path.")
    for name in named:
        root = Path(name)
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


def _predictions(classifier: DiTiClassifier, images: Sequence[PreparedImage]) -> list[Record]:
    """Label, probabilities of the best classes, margin, scores and cost of each image; the label keeps its type."""
    labels, found = classifier.classes_.tolist(), []
    for decision in classifier.decide(images):
        values = decision.scores.tolist()
        probabilities = classifier.probabilities(decision.scores[None])[0].tolist()
        order = sorted(range(len(labels)), key=lambda c: (c != decision.position, values[c]))
        found.append(
            {
                "label": labels[decision.position],
                "probabilities": {str(labels[c]): probabilities[c] for c in order[:_TOP]},
                "margin": values[order[1]] - values[order[0]],
                "decided": decision.decided,
                "evaluations": decision.evaluations,
                "scores": {str(label): s for label, s in zip(labels, decision.json_scores(), strict=True)},
            }
        )
    return found
