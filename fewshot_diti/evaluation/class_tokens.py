"""Rows of a few-shot table that ask class tokens or the backbone itself.

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
from fewshot_diti.calibration import candidate_windows, choose_window, fixed_weights, held_out_log_probabilities
from fewshot_diti.evaluation.bench import FOLDS, Bench
from fewshot_diti.evaluation.kept_errors import DitiErrors
from fewshot_diti.evaluation.task import Outcome, Task
from fewshot_diti.features import Discriminant, fit_discriminant, score_offsets
from fewshot_diti.held_out import fit_temperature, split_folds

TINY = np.finfo(np.float64).tiny
ENSEMBLE_WEIGHTS = tuple(np.linspace(0, 1, 21).tolist())  # of Tip-Adapter beside class tokens, to choose from
FEATURES_WEIGHT = 0.5  # of the U-Net's features, in temperatures, where none is recommended


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

    Its keys are recoloured where the shots choose how much a key says: a mean over colours is like no image.
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

    Both are made as sure as held-out shots allow before they are mixed: Tip-Adapter's logits grow with its alpha.
    """
    start = perf_counter()
    errors, weighting = bench.diti(task), bench.recommended.weighting
    scores, temperature, _ = _scores(weighting, bench, task, errors)
    groups = task.groups()
    # by fold, as the errors of held-out shots are
    shots = [(shot, sorted(groups)[c]) for _, held in split_folds(groups, FOLDS) for c, shot in held]
    tip = tip_adapter(bench, task)
    tip.fit(*map(list, zip(*shots, strict=True)))
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
    """The discriminant on the frozen U-Net's own features alone, as `diti_with_features` asks it."""
    start = perf_counter()
    discriminant = fit_discriminant(bench.shot_features(task))
    fitted = perf_counter()
    return Outcome(
        probabilities=_by_features(bench, task, discriminant).exp().numpy(),
        evaluations=1,
        training_seconds=fitted - start,
        scoring_seconds=perf_counter() - fitted,
    )


def diti_with_features(bench: Bench, task: Task) -> Outcome:
    """Class tokens and a discriminant on the frozen U-Net's own features of the image, without noise.

    As the classifier does it with a `features_weight`; where none is recommended for the backbone it is half a
    temperature. The temperature is fitted on held-out shots, where there are any.
    """
    start = perf_counter()
    errors, recommended = bench.diti(task), bench.recommended
    shot_features = bench.shot_features(task)
    of_shots, temperature, _ = _scores(recommended.weighting, bench, task, errors, held_out=True)
    weight = recommended.features_weight or FEATURES_WEIGHT * temperature
    if errors.out_of_fold:
        held_out = held_out_log_probabilities(task.groups(), shot_features, FOLDS)
        said = torch.stack(list(held_out.values()))[:, _order(task)]
        temperature = fit_temperature(of_shots + score_offsets(said, weight), errors.held_out_labels)
    discriminant = fit_discriminant(shot_features)
    fitted = perf_counter()
    scores, _, _ = _scores(recommended.weighting, bench, task, errors)
    said = _by_features(bench, task, discriminant)
    return Outcome(
        probabilities=softmax(-(scores + score_offsets(said, weight)).numpy() / temperature, axis=1),
        evaluations=errors.test.shape[1] * errors.test.shape[2] + 1,
        training_seconds=errors.training_seconds + fitted - start,
        scoring_seconds=errors.scoring_seconds + perf_counter() - fitted,
        chosen={"temperature": temperature, "features_weight": weight},
    )


def _by_features(bench: Bench, task: Task, discriminant: Discriminant) -> Tensor:
    """Log-probabilities [N, C] of the test images by the U-Net's own features."""
    features = next(iter(bench.unet_features.candidates().values()))
    return discriminant.log_probabilities(torch.from_numpy(features(task.test_images())))[:, _order(task)]


def _order(task: Task) -> list[int]:
    """The place of each class among the sorted ones, which is how features of shots are kept."""
    return [sorted(task.class_names).index(name) for name in task.class_names]


def recommended_temperature(bench: Bench) -> float:
    """The temperature where the shots cannot say."""
    return bench.recommended.temperature or 1.0


def _scores(
    weighting: str, bench: Bench, task: Task, errors: DitiErrors, *, held_out: bool = False
) -> tuple[Tensor, float, dict[str, Any]]:
    """Scores of the test images (or of the held-out shots), the temperature, and what was chosen."""
    abar, times = bench.backbone.alphas_cumprod, errors.timesteps
    if weighting == "auto" and not errors.out_of_fold:
        weighting = bench.recommended.weighting
    if weighting == "auto":
        window = choose_window(errors.held_out, errors.held_out_labels, times, candidate_windows(len(abar)))
        weighting = f"window({window[0]}, {window[1]})"
    weights = _weights(weighting, bench, task, errors)
    chosen = {"weighting": weighting, "trials": int((weights[times] > 0).sum())}
    trial_weights = timesteps.trial_weights(weights, times)
    trial_weights = trial_weights / trial_weights.mean()
    temperature = recommended_temperature(bench)
    if errors.out_of_fold:
        temperature = fit_temperature(timesteps.score(errors.held_out, trial_weights), errors.held_out_labels)
    scored = errors.held_out if held_out else errors.test
    return timesteps.score(scored, trial_weights), temperature, chosen


def _weights(weighting: str, bench: Bench, task: Task, errors: DitiErrors) -> Tensor:
    """Weights [T] of any weighting but `auto`."""
    abar = bench.backbone.alphas_cumprod
    if weighting == "tif":
        labels = torch.from_numpy(task.shots.labels)
        return timesteps.tif(abar, timesteps.attribute_distance(bench.shot_latents(task), labels))
    fixed = fixed_weights(weighting, abar)
    if fixed is not None:
        return fixed
    return timesteps.FROM_ERRORS[weighting](errors.held_out, errors.timesteps, len(abar))
