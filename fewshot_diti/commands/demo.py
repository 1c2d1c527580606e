"""The demo: 12 aircraft variants from a few images each, beside two methods that learn nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path
from time import perf_counter
from typing import Literal

import numpy as np
import torch
from rich.console import Console

from fewshot_diti.backbone import POCKET, load_backbone
from fewshot_diti.baselines.base import LazyImages
from fewshot_diti.baselines.probe import NearestNeighbour
from fewshot_diti.baselines.zero_shot import zero_shot_bank
from fewshot_diti.classifier import DiTiClassifier
from fewshot_diti.cost import announce_time
from fewshot_diti.data import (
    ImageSet,
    check_disjoint,
    load_bundled,
    sample_shots,
    seen_attribute,
)
from fewshot_diti.files import write_atomically
from fewshot_diti.recommended import recommended_scoring, recommended_training
from fewshot_diti.reports import MethodResult, accuracy_table, predictions_picture
from fewshot_diti.trials import even_grid

_PICTURED_PER_CLASS = 2


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Learns 12 aircraft variants from a few bundled images each and tests them, in less than ten minutes on two cores.

    Attributes:
        output_dir: folder that gets the bank and the picture of predictions.
        shots: training images of each class, 1 to 24.
        test_images: number of test images, balanced over classes and over liveries seen and unseen, at most 240.
        trials: pairs of time-step and noise for each image and class, at most: a class not likely to win any more gets
            no further ones.
        zero_shot_trials: the same for the zero-shot backbone.
        backbone: "pocket", a folder in diffusers' layout, or a hub id.
        dtype: of U-Net and text encoder; auto is bfloat16 where the hardware has it, else float32.
        seed: of the draw of images, of training and of scoring.

    Raises:
        ValueError: a value is out of its range.
    """

    output_dir: Path = Path("demo")
    shots: int = 16
    test_images: int = 120
    trials: int = 32
    zero_shot_trials: int = 4
    backbone: str = POCKET
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # float16 loses small gradients
    seed: int = 0

    def __post_init__(self) -> None:
        for name, most in (("shots", 24), ("test_images", 240), ("trials", 1000), ("zero_shot_trials", 1000)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name}={getattr(self, name)}; pass a whole number from 1 to {most}.")


@dataclass(frozen=True, kw_only=True, eq=False)
class DemoResult:
    """What the demo found.

    Attributes:
        results: of the few-shot classifier, the zero-shot backbone and the nearest neighbour.
        test: the test images.
        seen: bool [N], whether a test image's livery occurs among the shots of its class.
        bank, picture: where they were written.
    """

    results: tuple[MethodResult, ...]
    test: ImageSet
    seen: np.ndarray
    bank: Path
    picture: Path


def run_demo(config: DemoConfig, console: Console) -> DemoResult:
    """Draws shots, trains, scores and compares, and says so as it goes; writes the bank and a picture.

    Raises:
        OSError, ValueError: as the backbone's loader.
        TrainingError: a class's loss was not finite.
    """
    backbone = load_backbone(config.backbone, config.dtype)
    pool, all_tests = load_bundled("train"), load_bundled("test")
    shots = pool.subset(sample_shots(pool, config.shots, config.seed).rows(pool))
    seen = seen_attribute(shots, all_tests)
    rows = balanced_rows(all_tests.labels, seen, config.test_images, config.seed)
    test, seen = all_tests.subset(rows), seen[rows]
    check_disjoint(shots, test)
    names = test.class_names
    truth = np.array(names)[test.labels]
    console.out(
        f"{len(names)} classes, {config.shots} shots each; {len(test)} test images, {seen.sum()} in liveries that the "
        f"shots of their class show, {(~seen).sum()} in others. No test image is a shot (compared by pixels)."
    )

    console.out(f"Training {len(names)} class tokens on backbone {config.backbone!r} ...")
    start = perf_counter()
    training = replace(recommended_training(config.shots, small=backbone.small), seed=config.seed)
    classifier = DiTiClassifier(
        backbone,
        training=training,
        # one calibration image a class is enough to weight the time-steps, and saves as many evaluations as a class
        scoring=replace(
            recommended_scoring(small=backbone.small),
            trials=config.trials,
            seed=config.seed,
            calibration_images=len(names),
        ),
    )
    scored = len(test) * len(names) * (config.trials + config.zero_shot_trials)
    announce_time(backbone, classifier.geometry.size, scored, "scoring")
    shot_images, shot_labels = LazyImages(shots), np.array(names)[shots.labels].tolist()
    test_images = LazyImages(test)
    classifier.fit(shot_images, shot_labels)
    classifier.training = None  # what is added later is trained as suits its own number of shots
    classifier.save_pretrained(config.output_dir / "bank")
    trained = perf_counter()
    console.out(f"{trained - start:.0f} s. Scoring {len(test)} images with up to {config.trials} trials a class ...")
    decisions = classifier.decide(test_images)
    probabilities = classifier.probabilities(torch.stack([decision.scores for decision in decisions]))
    predicted = classifier.classes_[[decision.label for decision in decisions]]
    few_shot = MethodResult(name="fewshot-diti", correct=predicted == truth, seconds=perf_counter() - start)
    spent = np.mean([decision.evaluations for decision in decisions])
    whole = classifier.scoring.evaluations(len(names))
    console.out(f"{perf_counter() - trained:.0f} s, {spent:.0f} of {whole} evaluations an image.")

    console.out(f"The backbone without class tokens, {config.zero_shot_trials} trials ...")
    start = perf_counter()
    learner = classifier.learner
    bare_prompts = zero_shot_bank(backbone, names, classifier.geometry, classifier.concept)
    errors = learner.shared_errors(
        bare_prompts, test_images, even_grid(config.zero_shot_trials, *classifier.scoring.timesteps)
    )
    zero_shot = MethodResult(
        name="zero-shot backbone",
        correct=errors.mean(2).argmin(1).numpy() == test.labels,
        seconds=perf_counter() - start,
    )
    console.out(f"{zero_shot.seconds:.0f} s. The nearest shot in VAE latents ...")
    start = perf_counter()
    neighbour = NearestNeighbour(lambda images: learner.encode(images).flatten(1).numpy())
    nearest = MethodResult(
        name="nearest neighbour",
        correct=neighbour.fit(shot_images, shot_labels).predict(test_images) == truth,
        seconds=perf_counter() - start,
    )

    results = (few_shot, zero_shot, nearest)
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
    console.out(f"Bank: {config.output_dir / 'bank'}")
    console.out(f"Picture of predictions: {picture}")
    return DemoResult(results=results, test=test, seen=seen, bank=config.output_dir / "bank", picture=picture)


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
        # every other class begins with unseen: an odd number a class favours neither
        kinds = (True, False) if label % 2 == 0 else (False, True)
        parts = [[int(r) for r in order if labels[r] == label and seen[r] == kind] for kind in kinds]
        return (row for row in chain(*zip_longest(*parts)) if row is not None)

    turns = zip_longest(*(in_turn(label) for label in np.unique(labels)))
    chosen = [row for row in chain(*turns) if row is not None][:count]
    return sorted(chosen, key=lambda row: labels[row])
