"""`fewshot-diti add`: further classes for a bank, or more shots of some; the other class tokens stay as they are."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console
from tyro.conf import Positional, arg

from fewshot_diti.bank_files import bank_fingerprint, cut_short
from fewshot_diti.checkpoints import checkpoints_for
from fewshot_diti.commands.loading import check_counts, load_classifier
from fewshot_diti.config import TrainingConfig
from fewshot_diti.data import load_images, sample_shots, warn_of_near_duplicates
from fewshot_diti.data.sources import training_splits
from fewshot_diti.devices import TrainingDtype
from fewshot_diti.files import check_writable, is_empty
from fewshot_diti.progress import counted
from fewshot_diti.reports import printable


@dataclass(frozen=True, kw_only=True)
class AddConfig:
    """Adds the classes of a folder of images to a bank. The class tokens that are there stay as they are, to the bit.

    Attributes:
        bank: folder that `fewshot-diti train` wrote.
        data: the images of the new classes, as `train` takes them.
        output_dir: folder that gets the larger bank; by default it takes the place of the one that is there.
        more_shots: classes that the bank has already are learned anew, from the images given here alone: give all of
            them, old and new.
        shots: images of each class to learn from, or "all".
        split: which of the data's splits holds the shots; by default train, where there is one.
        backbone: folder or hub id of the bank's backbone, where it has moved since.
        dtype: of U-Net and text encoder; auto is bfloat16 where the hardware has it, else float32.
        batch_size: samples in one forward; lower it where memory runs out. By default as at training.
        seed: of the draw of shots, where not all are taken.
        quiet: prints nothing but errors and warnings.

    Raises:
        ValueError: a value is out of its range.
    """

    bank: Annotated[Positional[Path], arg(metavar="BANK")]
    data: Annotated[Positional[str], arg(metavar="DIR")]
    output_dir: Path | None = None
    more_shots: bool = False
    shots: int | Literal["all"] = "all"
    split: str | None = None
    backbone: str | None = None
    dtype: TrainingDtype = "auto"
    batch_size: int | None = None
    seed: int = 0
    quiet: bool = False

    def __post_init__(self) -> None:
        check_counts(self, "shots", "batch_size")


def add(config: AddConfig, console: Console) -> None:
    """Trains the new class tokens and saves the larger bank.

    Raises:
        OSError, ValueError: bank, backbone or images cannot be loaded, or a class is in the bank already.
        TrainingError: a class's loss was not finite; the other classes are saved.
    """
    output = config.output_dir or config.bank
    if output != config.bank and output.is_dir() and not (is_empty(output) or cut_short(output)):
        raise ValueError(f"{output} holds files; pass another --output_dir, or leave it out to extend the bank itself.")
    data = load_images(config.data, config.split or training_splits(config.data)[0]).without_empty_classes()
    shots = data.subset(sample_shots(data, config.shots, config.seed).rows(data))
    warn_of_near_duplicates(shots, None)
    before = bank_fingerprint(config.bank)  # first: what changes while the bank is loaded is noticed too
    classifier = load_classifier(config.bank, config.backbone, config.dtype)
    bank = classifier.bank_
    assert bank is not None, "it was saved"
    there = bank.labels
    labels = [bank.as_label(name) for name in shots.label_names]
    known = [label for label in dict.fromkeys(labels) if label in there]
    if known and not config.more_shots:
        if cut_short(output):  # the save of these classes was
            classifier.save_pretrained(output)
        raise ValueError(
            f"Classes {known} are in the bank already; pass --more_shots to learn them anew from the images in "
            f"{config.data}, or leave their folders out."
        )
    check_writable(output)  # before the training, not after it
    if config.batch_size is not None:
        given = classifier.training or TrainingConfig()
        classifier.training = replace(given, samples_per_batch=config.batch_size)
    if known:
        classifier.remove_classes(known)
    with checkpoints_for(output) as checkpoints:
        try:
            classifier.add_classes(shots.decoded(), labels, checkpoints=checkpoints)
        finally:  # where a new class fails, the others are trained and kept; no class that was there is lost
            classes = set(classifier.classes_.tolist())
            if classes >= set(there) and (known or classes != set(there)):
                # by another command, whose classes would be lost
                if output == config.bank and bank_fingerprint(config.bank) != before:
                    output = _free_folder(config.bank.resolve())
                    warnings.warn(f"{config.bank} has changed meanwhile; the larger bank is in {output}", stacklevel=2)
                classifier.save_pretrained(output)
    counts = {label: labels.count(label) for label in dict.fromkeys(labels)}
    named = ", ".join(f"{printable(str(label))} ({counted(count, 'shot')})" for label, count in counts.items())
    console.out(f"Learned: {named}. The other {len(there) - len(known)} class tokens are as they were.")
    console.out(f"The bank is in {output}, with {len(classifier.classes_)} classes.")


def _free_folder(bank: Path) -> Path:
    """A folder beside the bank's that is not there yet."""
    names = (f"{bank.name}_added{number or ''}" for number in count())
    return next(folder for name in names if not (folder := bank.with_name(name)).exists())
