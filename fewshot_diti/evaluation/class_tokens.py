"""Rows of a few-shot table that use class tokens or the backbone itself.

Shapes in names: N test images, C classes, S trials, T timesteps of the schedule.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

import numpy as np
import torch
from scipy.special import log_softmax, softmax
from torch import Tensor

from fewshot_diti import timesteps
from fewshot_diti.baselines import TipAdapter
from fewshot_diti.baselines.base import Baseline
from fewshot_diti.baselines.views import as_it_is
from fewshot_diti.config import Label
from fewshot_diti.discriminant import fit_discriminant
from fewshot_diti.evaluation.bench import FOLDS, Bench
from fewshot_diti.evaluation.kept_errors import DitiErrors
from fewshot_diti.evaluation.task import Outcome, Task
from fewshot_diti.folds import split_folds
from fewshot_diti.temperature import fit_temperature
from fewshot_diti.weighting import timestep_weights

TINY = np.finfo(np.float64).tiny
ENSEMBLE_WEIGHTS = tuple(np.linspace(0, 1, 21).tolist())  # of Tip-Adapter beside class tokens, to choose from


def zero_shot_sd(bench: Bench, task: Task) -> Outcome:
    """The diffusion classifier: prompts without class tokens, all timesteps alike."""
    errors, seconds = bench.zero_shot(task.test)
    scores = errors.double().mean(2).numpy()
    return Outcome(
        probabilities=softmax(-scores / recommended_temperature(bench), axis=1),
        evaluations=errors.shape[1] * errors.shape[2],
        training_seconds=0.0,
        scoring_seconds=seconds,
    )


def diti(weighting: str, bench: Bench, task: Task) -> Outcome:
    """Class tokens, their errors weighted in one way."""
    errors = bench.diti(task)
    scores, temperature, chosen = _scores(weighting, bench, task, errors)
    return Outcome(
        probabilities=softmax(-scores.numpy() / temperature, axis=1),
        evaluations=errors.test.shape[1] * chosen["trials"],
        training_seconds=errors.training_seconds,
        scoring_seconds=errors.scoring_seconds * chosen["trials"] / errors.test.shape[2],
        chosen=chosen | {"temperature": temperature},
    )


def in_task_order(baseline: Baseline, task: Task, probabilities_NC: np.ndarray) -> np.ndarray:
    """Columns in the order of the task's classes."""
    known = baseline.classes_.tolist()
    return probabilities_NC[:, [known.index(name) for name in task.class_names]]


def tip_adapter(bench: Bench, task: Task, *, fine_tune: bool = False) -> TipAdapter:
    """Tip-Adapter on the bench's CLIP.

    Its keys are recoloured where the shots choose the weight of a key: a mean over colours looks like no image.
    """
    return TipAdapter(
        bench.clip,
        bench.templates,
        bench.clip_preset.tip_f if fine_tune else bench.clip_preset.tip,
        fine_tune=fine_tune,
        recolour=bench.recolour if recolours_keys(task.num_shots, fine_tune) else as_it_is,
        seed=task.seed,
    )


def recolours_keys(num_shots: int, fine_tune: bool) -> bool:
    """Whether Tip-Adapter's keys are means over views in other colours."""
    return num_shots > 1 and not fine_tune


