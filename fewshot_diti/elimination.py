"""Elimination: score all classes on a few trials, drop the worst, go on with the rest.

Schedules are data (`Stage`), and `eliminate` runs one on one image. It asks for errors by class index and trial
position alone, so the true label cannot reach it.

Shapes in names: C classes, S trials; a trial position is an index into an image's S trials.
Sources: Li et al., "Your Diffusion Model is Secretly a Zero-Shot Classifier" (ICCV 2023), algorithm 2; TiF (CVPR 2024).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fewshot_diti.timesteps import score

PUBLISHED_TRIALS = 500
PUBLISHED_STAGES = ((20, 20), (50, 10), (100, 5), (500, 1))  # FGVC-Aircraft: (trials so far, classes kept)
PUBLISHED_CLASSES = 100


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage: the trials at `trial_positions` for every class still in, then keep the `keep` best (all, if fewer).

    ValueError: no position, a negative or a repeated one, or keep below 1.
    """

    trial_positions: tuple[int, ...]
    keep: int

    def __post_init__(self) -> None:
        positions = self.trial_positions
        if not positions or min(positions) < 0 or len(set(positions)) < len(positions):
            raise ValueError(f"trial_positions {positions}: give one position or more, from 0 on, each once")
        if self.keep < 1:
            raise ValueError(f"keep = {self.keep}; a stage keeps one class or more")


class Elimination(NamedTuple):
    """Result of `eliminate` for one image; classes are indices into all C classes, never into the survivors.

    `label`: the winning class. `order`: all classes, best first; a class outranks those that went out before it.
    `scores`: float64 [C], each class's score over the trials done for it; comparable only between classes that went out
    together, because the others had other trials.
    """

    label: int
    order: list[int]
    scores: Tensor


def published_stages(
    num_classes: int, trials: int = PUBLISHED_TRIALS, stages: Sequence[tuple[int, int]] = PUBLISHED_STAGES
) -> tuple[Stage, ...]:
    """The schedule of TiF's published code; `stages` are (n, classes kept).

    Stage n takes n of the `trials` positions, every (trials // n)-th from trials // n // 2 on, and skips those done:
    20, 50, 80 and 350 new trials a class at the defaults. Position p of 500 is time-step 1 + 2 p
    (`even_grid(500, 0, 1000)`). Where n does not divide `trials` (128 of 500, ISIC2019), the first n of those positions
    are taken, as published: the trials with the largest time-steps then wait for a later stage.

    5,550 evaluations an image at 100 classes. ValueError: n above `trials`, or a stage without a new trial.
    """
    done: set[int] = set()
    alive = num_classes
    schedule = []
    for n, keep in stages:
        if not 1 <= n <= trials:
            raise ValueError(f"a stage of {n} trials does not fit in {trials}; 1 <= n <= {trials}")
        step = trials // n
        positions = tuple(p for p in range(trials)[step // 2 :: step][:n] if p not in done)
        if not positions:
            raise ValueError(f"stage {n} of {tuple(stages)} has no trial that the stages before it have not done")
        done.update(positions)
        alive = min(keep, alive)
        schedule.append(Stage(trial_positions=positions, keep=alive))
    return tuple(schedule)


def proportional_stages(num_classes: int) -> tuple[Stage, ...]:
    """FGVC-Aircraft's published schedule, its kept classes scaled by num_classes / 100 and rounded up.

    900 evaluations an image at 12 classes (keep 3, 2, 1, 1), where `published_stages` takes 3,390. With 20 classes or
    fewer, stage 3 leaves one class and settles the label; the last 350 evaluations only refine that class's score.
    """
    stages = [(n, -(-keep * num_classes // PUBLISHED_CLASSES)) for n, keep in PUBLISHED_STAGES]
    return published_stages(num_classes, stages=stages)


def exhaustive(trials: int) -> tuple[Stage, ...]:
    """One stage of all `trials` for every class: trials x classes evaluations an image, no class dropped early."""
    return (Stage(trial_positions=tuple(range(trials)), keep=1),)


def count_evaluations(stages: Sequence[Stage], num_classes: int) -> int:
    """Evaluations that `stages` cost an image: samples through the U-Net, one a new trial of a class still in."""
    total, alive = 0, num_classes
    for stage in stages:
        total += alive * len(stage.trial_positions)
        alive = min(stage.keep, alive)
    return total


def eliminate(
    errors_fn: Callable[[Tensor, Tensor], Tensor], num_classes: int, stages: Sequence[Stage], weights_S: Tensor
) -> Elimination:
    """Classify one image by elimination.

    `errors_fn(class_indices, trial_positions)`: int64 on the CPU, classes ascending; returns errors [classes, trials].
    `weights_S`: w / q at each trial position. After each stage the classes still in are ranked by the weighted mean of
    all their trials so far (`score`), and a tie goes to the lower class index.

    ValueError: an error that is not finite (names the class), positions beyond `weights_S` or done twice, errors of
    another shape, no stage, or a stage by whose end no trial has had a weight: it would drop classes blindly.
    """
    if num_classes < 1 or not stages:
        raise ValueError(f"{num_classes} classes and {len(stages)} stages; elimination needs one of each or more")
    positions = [position for stage in stages for position in stage.trial_positions]
    if len(set(positions)) < len(positions) or max(positions) >= len(weights_S):
        raise ValueError(
            f"stages of {len(positions)} trials with positions up to {max(positions)} for {len(weights_S)} weights; "
            f"positions go from 0 to {len(weights_S) - 1}, each in one stage"
        )
    alive = torch.arange(num_classes)
    errors_CS = torch.empty(num_classes, 0, dtype=torch.float64)  # rows are the classes in `alive`
    scores_C = torch.empty(num_classes, dtype=torch.float64)
    order: list[int] = []
    done: list[int] = []
    for number, stage in enumerate(stages, start=1):
        new = errors_fn(alive, torch.tensor(stage.trial_positions))
        _check_errors(new, alive, len(stage.trial_positions))
        errors_CS = torch.cat([errors_CS, new.double().cpu()], dim=1)
        done += stage.trial_positions
        weights = weights_S.cpu()[done]
        if not weights.any():
            raise ValueError(
                f"all {len(done)} trials up to stage {number} have weight 0, so it cannot tell which classes to keep; "
                "put the trials inside the window, or score exhaustively"
            )
        scores = score(errors_CS[None], weights)[0]
        scores_C[alive] = scores
        ranking = scores.argsort(stable=True)
        order = alive[ranking[stage.keep :]].tolist() + order
        kept = ranking[: stage.keep].sort().values
        alive, errors_CS = alive[kept], errors_CS[kept]
    order = alive[scores_C[alive].argsort(stable=True)].tolist() + order
    return Elimination(label=order[0], order=order, scores=scores_C)


def _check_errors(errors: Tensor, class_indices: Tensor, num_trials: int) -> None:
    if errors.shape != (len(class_indices), num_trials):
        raise ValueError(
            f"errors_fn gave errors {tuple(errors.shape)} for {len(class_indices)} classes x {num_trials} trials"
        )
    broken = (~errors.isfinite().all(dim=1)).nonzero().flatten()
    if len(broken):
        raise ValueError(
            f"class index {class_indices[broken[0]]} has an error that is not finite; train it again or remove it"
        )
