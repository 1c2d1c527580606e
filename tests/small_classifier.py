"""A classifier on the tiny backbone, trained for a few steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fewshot_diti import Backbone, Bank, DiTiClassifier, PredictionConfig, ScoringConfig, TrainingConfig

TRAINING = TrainingConfig(
    steps=3,
    rank=2,
    blocks="all",
    lr_unet=5e-2,
    lr_text_encoder=5e-2,
    lr_schedule="constant",
    shots_per_step=2,
    prior_weight=0.0,
    colour_variants=2,
    brightness=0.2,
    hue=0.1,
    permute_channels=False,
)
SCORING = ScoringConfig(
    trials=5,
    timesteps=(0, 1000),
    density="even",
    weighting="uniform",
    witnesses=(),
    temperature=0.01,
    unet_scale=0.6,
    text_encoder_scale=0.7,
)
PREDICTION = PredictionConfig(schedule="exhaustive")
COLOURS = {"a320": (220, 40, 40), "dc-9": (40, 200, 60), "tu-154": (60, 60, 230), "747": (200, 200, 30)}


def shots_of(pictures: dict[str, list[Path]], labels: Sequence[str], count: int = 2) -> tuple[list[Path], list[str]]:
    return [p for x in labels for p in pictures[x][:count]], [x for x in labels for _ in range(count)]


def make(backbone: Backbone, **changes: object) -> DiTiClassifier:
    return DiTiClassifier(backbone, **{"training": TRAINING, "scoring": SCORING, "prediction": PREDICTION, **changes})  # type: ignore[arg-type]


def bank_of(classifier: DiTiClassifier) -> Bank:
    assert classifier.bank_ is not None
    return classifier.bank_
