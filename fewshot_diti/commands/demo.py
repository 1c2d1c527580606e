"""The demo: 12 aircraft variants from a few images each, beside the nearest neighbour."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console

from fewshot_diti.backbone import POCKET
from fewshot_diti.baselines.probe import NearestNeighbour
from fewshot_diti.config import ScoringConfig
from fewshot_diti.data import ImageSet, Shots, load_bundled, sample_shots, seen_attribute
from fewshot_diti.devices import TrainingDtype
from fewshot_diti.evaluation.predicting import BANK, classify
from fewshot_diti.evaluation.run import FewShotRun, begin, learn
from fewshot_diti.evaluation.task import Task, make_task
from fewshot_diti.files import write_atomically
from fewshot_diti.reports import MethodResult, accuracy_table, predictions_picture

_PICTURED_PER_CLASS = 2


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Learns 12 aircraft variants from a few bundled images each and tests them, in minutes on two cores.

    A demo that was cut short goes on from there.

    Attributes:
        output_dir: folder that gets the bank and the picture of predictions.
        shots: training images of each class, 1 to 24.
        test_images: number of test images, balanced over classes and over liveries seen and unseen, at most 240.
        trials: pairs of timestep and noise for each image and class, at most: a class not likely to win any more gets
            no further ones.
        backbone: "pocket", a folder in diffusers' layout, or a hub id.
        dtype: of U-Net and text encoder; auto is bfloat16 where the hardware has it, else float32.
        seed: of the draw of images, of training and of scoring.
        quiet: prints nothing but errors and warnings.

    Raises:
        ValueError: a value is out of its range.
    """

    output_dir: Path = Path("demo")
    shots: int = 16
    test_images: int = 120
    trials: int = 32
    backbone: str = POCKET
    dtype: TrainingDtype = "auto"
    seed: int = 0
    quiet: bool = False

    def __post_init__(self) -> None:
        for name, most in (("shots", 24), ("test_images", 240), ("trials", 1000)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name}={getattr(self, name)}; pass a whole number from 1 to {most}.")


@dataclass(frozen=True, kw_only=True, eq=False)
class DemoResult:
    """What the demo found.

    Attributes:
        results: of the few-shot classifier and of the nearest neighbour.
        test: the test images.
        seen: bool [N], whether a test image's livery occurs among the shots of its class.
        bank, picture: where they were written.
    """

    results: tuple[MethodResult, ...]
    test: ImageSet
    seen: np.ndarray
    bank: Path
    picture: Path


class Setup(NamedTuple):
    """What the demo trains and tests.

    Attributes:
        drawn: the shots.
        seen: as of `DemoResult`.
    """

    run: FewShotRun
    task: Task
    drawn: Shots
    seen: np.ndarray


def set_up(config: DemoConfig) -> Setup:
    """Draws shots and test images; raises ValueError as `sample_shots`."""
    pool, all_tests = load_bundled("train"), load_bundled("test")
    drawn = sample_shots(pool, config.shots, config.seed)
    seen = seen_attribute(pool.subset(drawn.rows(pool)), all_tests)
    rows = balanced_rows(all_tests.labels, seen, config.test_images, config.seed)
    task = make_task(pool, all_tests.subset(rows), drawn, config.shots, config.seed)
    run = FewShotRun(
        dataset="bundled",
        output_dir=config.output_dir,
        num_shots=config.shots,
        backbone=config.backbone,
        dtype=config.dtype,
        seed=config.seed,
        concept="aircraft",
        # one calibration image per class is enough to weight the timesteps, and saves as many evaluations as a class
        scoring=ScoringConfig(trials=config.trials, calibration_images=len(task.class_names)),
    )
    return Setup(run, task, drawn, seen[rows])


def run_demo(config: DemoConfig, console: Console) -> DemoResult:
    """Draws shots, trains, scores and compares, and prints each step; writes the bank and a picture.

    Raises:
        OSError, ValueError: as the backbone's loader.
        TrainingError: a class's loss was not finite.
    """
    run, task, drawn, seen = set_up(config)
    test, names = task.test, task.class_names
    truth = np.array(task.truth())
    classifier = begin(run, task, drawn)
    console.out(
        f"{len(names)} classes, {config.shots} shots each; {len(test)} test images, {seen.sum()} in liveries that the "
        f"shots of their class show, {(~seen).sum()} in others. No test image is a shot (compared by pixels)."
    )

    console.out(f"Training {len(names)} class tokens on backbone {config.backbone!r} ...")
    start = perf_counter()
    classifier = learn(classifier, task, run.output_dir / BANK)
    trained = perf_counter()
    console.out(f"{trained - start:.0f} s. Scoring {len(test)} images with up to {config.trials} trials per class ...")
    records = classify(classifier, test, run.output_dir)
    predicted = np.array([record["label"] for record in records])
    probabilities = classifier.probabilities(torch.tensor([record["scores"] for record in records]))
    few_shot = MethodResult(name="fewshot-diti", correct=predicted == truth, seconds=perf_counter() - start)
    spent = np.mean([record["evaluations"] for record in records])
    whole = classifier.decider().evaluations(classifier.current_prediction())
    console.out(f"{perf_counter() - trained:.0f} s, {spent:.0f} of {whole} evaluations per image.")

    console.out("The nearest shot in VAE latents ...")
    start = perf_counter()
    neighbour = NearestNeighbour(classifier.encoder_.flat_latents)
    nearest = MethodResult(
        name="nearest neighbour",
        correct=neighbour.fit(task.shot_images(), task.shot_labels()).predict(task.test_images()) == truth,
        seconds=perf_counter() - start,
    )

    results = (few_shot, nearest)
    subsets = {"all": np.ones(len(test), dtype=bool), "liveries seen": seen, "liveries unseen": ~seen}
    console.print(accuracy_table(results, subsets, test.attributes["airline"], "liveries"))
    shown = [row for c in range(len(names)) for row in np.flatnonzero(test.labels == c)[:_PICTURED_PER_CLASS]]
    picture = config.output_dir / "predictions.png"
    png = predictions_picture(
        [test.image(row) for row in shown],
        truth[shown].tolist(),
        predicted[shown].tolist(),
        probabilities[shown].max(1).tolist(),
    )
    write_atomically(picture, png)
    console.out(f"Bank: {config.output_dir / BANK}")
    console.out(f"Picture of predictions: {picture}")
    return DemoResult(results=results, test=test, seen=seen, bank=config.output_dir / BANK, picture=picture)


def balanced_rows(labels: np.ndarray, seen: np.ndarray, count: int, seed: int) -> list[int]:
    """Positions of `count` of N images: as equal in number over the classes, and within them over seen and unseen, as
    the images allow.

    Class by class, seen and unseen in turn; which ones is drawn by the seed, so the first of a class are a fair sample.

    Raises:
        ValueError: there are fewer than `count` images.
    """
    if count > len(labels):
        raise ValueError(f"{count} test images are asked for, there are {len(labels)}; ask for fewer.")
    order = np.random.default_rng(seed).permutation(len(labels))

    def in_turn(label: int) -> Iterator[int]:
        # every other class begins with unseen: an odd number per class favours neither
        kinds = (True, False) if label % 2 == 0 else (False, True)
        parts = [[int(r) for r in order if labels[r] == label and seen[r] == kind] for kind in kinds]
        return (row for row in chain(*zip_longest(*parts)) if row is not None)

    turns = zip_longest(*(in_turn(label) for label in np.unique(labels)))
    chosen = [row for row in chain(*turns) if row is not None][:count]
    return sorted(chosen, key=lambda row: labels[row])
