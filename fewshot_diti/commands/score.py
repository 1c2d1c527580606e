"""`fewshot-diti score`: images through a bank, to a table and a file of predictions."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Annotated

import numpy as np
from rich.console import Console
from tyro.conf import Positional, arg

from fewshot_diti.backbone import CompileMode, DtypeName
from fewshot_diti.commands.loading import check_can_choose, check_counts, load_classifier
from fewshot_diti.data import ImageSet
from fewshot_diti.data.folders import IMAGE_SUFFIXES, passed_over
from fewshot_diti.data.unlabelled import list_images, list_shard
from fewshot_diti.distributed import process_state
from fewshot_diti.evaluation.scored import BankScorer, Rows, Scored, made_with, parts_of, remove_parts
from fewshot_diti.hub import saved_folder
from fewshot_diti.memory import peak_memory
from fewshot_diti.prediction_files import check_suffix
from fewshot_diti.progress import counted, silent
from fewshot_diti.reports import prediction_table, printable
from fewshot_diti.shards import Shard, finished, merge

PARQUET = ".parquet"
SHOWN = 100  # images in the table on the terminal
_MEASURED = 16  # images of each process that a dry run scores


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Classifies images with a bank: a table of the best classes of the first 100, and a file of predictions.

    Under `accelerate launch` or `torchrun` the images spread over the processes; the results stay the same.

    Attributes:
        images: image files, folders that are searched for images at any depth, patterns such as "*.jpg",
            manifest:FILE[@DIR] (a table with the column path), or hub:ID (a data set).
        bank: folder that `fewshot-diti train` wrote, or user/repo on the hub.
        output: file of predictions, by default predictions.jsonl. FILE.jsonl has one JSON line per image: path,
            image_id, label, probabilities of the best classes, margin (second smallest score minus smallest), whether
            one class was left before the trials ran out, evaluations, and the scores of all classes (null off the
            shortlist); or path and error. FILE.csv and FILE.parquet have one row per image, without the scores. What
            is not there gets no row. Only an earlier output of score is replaced. Beside it, in FILE.parts, each
            process keeps what it has scored, so that the same command goes on where it was cut short.
        shard: scores the share i/n of the images, such as 3/16, into a file of its own in the folder output, by
            default predictions. Images belong to shards by their names, so that jobs on any machines need not know
            each other. A shard that is there is skipped. The images are one folder, manifest:FILE or hub:ID.
        merge: folder of shards: joins them into the file output, by default predictions.parquet in that folder, and
            checks that each image stands once. Takes no images and no bank.
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
        dry_run: scores some of the images, writes nothing, and prints what all would take.
        quiet: prints nothing but errors and warnings.

    Raises:
        ValueError: no image is named, or a value is out of its range.
    """

    images: Annotated[Positional[tuple[str, ...]], arg(metavar="IMAGE_OR_DIR...")]
    bank: str | None = None
    output: Path | None = None
    shard: str | None = None
    merge: Path | None = None
    top_k: int = 3
    reject: float | None = None
    split: str | None = None
    image_column: str | None = None
    backbone: str | None = None
    dtype: DtypeName = "auto"
    batch_size: int | None = None
    compile: CompileMode | None = None
    dry_run: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        check_counts(self, "batch_size", "top_k")
        if self.merge is not None:
            if self.images or self.bank or self.shard:
                raise ValueError("merge joins shards that were scored; pass it with output alone, or not at all.")
            if self.merged.suffix != PARQUET:
                raise ValueError(f"output={self.output}; shards are merged into a file that ends in {PARQUET}.")
            return
        if not self.images:
            raise ValueError("No images; name image files or folders.")
        if self.bank is None:
            raise ValueError("No bank; pass the folder that train wrote.")
        if self.reject is not None and not 0 < self.reject < 1:
            raise ValueError(f"reject={self.reject}; pass a share between 0 and 1, such as 0.01.")
        if self.part is None:
            check_suffix(self.file)

    @property
    def rows(self) -> Rows:
        """What is asked of each image."""
        return Rows(top_k=self.top_k, reject=self.reject)

    @property
    def part(self) -> Shard | None:
        """The shard that is to be scored; None where all images are."""
        return None if self.shard is None else Shard.parse(self.shard)

    @property
    def file(self) -> Path:
        """The file of predictions."""
        if self.part is not None:
            return self.part.file(self.folder)
        return self.output or Path("predictions.jsonl")

    @property
    def folder(self) -> Path:
        """That of the shards."""
        return self.output or Path("predictions")

    @property
    def merged(self) -> Path:
        """The file that the shards are merged into."""
        return self.output or (self.merge or Path()) / "predictions.parquet"


