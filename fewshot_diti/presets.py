"""What is set where the user gives nothing: all that differs between kinds of backbones, and the published settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, TypeVar

from fewshot_diti.config import PredictionConfig, ScoringConfig, Settings, TrainingConfig
from fewshot_diti.elimination import PUBLISHED_STAGES, PUBLISHED_TRIALS

T = TypeVar("T")
Kind = Literal["pocket", "stable-diffusion"]  # of backbones
PUBLISHED_SHOTS = (1, 2, 4, 8, 16)
LARGE_UNET = 200_000_000  # parameters; from here on a U-Net is of Stable Diffusion's kind


def kind_of(num_parameters: int) -> Kind:
    """The kind of a backbone by the size of its U-Net; a large one takes hours on a CPU, and other settings."""
    return "pocket" if num_parameters <= LARGE_UNET else "stable-diffusion"


@dataclass(frozen=True, kw_only=True)
class FeatureConfig:
    """Which features of the frozen U-Net describe an image.

    Attributes:
        timestep: that the U-Net is given, as a share of the schedule; the image has no noise.
        block: up-sampling block whose output is taken, counted from the U-Net's end.
        positions: (height, width) that the block's map is averaged down to at most.
        views: of each shot: itself and copies in other colours.
    """

    timestep: float = 0.06
    block: int = 2
    positions: tuple[int, int] = (8, 16)
    views: int = 4


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The settings for one kind of backbone, where the user gives none.

    Attributes:
        measured: whether they were chosen by measurement on a backbone of this kind.
        steps, blocks: of training, at each of `PUBLISHED_SHOTS`; steps are interpolated between.
        training, scoring, prediction: values of the configurations' fields.
        temperatures: of the class tokens' scores, at each of `PUBLISHED_SHOTS`, or one for all.
        witness_weights: by the kind of witness, at each of `PUBLISHED_SHOTS`, or one for all; of others 1.
        overlap: of witnesses with class tokens and with each other: the temperature of a decision is 1 + overlap x (sum
            of the witnesses' weights) times that of the class tokens. 1: they know the same, 0: they are independent.
        features: of the U-Net.
        concept: what all classes are; None: the user has to say.
    """

    measured: bool
    steps: tuple[int, ...]
    blocks: tuple[str, ...]
    training: Mapping[str, Any]
    scoring: Mapping[str, Any]
    prediction: Mapping[str, Any]
    temperatures: tuple[float, ...]
    witness_weights: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    overlap: float = 1.0
    features: FeatureConfig = field(default_factory=FeatureConfig)
    concept: str | None = None

    def temperature_of(self, num_shots: int) -> float:
        """The temperature of the class tokens' scores at this number of shots per class."""
        return _at(num_shots, self.temperatures)

    def weights_of(self, witnesses: Sequence[str], num_shots: int) -> tuple[float, ...]:
        """The weights of witnesses by their names, at this number of shots per class."""
        kinds = [name.partition(":")[0] for name in witnesses]
        return tuple(_at(num_shots, self.witness_weights.get(kind, (1.0,))) for kind in kinds)


