"""The rows of a few-shot table, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np
import torch
from scipy.special import log_softmax, softmax
from torch import Tensor

from fewshot_diti import timesteps
from fewshot_diti.baselines import (
    Baseline,
    ClipLora,
    LogisticProbe,
    NearestMean,
    NearestNeighbour,
    TipAdapter,
    ZeroShotClip,
)
from fewshot_diti.baselines.clip_lora import STEPS_PER_SHOT
from fewshot_diti.baselines.imagenet import FineTuned
from fewshot_diti.baselines.views import as_it_is
from fewshot_diti.calibration import (
    candidate_windows,
    choose_window,
    fixed_weights,
    held_out_log_probabilities,
)
from fewshot_diti.evaluation.bench import FOLDS, SIBLINGS, Bench, DitiErrors, Task
from fewshot_diti.features import Discriminant, fit_discriminant, score_offsets
from fewshot_diti.held_out import fit_temperature, split_folds
from fewshot_diti.recommended import recommended_scoring

TINY = np.finfo(np.float64).tiny
SMALL_T, LARGE_T = 0.3, 0.5  # of the schedule: below the one, from the other
ENSEMBLE_WEIGHTS = np.linspace(0, 1, 21)
TUNING_STEPS = 200  # of `finetune`
POCKET_LORA_STEPS = (200, 1000)  # to choose from
POCKET_LORA_VIEWS = 32  # of each shot
POCKET_LORA_RANK = 16  # 58 and 52 % of val images at 4 and 16 shots of one draw; the published 2 gave 51 and 55
POCKET_LORA_LR = 5e-3  # 49 % of val images at 4 shots of one draw; the published 2e-4 gave 36
# alpha and beta of Tip-Adapter and of Tip-Adapter-F: 42.8 and 41.7 % of val images at 1 shot; the paper's gave the
# former 28.2
POCKET_ONE_SHOT = {False: (50.0, 3.5), True: (20.0, 0.5)}
FEATURES_WEIGHT = 0.5  # of the U-Net's features, in temperatures, where none is recommended


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcome:
    """What a method says of the N test images.

    Attributes:
        probabilities: [N, C], classes in the task's order.
        evaluations: samples through a U-Net for each image, 0 where there is none.
        training_seconds, scoring_seconds: in all; features that an earlier method left cost nothing.
        chosen: what the shots decided, such as a window or C.
    """

    probabilities: np.ndarray
    evaluations: int = 0
    training_seconds: float
    scoring_seconds: float
    chosen: dict[str, Any] = field(default_factory=dict)


Method = Callable[[Bench, Task], Outcome]


def of_baseline(make: Callable[[Bench, Task], Baseline], *, evaluations: int = 0) -> Method:
    """The method that fits a baseline on the shots and asks it; `evaluations` of its features for an image."""

    def run(bench: Bench, task: Task) -> Outcome:
        start = perf_counter()
        baseline = make(bench, task).fit(task.shot_images(), task.shot_labels())
        fitted = perf_counter()
        probabilities = in_task_order(baseline, task, baseline.predict_proba(task.test_images()))
        chosen = {k: v for k, v in vars(baseline).items() if k.endswith("_") and k != "classes_"}
        return Outcome(
            probabilities=probabilities,
            evaluations=evaluations,
            training_seconds=fitted - start,
            scoring_seconds=perf_counter() - fitted,
            chosen=chosen,
        )

    return run


def in_task_order(baseline: Baseline, task: Task, probabilities_NC: np.ndarray) -> np.ndarray:
    """Columns in the order of the task's classes."""
    known = baseline.classes_.tolist()
    return probabilities_NC[:, [known.index(name) for name in task.class_names]]


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


def zero_shot_sd(bench: Bench, task: Task) -> Outcome:
    """The diffusion classifier: prompts without class tokens, all time-steps alike."""
    errors, seconds = bench.zero_shot(task.test)
    scores = errors.double().mean(2).numpy()
    return Outcome(
        probabilities=softmax(-scores / recommended_temperature(bench), axis=1),
        evaluations=errors.shape[1] * errors.shape[2],
        training_seconds=0.0,
        scoring_seconds=seconds,
    )


def diti_with_clip(bench: Bench, task: Task) -> Outcome:
    """Log-probabilities of class tokens and of Tip-Adapter, mixed with the weight under which held-out shots are most
    likely; half and half with one shot a class.

    Both are made as sure as held-out shots allow before they are mixed: Tip-Adapter's logits grow with its alpha.
    """
    start = perf_counter()
    errors, weighting = bench.diti(task), recommended_scoring(small=bench.backbone.small).weighting
    scores, temperature, _ = _scores(weighting, bench, task, errors)
    groups = task.groups()
    # by fold, as the errors of held-out shots are
    shots = [(shot, sorted(groups)[c]) for _, held in split_folds(groups, FOLDS) for c, shot in held]
    tip = _tip_adapter(bench, task)
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
    errors, recommended = bench.diti(task), recommended_scoring(small=bench.backbone.small)
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
    return recommended_scoring(small=bench.backbone.small).temperature or 1.0


