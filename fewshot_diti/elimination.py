"""Elimination: score all classes on a few trials, drop those that will not win, go on with the rest.

Schedules are data: `Stage` keeps the best so many classes, `racing.Look` those that are likely to win. `eliminate` runs
one on many images at once. It asks for errors by image, class index and trial position alone: the true label cannot
reach it.

Shapes in names: N images, C classes, S trials of an image, A classes still in, n trials done; a trial position is an
index into an image's S trials.
Sources: Li et al., "Your Diffusion Model is Secretly a Zero-Shot Classifier" (ICCV 2023), algorithm 2; TiF (CVPR 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fewshot_diti.racing import Look


class NotFiniteError(ValueError):
    """What is computed of one image is not finite; other images may be decided all the same."""


PUBLISHED_TRIALS = 500
PUBLISHED_STAGES = ((20, 20), (50, 10), (100, 5), (500, 1))  # FGVC-Aircraft: (trials so far, classes kept)
PUBLISHED_CLASSES = 100

# (pairs [P, 2] of image and class, trial positions [m]) -> errors [P, m]; both int64 on the CPU
ErrorsFn: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage: the trials at `trial_positions` for every class still in, then keep the `keep` best (all, if fewer).

    ValueError: no position, a negative or a repeated one, or keep below 1.
    """

    trial_positions: tuple[int, ...]
    keep: int

    def __post_init__(self) -> None:
        check_positions(self.trial_positions)
        if self.keep < 1:
            raise ValueError(f"keep = {self.keep}; a stage keeps one class or more")

    def survivors(self, weighted_An: Tensor, positions_n: Tensor) -> Tensor:
        """Which classes stay, bool [A], by their weighted errors; a tie goes to the lower class index."""
        ranks_A = weighted_An.mean(1).argsort(stable=True).argsort()
        return ranks_A < self.keep

    def over(self, num_alive: int) -> bool:
        """Whether an image is done before this stage: never, the last class's trials are part of the schedule."""
        return False


class Decision(NamedTuple):
    """Result of `eliminate` for one image; classes are positions among all C classes, never among the survivors.

    `position`: the winning class. `scores`: float64 [C]; the winner's weighted mean error and offset, and for another
    class the winner's plus the mean of their differences over the trials that both had, so that all can be compared;
    the winner's is the smallest; infinite for a class that was out from the start. `evaluations`: samples through the
    U-Net. `decided`: one class was left before the last stage.
    """

    position: int
    scores: Tensor
    evaluations: int
    decided: bool

    def json_scores(self) -> list[float | None]:
        """The scores as JSON can hold them, which has no infinity."""
        return [score if isfinite(score) else None for score in self.scores.tolist()]