def diti_with_clip(bench: Bench, task: Task) -> Outcome:
    """Log-probabilities of class tokens and of Tip-Adapter, mixed with the weight under which held-out shots are most
    likely; half and half with one shot per class.

    Each gets a temperature fitted on held-out shots before they are mixed: Tip-Adapter's logits grow with its alpha.
    """
    start = perf_counter()
    errors, weighting = bench.diti(task), bench.recommended.weighting
    scores, temperature, _ = _scores(weighting, bench, task, errors)
    labels_n = np.array(task.shot_labels())
    groups: dict[Label, list[int]] = {name: np.flatnonzero(labels_n == name).tolist() for name in task.class_names}
    # by fold, as the errors of held-out shots are
    rows = [row for _, held in split_folds(groups, FOLDS) for _, row in held]
    tip = tip_adapter(bench, task)
    tip.fit(task.shots.subset(rows).decoded(), labels_n[rows].tolist())
    weight, clip_temperature = 0.5, 1.0
    if errors.out_of_fold and tip.left_out is not None:
        held_out, _, _ = _scores(weighting, bench, task, errors, held_out=True)
        log_held_out = log_softmax(-held_out.numpy() / temperature, axis=1)
        logits, labels = torch.from_numpy(in_task_order(tip, task, tip.left_out)), errors.held_out_labels
        clip_temperature = fit_temperature(-logits, labels)
        log_clip = log_softmax(logits.numpy() / clip_temperature, axis=1)

        def likelihood(w: float) -> float:
            mixed = log_softmax((1 - w) * log_held_out + w * log_clip, axis=1)
            return mixed[np.arange(len(labels)), labels.numpy()].mean()

        weight = float(max(ENSEMBLE_WEIGHTS, key=likelihood))
    fitted = perf_counter()
    log_diti = log_softmax(-scores.numpy() / temperature, axis=1)
    log_clip = np.log(in_task_order(tip, task, tip.predict_proba(task.test_images())).clip(TINY)) / clip_temperature
    return Outcome(
        probabilities=softmax((1 - weight) * log_diti + weight * log_softmax(log_clip, axis=1), axis=1),
        evaluations=errors.test.shape[1] * errors.test.shape[2],
        training_seconds=errors.training_seconds + fitted - start,
        scoring_seconds=errors.scoring_seconds + perf_counter() - fitted,
        chosen={"clip_weight": weight, "clip_temperature": clip_temperature},
    )


def lda_sd(bench: Bench, task: Task) -> Outcome:
    """The discriminant on the frozen U-Net's own features alone, which counts beside class tokens in the classifier."""
    start = perf_counter()
    discriminant = fit_discriminant(bench.shot_features(task))
    fitted = perf_counter()
    features = next(iter(bench.unet_features.candidates().values()))
    log_p = discriminant.log_probabilities(torch.from_numpy(features(task.test_images())))
    order = [sorted(task.class_names).index(name) for name in task.class_names]  # features are kept in sorted order
    return Outcome(
        probabilities=log_p[:, order].exp().numpy(),
        evaluations=1,
        training_seconds=fitted - start,
        scoring_seconds=perf_counter() - fitted,
    )


def recommended_temperature(bench: Bench) -> float:
    """The temperature where the shots cannot say."""
    return float(bench.recommended.temperature)


def _scores(
    weighting: str, bench: Bench, task: Task, errors: DitiErrors, *, held_out: bool = False
) -> tuple[Tensor, float, dict[str, Any]]:
    """Scores of the test images (or of the held-out shots), the temperature, and what was chosen."""
    times = errors.timesteps
    if weighting == "auto" and not errors.out_of_fold:
        weighting = bench.recommended.weighting
    weights = timestep_weights(
        weighting,
        bench.backbone.alphas_cumprod,
        shot_errors=(errors.held_out, times),
        held_out=(errors.held_out, errors.held_out_labels, times),
        latents=lambda: (bench.shot_latents(task), torch.from_numpy(task.shots.labels)),
    )
    inside = (weights > 0).nonzero().flatten()
    chosen = {
        "weighting": weighting if weighting != "auto" else f"window({int(inside[0])}, {int(inside[-1]) + 1})",
        "trials": int((weights[times] > 0).sum()),
    }
    trial_weights = timesteps.trial_weights(weights, times)
    trial_weights = trial_weights / trial_weights.mean()
    temperature = recommended_temperature(bench)
    if errors.out_of_fold:
        temperature = fit_temperature(timesteps.weighted_mean(errors.held_out, trial_weights), errors.held_out_labels)
    scored = errors.held_out if held_out else errors.test
    return timesteps.weighted_mean(scored, trial_weights), temperature, chosen
