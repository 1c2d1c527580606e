"""What turns errors into labels and probabilities: weights of the trials and a temperature, from the shots alone.

Held out means: the errors of a shot come from class tokens trained without it. Errors on shots that a class token was
trained on are too small for the true class, and would pick the time-steps at which training images are remembered. So
what sets the true class against others (`auto`, temperature, accuracy) reads held-out shots; `spread`, `relative` and
the importance density ask how errors vary over all classes alike, and read the shots under the saved class tokens.

Shapes in names: N images, C classes, S trials of an image.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from fewshot_diti import timesteps as weightings
from fewshot_diti.bank import Bank
from fewshot_diti.data.images import ImageSource, image_id
from fewshot_diti.features import fit_discriminant, score_offsets
from fewshot_diti.held_out import fit_temperature, negative_log_likelihood, split_folds
from fewshot_diti.learning import Groups, Learner
from fewshot_diti.recommended import CALIBRATION_TRIALS, ScoringConfig, recommended_scoring
from fewshot_diti.timesteps import score
from fewshot_diti.training import Label
from fewshot_diti.trials import even_grid

WINDOW_EDGES = 10  # the candidates of `auto` start and end at tenths of the schedule
TIED = 1e-6  # nats; windows whose likelihoods are closer are equally good


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What turns errors into labels and probabilities, all of it from the shots.

    Attributes:
        timesteps: of the trials [S].
        weights: of the trials [S].
        temperature: of the softmax over -score.
        accuracy: cross-validated on the shots, None where no folds were asked for. Under `auto` it flatters, since the
            window was chosen on the same errors.
        shortlist_recall: share of held-out shots whose class is on the shortlist, None where no folds or no shortlist
            were asked for. No accuracy can be above it. The temperature is fitted on all classes, with the shortlist
            or without.
    """

    timesteps: tuple[int, ...]
    weights: tuple[float, ...]
    temperature: float
    accuracy: float | None = None
    shortlist_recall: float | None = None


def calibrate(
    learner: Learner, bank: Bank, groups: Groups, shot_features: Mapping[Label, Tensor] | None = None
) -> Calibration:
    """Weights and temperature from the shots of the bank's classes.

    `shot_features`: as `Learner.shot_features` gives them of the same groups, where the scoring asks for them.

    Where a class has one shot nothing can be held out: `auto` and a temperature of None fall back to what the package
    recommends for the backbone, with a warning.

    Raises:
        TrainingError: a class's loss was not finite in a fold.
    """
    config, big_t = _possible_scoring(learner, groups), learner.backbone.num_train_timesteps
    grid = config.grid()
    if len(groups) < 2:
        return uncalibrated(learner)
    weighting = weightings.parse_weighting(config.weighting)
    held_out = shot_errors = None
    if weighting.name == "auto":
        held_out = learner.held_out(groups, config.folds, partial(learner.shared_errors, grid=grid))
    if weighting.name in weightings.FROM_ERRORS or config.density == "importance":
        some_trials = even_grid(min(CALIBRATION_TRIALS, config.trials), *config.timesteps)
        images = [x for _, x in _spread_over_classes(groups, config.calibration_images)][: config.calibration_images]
        shot_errors = learner.shared_errors(bank, images, some_trials), some_trials
    weights_T = _weights(learner, weighting, config, groups, grid, held_out, shot_errors)
    density_T = weightings.where_weighted(weights_T, *config.timesteps)
    if config.density == "importance":
        assert shot_errors is not None, "scored above"
        density_T = weightings.importance(density_T, weights_T, weightings.spread(*shot_errors, big_t))
    if config.decide != "published":  # whose stages stand on a grid of their own
        grid = config.grid(density_T)
    weights = weightings.trial_weights(weights_T, grid)
    if config.density == "importance":
        weights = weights / density_T[grid]
    weights = weights / weights.mean()  # a temperature then means the same under every weighting
    temperature, accuracy, recall = config.temperature, None, None
    if config.folds:
        said = held_out_log_probabilities(groups, shot_features, config.folds) if shot_features else None
        offsets = {i: score_offsets(row, config.features_weight) for i, row in (said or {}).items()}
        if held_out is not None:  # on its own even grid: training the folds once more would cost more than it tells
            even = weightings.trial_weights(weights_T, config.grid())
            scores, truth = score(held_out[0], even / even.mean()), held_out[1]
            scores = scores + torch.stack(list(offsets.values())) if offsets else scores
        else:
            judge = partial(learner.shared_scores, grid=grid, weights=weights, offsets=offsets)
            scores, truth = learner.held_out(groups, config.folds, judge)
        temperature = temperature or fit_temperature(scores, truth)
        if said is not None and config.shortlist is not None:
            out = score_offsets(torch.stack(list(said.values())), 0.0, config.shortlist)
            recall = float(out[torch.arange(len(truth)), truth].isfinite().double().mean())
            scores = scores + out
        accuracy = float((scores.argmin(1) == truth).double().mean())
    return Calibration(
        timesteps=tuple(grid.tolist()),
        weights=tuple(weights.tolist()),
        temperature=temperature or 1.0,
        accuracy=accuracy,
        shortlist_recall=recall,
    )


