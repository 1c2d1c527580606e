"""`fewshot-diti score`: images through a bank, to a table and a file of predictions."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Annotated

from rich.console import Console
from tyro.conf import Positional, arg

from fewshot_diti.backbone import CompileMode, DtypeName
from fewshot_diti.classifier import DiTiClassifier
from fewshot_diti.commands.loading import check_can_choose, check_counts, load_classifier
from fewshot_diti.data.folders import IMAGE_SUFFIXES, passed_over
from fewshot_diti.data.unlabelled import list_images
from fewshot_diti.distributed import gather, process_state
from fewshot_diti.encoding import PreparedImage
from fewshot_diti.evaluation.predicting import predict_images
from fewshot_diti.files import write_atomically
from fewshot_diti.hub import saved_folder
from fewshot_diti.part_files import Record, Records
from fewshot_diti.prediction_files import check_suffix, encode_predictions
from fewshot_diti.progress import counted
from fewshot_diti.reports import prediction_table, printable

SHOWN = 100  # images in the table on the terminal


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Classifies images with a bank: a table of the best classes of the first 100, and a file of predictions.

    Under `accelerate launch` or `torchrun` the images spread over the processes; the results stay the same.

    Attributes:
        images: image files, folders that are searched for images at any depth, patterns such as "*.jpg",
            manifest:FILE[@DIR] (a table with the column path), or hub:ID (a data set).
        bank: folder that `fewshot-diti train` wrote, or user/repo on the hub.
        output: file of predictions. FILE.jsonl has one JSON line per image: path, image_id, label, probabilities of the
            best classes, margin (second smallest score minus smallest), whether one class was left before the trials
            ran out, evaluations, and the scores of all classes (null off the shortlist); or path and error. FILE.csv
            and FILE.parquet have one row per image, without the scores. What is not there gets no row. Only an earlier
            output of score is replaced. Beside it, in FILE.parts, each process keeps what it has scored, so that the
            same command goes on where it was cut short.
        top_k: how many of the best classes are named, with their probabilities.
        reject: share of images like the shots that may be taken for something unknown, such as 0.01; what is less like
            every shot than that is marked as rejected. By default nothing is. Needs the witness features.
        split: of hub:ID.
        image_column: of hub:ID, by default image.
        backbone: folder or hub id of the bank's backbone, where it has moved since.
        dtype: of U-Net and text encoder; auto is bfloat16 where the hardware has it, else float32.
        batch_size: evaluations in one forward; lower it where memory runs out. By default as at training.
        compile: mode in which torch compiles the U-Net for full batches, such as default, or reduce-overhead for CUDA
            graphs; takes a minute or more before the first image, and a C++ compiler.
        quiet: prints nothing but errors and warnings.

    Raises:
        ValueError: no image is named, or a value is out of its range.
    """

    images: Annotated[Positional[tuple[str, ...]], arg(metavar="IMAGE_OR_DIR...")]
    bank: str
    output: Path = Path("predictions.jsonl")
    top_k: int = 3
    reject: float | None = None
    split: str | None = None
    image_column: str | None = None
    backbone: str | None = None
    dtype: DtypeName = "auto"
    batch_size: int | None = None
    compile: CompileMode | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        check_counts(self, "batch_size", "top_k")
        if not self.images:
            raise ValueError("No images; name image files or folders.")
        if self.reject is not None and not 0 < self.reject < 1:
            raise ValueError(f"reject={self.reject}; pass a share between 0 and 1, such as 0.01.")
        check_suffix(self.output)


