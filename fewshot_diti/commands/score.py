"""`fewshot-diti score`: images through a bank, to a table and a file of predictions."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
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
from fewshot_diti.data.unlabelled import list_images
from fewshot_diti.distributed import process_state
from fewshot_diti.evaluation.scored import BankScorer, Scored, check_same, parts_of, remove_parts
from fewshot_diti.files import check_writable
from fewshot_diti.hub import saved_folder
from fewshot_diti.memory import peak_memory
from fewshot_diti.progress import counted, silent
from fewshot_diti.reports import prediction_table, printable
from fewshot_diti.shards import Listing, merge

SHOWN = 100  # images in the table on the terminal
_MEASURED = 16  # images that a dry run scores


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
    folder, shard, file = saved_folder(config.needed_bank), config.asked_shard, config.file
    job, others = config.job(folder), list[Path]()
    if shard is None:
        images, others = list_images(config.images, config.split, config.image_column)
        listing = Listing()
        for name in images.names:
            listing.add(name)
        check_same(listing)
        if os.path.lexists(file) and not (file.is_file() and parts_of(file).is_dir()):
            raise ValueError(
                f"--output {file} is there already and no output of score; remove it, or name another file."
            )
    else:
        images, listing = job.list(shard)
        if not config.dry_run:
            check_writable(config.folder)
            if (known := job.finished(shard, listing)) is not None:
                remove_parts(file)  # a job that was killed in its last moment has left them
                console.out(f"shard {shard} is there already: {file}")
                return 1 if known["failed"] or known["missing"] else 0
    if config.dry_run and (process_state().num_processes > 1 or not len(images)):
        raise ValueError("dry_run measures one process on some images; start it without a launcher, with images.")
    classifier = load_classifier(folder, config.backbone, config.dtype, config.batch_size, config.compile)
    check_can_choose(classifier, config.needed_bank)
    scorer = BankScorer(classifier, folder, config.options)
    if config.dry_run:
        console.out(_plan(scorer, images))
        return 0
    scored = scorer.score(images, file) if shard is None else job.score(scorer, shard, images, listing)
    _report(scored, file, others, console)
    if shard is not None:
        remove_parts(file)
    process_state().wait_for_everyone()  # the launcher stops all processes when one ends with 1
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
    console.out(_counted(counts, f" in {scored.seconds:.0f} s ({speed})"))


def _counted(counts: Mapping[str, int], how: str = "") -> str:
    """What became of the images, in a sentence."""
    return (
        f"{counted(counts['scored'], 'image')} scored{how}, of them {counts['undecided']} undecided when the trials "
        f"ran out, {counts['rejected']} rejected; {counts['failed'] + counts['missing']} not scored."
    )


def _plan(scorer: BankScorer, images: ImageSet) -> str:
    """What scoring all images takes, from some of them, of which the first warms up."""
    classifier = scorer.classifier
    rows = range(0, len(images), max(1, len(images) // _MEASURED))
    with tempfile.TemporaryDirectory() as place, silent():
        scorer.records(images, rows[:1], Path(place) / "first")
        began = monotonic()
        found = [*scorer.records(images, rows[1:] or rows, Path(place) / "others")[0]]
        seconds = (monotonic() - began) / len(found)
    evaluations = [record["evaluations"] for record in found if "error" not in record]
    most = classifier.decider().evaluations(classifier.current_prediction())
    peak = peak_memory(classifier.backbone_.device)
    memory = "" if peak is None else f"peak memory {peak / 1e9:.1f} GB, "
    return (
        f"{counted(len(images), 'image')}, {len(classifier.classes_)} classes: "
        f"{np.mean(evaluations) if evaluations else most:.0f} evaluations (at most {most}) and {seconds:.3g} s per "
        f"image on one {classifier.backbone_.device.type}; about {seconds * len(images) / 60:.3g} minutes in one "
        f"process, {memory}measured on {counted(len(found), 'image')}"
    )


def _merge(folder: Path, output: Path, console: Console) -> int:
    """Joins shards; returns 1 where some of their images could not be scored."""
    counts = merge(folder, output)
    console.out(f"predictions: {output}")
    console.out(_counted(counts))
    return 1 if counts["failed"] or counts["missing"] else 0
