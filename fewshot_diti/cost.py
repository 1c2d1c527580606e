"""What a run will cost, printed before it starts."""

from __future__ import annotations

import sys
import time

import torch

from fewshot_diti.backbone import Backbone
from fewshot_diti.calibration import CALIBRATION_TRIALS
from fewshot_diti.config import ScoringConfig, TrainingConfig
from fewshot_diti.distributed import process_state
from fewshot_diti.timesteps import FROM_ERRORS, parse_weighting

_PRIOR_EVALUATIONS = 50  # of one prior image: 25 steps with guidance


def training_evaluations(training: TrainingConfig, scoring: ScoringConfig, num_shots: int, num_classes: int) -> int:
    """Evaluations of training, cross-validation and timestep weights; backward passes count as two.

    Args:
        num_shots: of all classes together.
    """
    priors = training.prior_weight > 0
    samples = training.steps * num_classes * training.shots_per_step * (2 if priors else 1)
    scored = num_shots * scoring.trials if scoring.folds else 0
    if parse_weighting(scoring.weighting).name in FROM_ERRORS or scoring.density == "importance":
        scored += min(num_shots, scoring.calibration_images) * min(scoring.trials, CALIBRATION_TRIALS)
    return (
        3 * samples * (1 + scoring.folds)
        + (training.prior_images * _PRIOR_EVALUATIONS if priors else 0)
        + scored * num_classes
    )


@torch.no_grad()
def seconds_of_an_evaluation(backbone: Backbone, size: tuple[int, int], batch_size: int = 1) -> float:
    """Seconds of one evaluation, measured in a batch; `size` is (height, width) of the images in pixels."""
    shape = (batch_size, backbone.latent_channels, *(s // backbone.vae_scale_factor for s in size))
    latents = torch.zeros(shape, device=backbone.device)
    times = torch.zeros(batch_size, dtype=torch.long, device=backbone.device)
    text = backbone.encode_text(backbone.tokenize([""] * batch_size))
    text.sum().item()  # a GPU is waited for, before and after
    start = time.perf_counter()
    backbone.errors(latents, latents, times, text).sum().item()
    return (time.perf_counter() - start) / batch_size


def announce_time(backbone: Backbone, size: tuple[int, int], evaluations: int, what: str) -> None:
    """Before a large backbone starts on a CPU: measures one evaluation and prints how long `what` will take.

    Args:
        size: (height, width) of the images in pixels.
        evaluations: of all processes, which share them.

    The main process prints it to the standard error output.
    """
    if backbone.device.type != "cpu" or backbone.kind == "pocket" or not evaluations:
        return
    seconds = seconds_of_an_evaluation(backbone, size)
    state = process_state()
    if state.is_main_process:
        print(
            f"This backbone has {backbone.unet.num_parameters() / 1e6:.0f} million parameters and runs on the CPU: "
            f"{seconds:.2g} s per evaluation, about {evaluations} evaluations of {what}, "
            f"{seconds * evaluations / 3600 / state.num_processes:.1f} hours in all. A GPU is faster.",
            file=sys.stderr,
        )