def score(config: ScoreConfig, console: Console) -> int:
    """Scores images over the processes, prints the table, writes the file; returns 1 where an image is broken.

    Raises:
        OSError, ValueError: an image path, the bank or its backbone cannot be loaded.
    """
    images, others = list_images(config.images, config.split, config.image_column)
    parts = config.output.with_name(f"{config.output.name}.parts")
    if os.path.lexists(config.output) and not (config.output.is_file() and parts.is_dir()):
        raise ValueError(
            f"--output {config.output} is there already and no output of score; remove it, or name another file."
        )
    folder = saved_folder(config.bank)
    classifier = load_classifier(folder, config.backbone, config.dtype, config.batch_size, config.compile)
    check_can_choose(classifier, config.bank)
    least = None if config.reject is None else classifier.decider().familiarity.least(config.reject)
    began = monotonic()
    predicted = 0

    def predict(some: Sequence[PreparedImage]) -> list[Record]:
        nonlocal predicted
        predicted += len(some)
        return _predictions(classifier, least, some)

    asked = "" if least is None else f" least similarity {least}"
    found = predict_images(classifier, range(len(images)), images.decode, predict, parts, folder, asked)
    seconds, predicted = monotonic() - began, sum(gather([predicted]))
    scored = _Scored(images.names, found, min(config.top_k, len(classifier.classes_)))
    if process_state().is_main_process:
        label_type = type(classifier.classes_.tolist()[0])
        write_atomically(config.output, encode_predictions(scored, config.output.suffix, scored.top_k, label_type))
    console.print(prediction_table(list(islice(scored.usable(), SHOWN))))
    counts = Counter[str]()
    for record in scored.usable():
        counts.update(scored=1, undecided=int(not record["decided"]), rejected=int(record.get("rejected", False)))
        if record.get("rejected"):
            console.out(f"like none of the shots: {printable(record['path'])}")
    if counts["scored"] > SHOWN:
        console.out(f"and {counts['scored'] - SHOWN} images more, which stand in the file alone")
    console.out(f"predictions: {config.output}")
    for record in found:
        if "error" in record:
            console.out(f"not scored: {printable(record['error'])}")
    if others:
        console.out(f"{printable(passed_over(others))}; images end in {', '.join(IMAGE_SUFFIXES)}")
    known = counts["scored"] - predicted
    without = f" without the {known} that were known already" if known > 0 else ""
    speed = f"{predicted / seconds:.1f} images/s{without}"
    console.out(
        f"{counted(counts['scored'], 'image')} scored in {seconds:.0f} s ({speed}), "
        f"of them {counts['undecided']} undecided when the trials ran out, {counts['rejected']} rejected; "
        f"{len(found) - counts['scored']} not scored."
    )
    process_state().wait_for_everyone()  # the launcher stops all processes when one ends with 1
    return 1 if counts["scored"] < len(found) else 0


class _Scored:
    """What is known of the images that are there, each read when its turn comes."""

    def __init__(self, names: Sequence[str], found: Records, top_k: int) -> None:
        self.names, self.found, self.top_k = names, found, top_k

    def __iter__(self) -> Iterator[Record]:
        for name, record in zip(self.names, self.found, strict=True):
            if "error" not in record:
                best = dict(list(record["probabilities"].items())[: self.top_k])
                yield {"path": name, **record, "probabilities": best}
            elif not record.get("missing"):  # a link to nothing, or a file that has gone since, is no image
                yield {"path": name, **{key: value for key, value in record.items() if key != "missing"}}

    def usable(self) -> Iterator[Record]:
        return (record for record in self if "error" not in record)


def _predictions(classifier: DiTiClassifier, least: float | None, images: Sequence[PreparedImage]) -> list[Record]:
    """Label, with its own type, probabilities, the best first, margin, scores and cost of each image."""
    labels, found = classifier.classes_.tolist(), []
    similarities = [math.nan] * len(images)
    if least is not None:
        similarities = classifier.decider().similarities(images, classifier.current_prediction()).tolist()
    for decision, similarity in zip(classifier.decide(images), similarities, strict=True):
        values = decision.scores.tolist()
        probabilities = classifier.probabilities(decision.scores[None])[0].tolist()
        order = sorted(range(len(labels)), key=lambda c: (c != decision.position, values[c]))
        found.append(
            {
                "label": labels[decision.position],
                "probabilities": {str(labels[c]): probabilities[c] for c in order},
                "margin": values[order[1]] - values[order[0]],
                **({} if least is None else {"similarity": similarity, "rejected": similarity < least}),
                "decided": decision.decided,
                "evaluations": decision.evaluations,
                "scores": {str(label): s for label, s in zip(labels, decision.json_scores(), strict=True)},
            }
        )
    return found