PRESETS: dict[Kind, Preset] = {
    "pocket": Preset(
        measured=True,
        steps=(60, 80, 100, 130, 160),
        blocks=("all",) * 5,
        training={
            "rank": 8,
            "lr_unet": 3e-3,
            "lr_text_encoder": 3e-3,
            "lr_schedule": "cosine",
            "shots_per_step": 2,  # 4 cost twice as much, for 75.7 instead of 78.5 % on val images of one draw
            "prior_weight": 0.0,
            "brightness": 0.3,
            "hue": 0.5,
            "permute_channels": True,
            "samples_per_batch": 48,
        },
        scoring={
            "trials": 32,
            "timesteps": (0, 900),
            "density": "importance",
            "weighting": "relative",
            "witnesses": ("features", "network"),
            "unet_scale": 1.0,
            "text_encoder_scale": 1.0,
        },
        prediction={"schedule": "racing", "batch_size": 96},
        # those of class tokens alone on val images in liveries that no shot shows, of one draw; 8 shots lie between
        temperatures=(0.002, 0.0009, 0.00044, 0.0003, 0.00026),
        # near those fitted on the same images (docs/experiments/witnesses.md)
        witness_weights={
            "features": (1.0, 2.0, 2.5, 2.75, 3.0),
            "network": (0.3, 0.7, 1.0, 1.2, 1.5),
        },
        overlap=0.4,
        concept="aircraft",
    ),
    # The published settings, with a falling learning rate, races, and weights that need no shots.
    "stable-diffusion": Preset(
        measured=False,
        steps=(60, 100, 200, 700, 1000),
        blocks=("narrow", "narrow", "narrow", "medium", "all"),
        training={
            "rank": 16,
            "lr_unet": 1e-4,
            "lr_text_encoder": 5e-5,
            "lr_schedule": "cosine",
            "shots_per_step": 1,
            "prior_weight": 1.0,
            "brightness": 0.2,
            "hue": 0.1,
            "permute_channels": False,
            "samples_per_batch": 16,  # with gradients, at 512 pixels, on a GPU with 80 GB
        },
        scoring={
            "trials": 50,
            "timesteps": (0, 1000),
            "density": "even",
            "weighting": "pdae",
            "witnesses": ("features",),  # they draw up a shortlist where one is asked for
            "witness_weights": (0.0,),
            "unet_scale": 0.6,
            "text_encoder_scale": 0.7,
        },
        prediction={"schedule": "racing", "batch_size": 32},
        temperatures=(0.001,),
    ),
}


def complete(
    kind: Kind,
    num_shots: int,
    training: TrainingConfig | None = None,
    scoring: ScoringConfig | None = None,
    prediction: PredictionConfig | None = None,
) -> Settings:
    """The configurations given, their missing fields filled from the preset for this kind and number of shots."""
    preset = PRESETS[kind]
    by_shots = {"steps": interpolate_steps(num_shots, preset.steps), "blocks": _at(num_shots, preset.blocks)}
    given = scoring or ScoringConfig()
    values = {**preset.scoring, "temperature": preset.temperature_of(num_shots)}
    if given.witnesses is not None or "witness_weights" not in values:  # of those that the user names, or by the shots
        values["witness_weights"] = preset.weights_of(
            values["witnesses"] if given.witnesses is None else given.witnesses, num_shots
        )
    return Settings(
        (training or TrainingConfig()).resolve({**preset.training, **by_shots}),
        given.resolve(values),
        (prediction or PredictionConfig()).resolve(preset.prediction),
    )


def recommended(num_shots: int, kind: Kind = "pocket") -> Settings:
    """What is used where the user gives nothing."""
    return complete(kind, num_shots)


def published(
    num_shots: int,
    steps: tuple[int, ...] = PRESETS["stable-diffusion"].steps,
    stages: tuple[tuple[int, int], ...] = PUBLISHED_STAGES,
) -> Settings:
    """As in the paper (TiF, CVPR 2024): constant learning rate, elimination in stages, and the weighting that its
    numbers were computed with."""
    return complete(
        "stable-diffusion",
        num_shots,
        TrainingConfig(steps=interpolate_steps(num_shots, steps), lr_schedule="constant"),
        ScoringConfig(trials=PUBLISHED_TRIALS, weighting="tif_released"),
        PredictionConfig(schedule="published", stages=stages),
    )


def interpolate_steps(num_shots: int, steps: tuple[int, ...]) -> int:
    """Training steps at any number of shots: linear between the published counts, the last one beyond."""
    if num_shots >= PUBLISHED_SHOTS[-1]:
        return steps[-1]
    for (k0, s0), (k1, s1) in pairwise(zip(PUBLISHED_SHOTS, steps, strict=True)):
        if k0 <= num_shots <= k1:
            return round(s0 + (s1 - s0) * (num_shots - k0) / (k1 - k0))
    raise ValueError(f"num_shots={num_shots}; pass a whole number of at least 1.")


def _at(num_shots: int, values: tuple[T, ...]) -> T:
    """The value at the next lower of the published numbers of shots; a single one holds for all."""
    assert len(values) in (1, len(PUBLISHED_SHOTS)), values
    return [v for k, v in zip(PUBLISHED_SHOTS, values, strict=False) if k <= max(1, num_shots)][-1]
