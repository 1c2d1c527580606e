"""Settings by number of shots: as published, and as this package recommends.

What is recommended for small backbones was measured on the pocket. For large ones the published settings are taken,
with a falling learning rate, races, and weights that need no shots: none of these is measured there yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, get_args

from torch import Tensor

from fewshot_diti.elimination import (
    PUBLISHED_STAGES,
    PUBLISHED_TRIALS,
    Look,
    Stage,
    count_evaluations,
    exhaustive,
    published_stages,
    racing,
)
from fewshot_diti.timesteps import parse_weighting
from fewshot_diti.training import TrainingConfig
from fewshot_diti.trials import drawn_grid, even_grid

PUBLISHED_SHOTS = (1, 2, 4, 8, 16)
PUBLISHED_BLOCKS = ("narrow", "narrow", "narrow", "medium", "all")
CALIBRATION_TRIALS = 16  # of each shot, at most, for weights estimated on errors, which are smooth in t

DensityName = Literal["even", "importance"]
DecideName = Literal["exhaustive", "published", "racing"]


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """How images are scored.

    Attributes:
        trials: S, the (t, noise) pairs of every image and class.
        timesteps: (lo, hi) that the trials' time-steps cover.
        density: "even", or "importance": more trials where the weighted errors of the shots differ more between
            classes (`timesteps.importance`); the score averages w / q times the error.
        decide: "exhaustive" gives every class every trial, "published" eliminates by `stages`, "racing" drops a class
            once it is not likely to win any more (`elimination.Look`).
        stages: (trials so far, classes kept) each, of "published".
        confidence: of "racing", about the probability, at least, that it ends with the label of all trials, where the
            assumptions of `elimination.Look` hold.
        weighting: as `timesteps.parse_weighting` reads it.
        features_weight: what each nat of a class's log-probability by the U-Net's own features of an image
            (`features.fit_discriminant`) takes off its score, in units of the score as `weighting` makes it; 0 leaves
            the word to the class tokens alone.
        shortlist: classes that the same features let in to the trials, the most probable ones; None lets in all. Bounds
            accuracy by its recall, which cross-validation tells.
        temperature: of the softmax over -score; None fits it on out-of-fold scores of the shots.
        calibration_images: shots whose errors `spread`, `relative` and the importance density read, spread over the
            classes.
        folds: of cross-validation on the shots, for `auto`, the temperature and the reported accuracy; 0 for none.
        unet_scale, text_encoder_scale: LoRA scale at scoring.
        batch_size: evaluations in one forward; decides memory and speed, never the result beyond rounding.
        seed: of the noise.

    Raises:
        ValueError: a value is out of its range.
    """

    trials: int = 24
    timesteps: tuple[int, int] = (0, 1000)
    density: DensityName = "even"
    decide: DecideName = "exhaustive"
    stages: tuple[tuple[int, int], ...] = PUBLISHED_STAGES
    confidence: float = 0.9
    weighting: str = "uniform"
    features_weight: float = 0.0
    shortlist: int | None = None
    temperature: float | None = 0.001
    calibration_images: int = 24
    folds: int = 0
    unet_scale: float = 0.6
    text_encoder_scale: float = 0.7
    batch_size: int = 96
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("trials", "calibration_images", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; pass a whole number of at least 1.")
        lo, hi = self.timesteps
        if not 0 <= lo < hi:
            raise ValueError(f"timesteps={self.timesteps}; pass (lo, hi) with 0 <= lo < hi.")
        for name, allowed in (("decide", get_args(DecideName)), ("density", get_args(DensityName))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}; pass one of {allowed}.")
        if self.decide == "published" and self.stages[-1:] != ((self.trials, 1),):
            raise ValueError(
                f"stages={self.stages} must end with ({self.trials}, 1): all trials done and one class left."
            )
        if self.decide == "published" and self.density == "importance":
            raise ValueError("Published stages stand on an even grid; pass density='even', or decide='racing'.")
        if not 0 <= self.features_weight < float("inf"):
            raise ValueError(f"features_weight={self.features_weight}; pass a number of at least 0.")
        if self.shortlist is not None and self.shortlist < 2:
            raise ValueError(f"shortlist={self.shortlist}; pass 2 or more classes to choose among, or None for all.")
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence={self.confidence}; pass a probability between 0 and 1.")
        self.schedule(1)
        if self.folds < 0 or self.folds == 1:
            raise ValueError(f"folds={self.folds}; pass 2 or more, or 0 for no cross-validation.")
        weighting = parse_weighting(self.weighting)
        if weighting.name == "window":
            first, last = weighting.parameters
            inside = max(lo, first) < min(hi, last)
            if self.decide == "published":  # whose trials stand on an even grid
                inside = bool(((self.grid() >= first) & (self.grid() < last)).any())
            if not inside:
                raise ValueError(
                    f"None of {self.trials} trials at timesteps={self.timesteps} lies inside {self.weighting}; "
                    "set timesteps to the window."
                )
        if weighting.name == "auto" and self.folds < 2:
            raise ValueError("weighting='auto' is chosen on held-out shots; pass folds=2 or more.")
        if self.temperature is None and self.folds < 2:
            raise ValueError("temperature=None is fitted on held-out shots; pass folds=2 or more, or a temperature.")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}; pass a number above 0.")

    def schedule(self, num_classes: int) -> Sequence[Stage | Look]:
        """What every image goes through."""
        if self.decide == "published":
            return published_stages(num_classes, self.trials, self.stages)
        return racing(self.trials, confidence=self.confidence) if self.decide == "racing" else exhaustive(self.trials)

    def evaluations(self, num_classes: int) -> int:
        """What an image costs at most: samples through the U-Net."""
        scored = min(num_classes, self.shortlist or num_classes)
        return count_evaluations(self.schedule(num_classes), scored) + self.asks_features

    @property
    def asks_features(self) -> bool:
        """Whether the U-Net's own features have a say."""
        return self.features_weight > 0 or self.shortlist is not None

    def grid(self, density_T: Tensor | None = None) -> Tensor:
        """Time-steps [S] of the trials, ascending: even, or drawn from a density."""
        return even_grid(self.trials, *self.timesteps) if density_T is None else drawn_grid(density_T, self.trials)