def score(config: ScoreConfig, console: Console) -> int:
    """Scores images over the processes, prints the table, writes the file; returns 1 where an image is broken.

    Raises:
        OSError, ValueError: an image path, the bank or its backbone cannot be loaded; or shards cannot be merged.
    """
    if config.merge is not None:
        return _merge(config.merge, config.merged, console)
    assert config.bank is not None, "refused before"
    folder, shard, file = saved_folder(config.bank), config.part, config.file
    others: list[Path] = []
    if shard is None:
        images, others = list_images(config.images, config.split, config.image_column)
        if os.path.lexists(file) and not (file.is_file() and parts_of(file).is_dir()):
            raise ValueError(
                f"--output {file} is there already and no output of score; remove it, or name another file."
            )
    else:
        made_by = made_with(folder, config.dtype, config.rows)
        if (known := finished(config.folder, shard, made_by)) is not None:
            remove_parts(file)  # a job that was killed in its last moment has left them
            console.out(f"shard {shard} is there already: {file}")
            return 1 if known["failed"] or known["missing"] else 0
        images, listing = list_shard(config.images, shard, config.split, config.image_column)
    classifier = load_classifier(folder, config.backbone, config.dtype, config.batch_size, config.compile)
    check_can_choose(classifier, config.bank)
    scorer = BankScorer(classifier, folder, config.rows)
    if config.dry_run:
        console.out(_plan(scorer, images))
        return 0
    if shard is None:
        scored = scorer.score(images, file)
    else:
        scored = scorer.score_shard(images, listing, config.folder, shard, made_by)
    _report(scored, file, others, console)
    process_state().wait_for_everyone()  # the launcher stops all processes when one ends with 1
    if shard is not None:
        remove_parts(file)
    return 1 if scored.counts["scored"] < len(images) else 0


def _report(scored: Scored, file: Path, others: Sequence[Path], console: Console) -> None:
    """Prints the first images, what was rejected or not scored, and where the predictions are."""
    console.print(prediction_table(list(islice(scored.usable(), SHOWN))))
    counts = scored.counts
    for record in scored.usable() if counts["rejected"] else ():
        if record.get("rejected"):
            console.out(f"like none of the shots: {printable(record['path'])}")
    if counts["scored"] > SHOWN:
        console.out(f"and {counts['scored'] - SHOWN} images more, which stand in the file alone")
    console.out(f"predictions: {file}")
    for record in scored.found if counts["failed"] or counts["missing"] else ():
        if "error" in record:
            console.out(f"not scored: {printable(record['error'])}")
    if others:
        console.out(f"{printable(passed_over(others))}; images end in {', '.join(IMAGE_SUFFIXES)}")
    known = counts["scored"] - scored.predicted
    without = f" without the {known} that were known already" if known > 0 else ""
    speed = f"{scored.predicted / scored.seconds:.1f} images/s{without}"
    console.out(
        f"{counted(counts['scored'], 'image')} scored in {scored.seconds:.0f} s ({speed}), "
        f"of them {counts['undecided']} undecided when the trials ran out, {counts['rejected']} rejected; "
        f"{counts['failed'] + counts['missing']} not scored."
    )


def _plan(scorer: BankScorer, images: ImageSet) -> str:
    """What scoring all images takes, from some of them, of which the first warms up."""
    processes, classifier = process_state().num_processes, scorer.classifier
    rows = range(0, len(images), max(1, len(images) // (_MEASURED * processes)))
    with tempfile.TemporaryDirectory() as place, silent():
        scorer.records(images, rows[:1], Path(place) / "first")
        began = monotonic()
        found = [*scorer.records(images, rows[1:] or rows, Path(place) / "others")[0]]
        seconds = (monotonic() - began) / len(found) * len(images)
    evaluations = [record["evaluations"] for record in found if "error" not in record]
    most = classifier.decider().evaluations(classifier.current_prediction())
    peak = peak_memory(classifier.backbone_.device)
    memory = "" if peak is None else f"peak memory {peak / 1e9:.1f} GB, "
    return (
        f"{counted(len(images), 'image')}, {len(classifier.classes_)} classes: "
        f"{np.mean(evaluations) if evaluations else most:.0f} evaluations an image (at most {most}), "
        f"{seconds / len(images) * processes:.3g} s an image on one {classifier.backbone_.device.type}; "
        f"about {seconds / 60:.3g} minutes in {counted(processes, 'process')}, "
        f"{seconds * processes / 3600:.3g} hours of devices, {memory}measured on {counted(len(found), 'image')}"
    )


def _merge(folder: Path, output: Path, console: Console) -> int:
    """Joins shards; returns 1 where some of their images could not be scored."""
    counts = merge(folder, output)
    console.out(f"predictions: {output}")
    console.out(
        f"{counted(counts['scored'], 'image')} scored, of them {counts['undecided']} undecided when the trials ran "
        f"out, {counts['rejected']} rejected; {counts['failed']} could not be read, {counts['missing']} are not there."
    )
    return 1 if counts["failed"] or counts["missing"] else 0