def _scores(
    weighting: str, bench: Bench, task: Task, errors: DitiErrors, *, held_out: bool = False
) -> tuple[Tensor, float, dict[str, Any]]:
    """Scores of the test images (or of the held-out shots), the temperature, and what was chosen."""
    abar, times = bench.backbone.alphas_cumprod, errors.timesteps
    if weighting == "auto" and not errors.out_of_fold:
        weighting = recommended_scoring(small=bench.backbone.small).weighting
    if weighting == "auto":
        window = choose_window(errors.held_out, errors.held_out_labels, times, candidate_windows(len(abar)))
        weighting = f"window({window[0]}, {window[1]})"
    weights = _weights(weighting, bench, task, errors)
    chosen = {"weighting": weighting, "trials": int((weights[times] > 0).sum())}
    trial_weights = timesteps.trial_weights(weights, times)
    trial_weights = trial_weights / trial_weights.mean()
    temperature = recommended_temperature(bench)
    if errors.out_of_fold:
        temperature = fit_temperature(timesteps.weighted_mean(errors.held_out, trial_weights), errors.held_out_labels)
    scored = errors.held_out if held_out else errors.test
    return timesteps.weighted_mean(scored, trial_weights), temperature, chosen


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


def _window(bench: Bench, lo: float, hi: float) -> str:
    big_t = bench.backbone.num_train_timesteps
    return f"window({round(lo * big_t)}, {round(hi * big_t)})"


def _clip_lora(bench: Bench, task: Task) -> ClipLora:
    """As published but for the colours of views; beside the pocket with a learning rate for its few attention layers,
    and for as many steps as cross-validation on the shots says."""
    make = partial(ClipLora, bench.clip, bench.templates[0], recolour=bench.recolour, seed=task.seed)
    if bench.backbone.small:
        candidates = tuple(map(bench.steps, POCKET_LORA_STEPS))
        return make(rank=POCKET_LORA_RANK, lr=POCKET_LORA_LR, candidates=candidates, views=POCKET_LORA_VIEWS)
    return make(steps_per_shot=bench.steps(STEPS_PER_SHOT))


def _tip_adapter(bench: Bench, task: Task, *, fine_tune: bool = False) -> TipAdapter:
    """Its keys are recoloured where the shots choose how much a key says: a mean over colours is like no image."""
    recolour = bench.recolour if task.num_shots > 1 and not fine_tune else as_it_is
    make = partial(TipAdapter, bench.clip, bench.templates, fine_tune=fine_tune, recolour=recolour, seed=task.seed)
    return make(one_shot=POCKET_ONE_SHOT[fine_tune]) if bench.backbone.small else make()


def _logistic(candidates: Callable[[Bench], Any], *, evaluations: int = 0) -> Method:
    def make(bench: Bench, task: Task) -> LogisticProbe:
        return LogisticProbe(candidates(bench), recolour=bench.recolour, seed=task.seed)

    return of_baseline(make, evaluations=evaluations)


METHODS: dict[str, Method] = {
    "zeroshot-sd": zero_shot_sd,
    "zeroshot-clip": of_baseline(lambda bench, _: ZeroShotClip(bench.clip, bench.templates)),
    "tip-adapter": of_baseline(_tip_adapter),
    "tip-adapter-f": of_baseline(partial(_tip_adapter, fine_tune=True)),
    "linear-clip": _logistic(lambda bench: {"CLIP": bench.clip.image_features}),
    "clip-lora": of_baseline(_clip_lora),
    "linear-sd": _logistic(lambda bench: bench.unet_features.candidates(), evaluations=1),
    "ncm-sd": of_baseline(lambda bench, _: NearestMean(bench.unet_features.candidates()), evaluations=1),
    "lda-sd": lda_sd,
    "nn-latents": of_baseline(lambda bench, _: NearestNeighbour(bench.latents)),
    "linear-imagenet": _logistic(lambda bench: {"ImageNet": bench.network_features}),
    "finetune": of_baseline(
        lambda bench, task: FineTuned(
            bench.network_to_tune, recolour=bench.recolour, steps=bench.steps(TUNING_STEPS), seed=task.seed
        )
    ),
    SIBLINGS: _logistic(lambda bench: {"siblings": bench.siblings_features}),
    "diti": lambda bench, task: diti(recommended_scoring(small=bench.backbone.small).weighting, bench, task),
    "diti-all-t": partial(diti, "uniform"),
    "diti-small-t": lambda bench, task: diti(_window(bench, 0, SMALL_T), bench, task),
    "diti-large-t": lambda bench, task: diti(_window(bench, LARGE_T, 1), bench, task),
    "diti-auto": partial(diti, "auto"),
    "diti-tif": partial(diti, "tif"),
    "diti+clip": diti_with_clip,
    "diti+sd": diti_with_features,
}

NEEDS_CLASS_TOKENS = frozenset(name for name in METHODS if name.startswith("diti"))  # what `Bench.prepare` leaves
NEEDS_ZERO_SHOT = frozenset({"zeroshot-sd"})  # what `Bench.prepare_zero_shot` leaves
NEEDS_CLIP = frozenset(name for name in METHODS if "clip" in name or name.startswith("tip-"))
TRAINS_A_NETWORK = frozenset({"finetune", "clip-lora"})
RECOLOURS = frozenset(
    {"tip-adapter", "linear-clip", "clip-lora", "linear-sd", "lda-sd", "linear-imagenet", "finetune", SIBLINGS}
    | {"diti+clip", "diti+sd"}
)
NEEDS_NETWORK = frozenset({"linear-imagenet", "finetune", SIBLINGS})
TOLD = {SIBLINGS: "told labels of sibling classes"}  # what a method knows beyond the shots