def interpolate_steps(num_shots: int, steps: tuple[int, ...]) -> int:
    """Training steps at any number of shots: linear between the published counts, the last one beyond."""
    if num_shots >= PUBLISHED_SHOTS[-1]:
        return steps[-1]
    for (k0, s0), (k1, s1) in pairwise(zip(PUBLISHED_SHOTS, steps, strict=True)):
        if k0 <= num_shots <= k1:
            return round(s0 + (s1 - s0) * (num_shots - k0) / (k1 - k0))
    raise ValueError(f"num_shots={num_shots}; pass a whole number of at least 1.")


def published_blocks(num_shots: int) -> str:
    """The block filter that the paper uses at this number of shots (the next lower published count)."""
    return [b for k, b in zip(PUBLISHED_SHOTS, PUBLISHED_BLOCKS, strict=True) if k <= max(1, num_shots)][-1]


def published_training(num_shots: int, steps: tuple[int, ...] = (60, 100, 200, 700, 1000)) -> TrainingConfig:
    """As in the paper (TiF, CVPR 2024): 1 shot and 1 prior image a step, constant learning rate, rank 16, all t."""
    return TrainingConfig(
        steps=interpolate_steps(num_shots, steps),
        blocks=published_blocks(num_shots),
        samples_per_batch=16,  # with gradients, at 512 pixels, on a GPU with 80 GB
    )


def published_scoring(stages: tuple[tuple[int, int], ...] = PUBLISHED_STAGES) -> ScoringConfig:
    """As in the paper, with the weighting that its numbers were computed with."""
    return ScoringConfig(
        trials=PUBLISHED_TRIALS,
        decide="published",
        stages=stages,
        weighting="tif_released",
        batch_size=32,
    )


def recommended_training(num_shots: int, *, small: bool = True) -> TrainingConfig:
    """The settings that this package uses where the user names none; `small`: as `Backbone.small`."""
    if not small:
        return replace(published_training(num_shots), lr_schedule="cosine")
    return TrainingConfig(
        steps=interpolate_steps(num_shots, (60, 80, 100, 130, 160)),
        rank=8,
        blocks="all",
        lr_unet=3e-3,
        lr_text_encoder=3e-3,
        lr_schedule="cosine",
        shots_per_step=2,  # 4 cost twice as much, for 75.7 instead of 78.5 % on val images of one draw
        prior_weight=0.0,
        colour_variants=8,
        brightness=0.3,
        hue=0.5,
        permute_channels=True,
    )


def recommended_scoring(*, small: bool = True) -> ScoringConfig:
    """The scoring that this package uses where the user names none; `small`: as `Backbone.small`."""
    if not small:
        return ScoringConfig(trials=50, decide="racing", weighting="pdae", batch_size=32)
    # the temperature: fitted at 16 shots on images of the val split, in races (0.00026), 1.15 of it with the features
    return ScoringConfig(
        trials=32,
        timesteps=(0, 900),
        density="importance",
        decide="racing",
        weighting="relative",
        features_weight=0.0002,  # the most accurate on held-out shots of 2 to 16
        temperature=0.0003,
        unet_scale=1.0,
        text_encoder_scale=1.0,
    )
