"""`fewshot-diti score`: images through a bank, to a table and a file of predictions."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from time import monotonic

import numpy as np
from rich.console import Console

from fewshot_diti.commands.loading import check_can_choose, load_classifier
from fewshot_diti.commands.score_config import MERGED, ScoreConfig
from fewshot_diti.commands.score_ray import score_shards
from fewshot_diti.data import ImageSet
from fewshot_diti.data.folders import IMAGE_SUFFIXES, passed_over
from fewshot_diti.data.unlabelled import list_images, list_shard
from fewshot_diti.distributed import process_state
from fewshot_diti.evaluation.scored import BankScorer, Scored, made_with, parts_of, remove_parts
from fewshot_diti.hub import saved_folder
from fewshot_diti.memory import peak_memory
from fewshot_diti.progress import counted, silent
from fewshot_diti.reports import prediction_table, printable
from fewshot_diti.shards import finished, merge

SHOWN = 100  # images in the table on the terminal
_MEASURED = 16  # images of each process that a dry run scores


def score(config: ScoreConfig, console: Console) -> int:
    """Scores images over the processes, prints the table, writes the file; returns 1 where an image is broken.

    Raises:
        OSError, ValueError: an image path, the bank or its backbone cannot be loaded; or shards cannot be merged.
    """
    if config.merge is not None:
        return _merge(config.merge, config.merged, console)
    if config.engine == "ray":
        score_shards(config)
        return _merge(config.folder, config.folder / MERGED, console)
    folder, shard, file = saved_folder(config.needed_bank), config.part, config.file
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
    check_can_choose(classifier, config.needed_bank)
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