def uncalibrated(learner: Learner) -> Calibration:
    """What needs no shots: all trials count the same unless the weighting is fixed (`pdae`, `window`); the temperature
    is the scoring's, or what the package recommends."""
    config, abar = without_folds(learner.scoring, small=learner.backbone.small), learner.backbone.alphas_cumprod
    fixed_T = fixed_weights(config.weighting, abar)
    weights_T = weightings.uniform(abar) if fixed_T is None else fixed_T
    published = config.decide == "published"  # whose stages stand on a grid of their own
    grid = config.grid(None if published else weightings.where_weighted(weights_T, *config.timesteps))
    weights = weightings.trial_weights(weights_T, grid)
    return Calibration(
        timesteps=tuple(grid.tolist()),
        weights=tuple((weights / weights.mean()).tolist()),
        temperature=config.temperature or 1.0,
    )


def candidate_windows(num_train_timesteps: int) -> list[tuple[int, int]]:
    """All windows (lo, hi) between tenths of the schedule, 55 of them: what `auto` chooses from."""
    edges = [num_train_timesteps * edge // WINDOW_EDGES for edge in range(WINDOW_EDGES + 1)]
    return list(combinations(edges, 2))


def choose_window(
    errors_NCS: Tensor, labels_N: Tensor, timesteps: Tensor, candidates: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """The window (lo, hi) of the `auto` weighting: the candidate under which held-out shots are most likely.

    `errors_NCS`: errors of the shots under class tokens trained without them; `timesteps`: [S] or [N, S], even in t.
    Each candidate gets a temperature of its own (`fit_temperature`) and is judged by its negative log-likelihood;
    where two are equal to 1e-6 nats, by accuracy, then by width (the wider wins: it averages more trials), then by the
    smaller lo. Candidates in which some image has no trial cannot be judged and are left out. Likelihood and not
    accuracy, because a shot on which the right class wins narrowly counts for less than one on which it wins clearly:
    accuracy over N shots moves in steps of 1/N and leaves most candidates tied.

    Cost: the choice itself is under a second, the errors are not: F folds train every class token F times on (F-1)/F of
    its shots, and each shot costs S x C evaluations. Variability: the difference between two windows has a standard
    error of the images' standard deviation of that difference over sqrt(N), and the best of 55 looks better than it is.
    Neighbouring windows change places from one draw of shots to the next: with simulated errors (12 classes, 40 trials,
    information that fades as exp(-t / 300)) lo was 0 in all of 15 draws, and hi lay between 200 and 900 for 24 shots in
    all, between 300 and 600 for 192 and then mostly at 400.

    ValueError: as `score` and `fit_temperature` raise it, or when no candidate holds a trial of every image.
    """
    best: list[tuple[float, float, int, int]] = []
    for lo, hi in candidates:
        inside = (timesteps >= lo) & (timesteps < hi)
        if not inside.any(dim=-1).all():
            continue
        scores_NC = score(errors_NCS, inside.double())
        likelihood = negative_log_likelihood(scores_NC, labels_N, fit_temperature(scores_NC, labels_N))
        accuracy = (scores_NC.argmin(dim=1) == labels_N.to(scores_NC.device)).double().mean().item()
        best.append((likelihood, -accuracy, lo - hi, lo))
    if not best:
        raise ValueError(
            f"none of the {len(candidates)} candidate windows holds a trial of every image; the trials have t from "
            f"{timesteps.min()} to {timesteps.max()}"
        )
    limit = min(best)[0] + TIED
    _, _, negative_width, lo = min((window for window in best if window[0] <= limit), key=lambda window: window[1:])
    return lo, lo - negative_width


def without_folds(config: ScoringConfig, *, small: bool) -> ScoringConfig:
    """The scoring without what must be fitted on held-out shots; what the package recommends stands in for that."""
    default = recommended_scoring(small=small)
    auto = weightings.parse_weighting(config.weighting).name == "auto"
    return replace(
        config,
        folds=0,
        weighting=default.weighting if auto else config.weighting,
        temperature=config.temperature or default.temperature,
    )


def _possible_scoring(learner: Learner, groups: Groups) -> ScoringConfig:
    """The scoring asked for, or without folds where a class has nothing to hold out."""
    config = learner.scoring
    single = sorted(x for x, shots in groups.items() if len(shots) < 2)
    if not config.folds or not single:
        return config
    possible = without_folds(config, small=learner.backbone.small)
    warnings.warn(
        f"Classes {single} have one shot, so none can be held out: folds={config.folds} is ignored, the weighting is "
        f"{possible.weighting!r}, the temperature {possible.temperature}.",
        stacklevel=4,
    )
    return possible


def fixed_weights(name: str, alphas_cumprod: Tensor) -> Tensor | None:
    """Weights [T] of a weighting that needs no shots, None of another; ValueError for one outside the schedule."""
    weighting = weightings.parse_weighting(name)
    if weighting.name == "uniform":
        return weightings.uniform(alphas_cumprod)
    if weighting.name == "window":
        return weightings.window(alphas_cumprod, int(weighting.parameters[0]), int(weighting.parameters[1]))
    if weighting.name == "pdae":
        return weightings.pdae(alphas_cumprod, *weighting.parameters)
    return None


def _weights(
    learner: Learner,
    weighting: weightings.Weighting,
    config: ScoringConfig,
    groups: Groups,
    grid: Tensor,
    held_out: tuple[Tensor, Tensor] | None,
    shot_errors: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Weights [T] of the configured weighting."""
    abar, parameters = learner.backbone.alphas_cumprod, weighting.parameters
    fixed = fixed_weights(config.weighting, abar)
    if fixed is not None:
        return fixed
    if weighting.name == "auto":
        assert held_out is not None, "ScoringConfig asks for folds"
        return weightings.window(abar, *choose_window(*held_out, grid, candidate_windows(len(abar))))
    if weighting.name in weightings.FROM_ERRORS:
        assert shot_errors is not None, "scored for it"
        return weightings.FROM_ERRORS[weighting.name](*shot_errors, len(abar))
    latents, truth = learner.shot_latents(groups)
    if weighting.name == "tif":
        return weightings.tif(abar, *(parameters or (weightings.attribute_distance(latents, truth),)))
    return weightings.tif_released(*(parameters or (weightings.attribute_distance_released(latents, truth),)))


def held_out_log_probabilities(groups: Groups, shot_features: Mapping[Label, Tensor], folds: int) -> dict[str, Tensor]:
    """Log-probabilities [C] of each held-out shot by the features of the others, by image id in the order of
    `Learner.held_out`."""
    rows: list[Tensor] = []
    for kept, held in split_folds({x: list(features) for x, features in shot_features.items()}, folds):
        discriminant = fit_discriminant({x: torch.stack(kept[x]) for x in sorted(kept)})
        rows += discriminant.log_probabilities(torch.stack([views[0] for _, views in held]))
    ids = [image_id(shot) for _, held in split_folds(groups, folds) for _, shot in held]
    return dict(zip(ids, rows, strict=True))


def _spread_over_classes(groups: Groups, count: int) -> list[tuple[Label, ImageSource]]:
    """Up to `count` shots, one of every class, then the second of every class, and so on; always one of every class."""
    turns = [(i, x) for x in sorted(groups) for i in range(len(groups[x]))]
    chosen = sorted(turns, key=lambda turn: turn[0])[: max(count, len(groups))]
    return [(x, groups[x][i]) for i, x in chosen]
