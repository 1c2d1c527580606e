"""Shots judged by class tokens that were trained without them.

Shapes in names: N images, C classes, S trials of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from fewshot_diti.backbone import Backbone
from fewshot_diti.bank import Bank
from fewshot_diti.checkpoints import Checkpoints
from fewshot_diti.config import Label, Settings
from fewshot_diti.data.images import ImageSource
from fewshot_diti.distributed import share
from fewshot_diti.encoding import Encoder, PreparedImage
from fewshot_diti.progress import Progress
from fewshot_diti.prompts import Prompts
from fewshot_diti.scoring import Scorer, decide, error_tensor
from fewshot_diti.training import Groups, OnStep, raise_failed, train_bank
from fewshot_diti.witnesses import FittedWitness

K = TypeVar("K", int, str, str | int | bool)  # of classes: places, names, or labels
X = TypeVar("X")


@dataclass(frozen=True, kw_only=True, eq=False)
class Fit:
    """What a fit works with: all that training and calibration share.

    Attributes:
        encoder: of the images.
        prompts: of the class tokens.
        settings: complete.
        groups: the shots of each class.
        checkpoints: that trainings go on from.
    """

    encoder: Encoder
    prompts: Prompts
    settings: Settings
    groups: Groups
    checkpoints: Checkpoints | None = None

    @property
    def backbone(self) -> Backbone:
        """The frozen Stable Diffusion."""
        return self.encoder.backbone

    def train(
        self, groups: Groups, desc: str = "class tokens", on_step: OnStep | None = None
    ) -> tuple[Bank, dict[Label, int]]:
        """As `training.train_bank`, on these groups."""
        return train_bank(
            self.encoder,
            groups,
            self.prompts,
            self.settings,
            desc=desc,
            checkpoints=self.checkpoints,
            on_step=on_step,
        )


def split_folds(groups: Mapping[K, Sequence[X]], folds: int) -> Iterator[tuple[dict[K, list[X]], list[tuple[int, X]]]]:
    """For each fold the shots that are kept, by class, and those held out, each with its class's place in sorted order.

    No more folds than the largest class has shots. Not scikit-learn's StratifiedKFold: it refuses classes with fewer
    shots than folds, and its folds are others.
    """
    order = sorted(groups)
    folds = min(folds, max(len(shots) for shots in groups.values()))
    for fold in range(folds):
        kept = {x: [s for i, s in enumerate(groups[x]) if i % folds != fold] for x in order}
        yield kept, [(c, s) for c, x in enumerate(order) for i, s in enumerate(groups[x]) if i % folds == fold]


def judge_held_out(fit: Fit, judge: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """What `judge(bank, images)` gives for every shot under class tokens trained without it, [N, ...], fold by fold,
    and the shots' classes [N].

    Every class has two shots or more. Costs one training of the bank on the other shots per fold.

    Raises:
        TrainingError: a class's loss was not finite.
    """
    judged: list[Tensor] = []
    truth: list[int] = []
    parts = list(split_folds(fit.groups, fit.settings.scoring.folds))
    for number, (kept, held) in enumerate(parts, start=1):
        bank, failed = fit.train(kept, f"fold {number} of {len(parts)}")
        raise_failed(failed, "that was in cross-validation, the class tokens are trained and kept", "or pass folds=0")
        judged.append(judge(bank, [shot for _, shot in held]))
        truth += [c for c, _ in held]
    return torch.cat(judged), torch.tensor(truth)


def shared_errors(fit: Fit, bank: Bank, images: Sequence[ImageSource | PreparedImage], grid: Tensor) -> Tensor:
    """The error tensor [N, C, S] at timesteps `grid` [S]; the processes share the images, all get the whole. One image
    is in memory at a time."""

    def errors(rows: list[int]) -> Tensor:
        scorer, parts = _scorer(fit, bank), []
        with Progress(len(rows), "errors", "image") as bar:
            for row in rows:
                image = fit.encoder.prepare(images[row])
                latents = fit.encoder.latents([image])
                parts.append(error_tensor(scorer, latents, [image.id], grid.tolist()))
                bar.update()
        return torch.cat(parts)

    return share(len(images), errors, (len(bank), len(grid)))


def shared_scores(fit: Fit, bank: Bank, images: Sequence[PreparedImage], grid: Tensor, weights: Tensor) -> Tensor:
    """Scores [N, C] of the class tokens by the configured schedule, with `weights` [S]; shared as `shared_errors`."""
    looks = fit.settings.prediction.looks(len(bank), len(grid))

    def scores(rows: list[int]) -> Tensor:
        mine = [images[row] for row in rows]
        ids, latents = [image.id for image in mine], fit.encoder.latents(mine)
        decisions = decide(_scorer(fit, bank), latents, ids, grid.tolist(), weights, looks)
        return torch.stack([decision.scores for decision in decisions])

    return share(len(images), scores, (len(bank),))


def _scorer(fit: Fit, bank: Bank) -> Scorer:
    _, scoring, prediction = fit.settings
    return Scorer(fit.backbone, bank, seed=scoring.seed, batch_size=prediction.batch_size)


def held_out_log_probabilities(fit: Fit, fitted: FittedWitness) -> Tensor:
    """Log-probabilities [N, C] of each held-out shot by a witness of the others, ordered as by `judge_held_out`."""
    rows: list[Tensor] = []
    _, scoring, _ = fit.settings
    for kept, held in split_folds({x: list(fitted.shots[x]) for x in fit.groups}, scoring.folds):
        shots = {x: torch.stack(kept[x]) for x in sorted(kept)}
        again = FittedWitness.fit(fitted.name, fitted.witness, shots, fit.settings.training, fit.checkpoints)
        rows.append(again.judge.log_probabilities(torch.stack([views[0] for _, views in held])))
    return torch.cat(rows)