def published_stages(
    num_classes: int, trials: int = PUBLISHED_TRIALS, stages: Sequence[tuple[int, int]] = PUBLISHED_STAGES
) -> tuple[Stage, ...]:
    """The schedule of TiF's published code; `stages` are (n, classes kept).

    Stage n takes n of the `trials` positions, every (trials // n)-th from trials // n // 2 on, and skips those done:
    20, 50, 80 and 350 new trials per class at the defaults. Position p of 500 is timestep 1 + 2 p
    (`even_grid(500, 0, 1000)`). Where n does not divide `trials` (128 of 500, ISIC2019), the first n of those positions
    are taken, as published: the trials with the largest timesteps then wait for a later stage.

    5,550 evaluations per image at 100 classes. ValueError: n above `trials`, or a stage without a new trial.
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

    900 evaluations per image at 12 classes (keep 3, 2, 1, 1), where `published_stages` takes 3,390. With 20 classes or
    fewer, stage 3 leaves one class and settles the label; the last 350 evaluations only refine that class's score.
    """
    stages = [(n, -(-keep * num_classes // PUBLISHED_CLASSES)) for n, keep in PUBLISHED_STAGES]
    return published_stages(num_classes, stages=stages)


def exhaustive(trials: int) -> tuple[Stage, ...]:
    """One stage of all `trials` for every class: trials x classes evaluations per image, no class dropped early."""
    return (Stage(trial_positions=tuple(range(trials)), keep=1),)


def count_evaluations(stages: Sequence[Stage | Look], num_classes: int) -> int:
    """Evaluations that `stages` cost an image: samples through the U-Net, one for each new trial of a class still in.

    For a race, the most that it can cost: when it ends depends on the image.
    """
    total, alive = 0, num_classes
    for stage in stages:
        total += alive * len(stage.trial_positions)
        alive = min(stage.keep, alive) if isinstance(stage, Stage) else alive
    return total


def eliminate(
    errors_fn: ErrorsFn,
    num_images: int,
    num_classes: int,
    stages: Sequence[Stage | Look],
    weights_S: Tensor,
    offsets_NC: Tensor | None = None,
) -> list[Decision]:
    """Classify images by elimination; all images go through a stage together, each by its own errors and offsets.

    `errors_fn(pairs, trial_positions)`: pairs [P, 2] of image and class, int64 on the CPU, both ascending; returns
    errors [P, trials]. `weights_S`: w / q at each trial position. `offsets_NC`: added to the scores, for what is known
    of an image beside its errors; a class whose offset is infinite is out from the start, with an infinite score. A tie
    goes to the lower class index.

    ValueError: an error that is not finite (names the class), positions beyond `weights_S` or done twice, errors of
    another shape, no stage, offsets that are no numbers or leave an image without a class, or a stage by whose end no
    trial has had a weight: it would drop classes blindly.
    """
    if num_classes < 1 or not stages:
        raise ValueError(f"{num_classes} classes and {len(stages)} stages; elimination needs one of each or more")
    positions = [position for stage in stages for position in stage.trial_positions]
    if len(set(positions)) < len(positions) or max(positions) >= len(weights_S):
        raise ValueError(
            f"stages of {len(positions)} trials with positions up to {max(positions)} for {len(weights_S)} weights; "
            f"positions go from 0 to {len(weights_S) - 1}, each in one stage"
        )
    weights_S = weights_S.double().cpu()
    weighted_NCS = torch.zeros(num_images, num_classes, len(positions), dtype=torch.float64)  # in the order done
    trials_NC = torch.zeros(num_images, num_classes, dtype=torch.long)
    offsets_NC = torch.zeros(num_images, num_classes) if offsets_NC is None else offsets_NC.double().cpu()
    alive_NC = offsets_NC != torch.inf
    if not offsets_NC[alive_NC].isfinite().all():
        raise ValueError("offsets are finite, or infinite and above 0; some are not a number, or minus infinity")
    if not alive_NC.any(1).all():
        raise ValueError(f"offsets leave image {int((~alive_NC.any(1)).nonzero()[0])} without a class")
    decided_N = torch.zeros(num_images, dtype=torch.bool)
    done = 0
    for number, stage in enumerate(stages, start=1):
        counts = alive_NC.sum(1).tolist()
        racing_N = torch.tensor([not (done and stage.over(count)) for count in counts], dtype=torch.bool)
        pairs = (alive_NC & racing_N[:, None]).nonzero()
        if not len(pairs):
            break
        new = errors_fn(pairs, torch.tensor(stage.trial_positions))
        _check_errors(new, pairs, len(stage.trial_positions))
        end = done + len(stage.trial_positions)
        weights = weights_S[positions[:end]]
        if not weights.any():
            raise ValueError(
                f"all {end} trials up to stage {number} have weight 0, so it cannot tell which classes to keep; "
                "put the trials inside the window, or score exhaustively"
            )
        weighted_NCS[pairs[:, 0], pairs[:, 1], done:end] = (
            new.double().cpu() * weights[done:]
            + offsets_NC[pairs[:, 0], pairs[:, 1], None]  # the mean over trials has it once
        )
        trials_NC[pairs[:, 0], pairs[:, 1]] = end
        positions_n = torch.tensor(positions[:end])
        for image in racing_N.nonzero().flatten().tolist():
            still_in = alive_NC[image].nonzero().flatten()
            kept = stage.survivors(weighted_NCS[image, still_in, :end], positions_n)
            alive_NC[image, still_in[~kept]] = False
        done = end
        if number < len(stages):
            decided_N = alive_NC.sum(1) == 1
    images = zip(weighted_NCS, trials_NC, alive_NC, decided_N.tolist(), strict=True)
    return [_result(*image) for image in images]


def _result(weighted_CS: Tensor, trials_C: Tensor, alive_C: Tensor, decided: bool) -> Decision:
    """What an image's race or schedule says, from the weighted errors that were asked for."""
    still_in = alive_C.nonzero().flatten()
    most = int(trials_C.max())
    label = int(still_in[weighted_CS[still_in, :most].mean(1).argmin()])
    had = torch.arange(weighted_CS.shape[1]) < trials_C[:, None]
    behind_C = ((weighted_CS - weighted_CS[label]) * had).sum(1) / trials_C
    behind_C = behind_C.clamp(min=0).masked_fill(trials_C == 0, torch.inf)
    scores_C = weighted_CS[label, :most].mean() + behind_C
    return Decision(label, scores_C, int(trials_C.sum()), decided)


def check_positions(positions: tuple[int, ...]) -> None:
    """Raises a ValueError for no position, a negative or a repeated one."""
    if not positions or min(positions) < 0 or len(set(positions)) < len(positions):
        raise ValueError(f"trial_positions {positions}: give one position or more, from 0 on, each once")


def _check_errors(errors: Tensor, pairs: Tensor, num_trials: int) -> None:
    if errors.shape != (len(pairs), num_trials):
        raise ValueError(f"errors_fn gave errors {tuple(errors.shape)} for {len(pairs)} pairs x {num_trials} trials")
    broken = (~errors.isfinite().all(dim=1)).nonzero().flatten()
    if len(broken):
        raise ValueError(
            f"class index {pairs[broken[0], 1]} has an error that is not finite; train it again or remove it"
        )
