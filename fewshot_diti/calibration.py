"""What turns errors into labels and probabilities: weights of the trials and a temperature, from the shots alone.

Held out means: the errors of a shot come from class tokens trained without it. Errors on shots that a class token was
trained on are too small for the true class, and would pick the timesteps at which training images are remembered. So
what sets the true class against others (`auto`, temperature, accuracy) reads held-out shots; `spread`, `relative` and
the importance density ask how errors vary over all classes alike, and read the shots under the saved class tokens.

Shapes in names: N images, C classes, S trials of an image, T timesteps, V views of a shot, D values of a feature.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fewshot_diti import timesteps as weightings
from fewshot_diti.backbone import Backbone
from fewshot_diti.bank import Bank
from fewshot_diti.config import Label, ScoringConfig, Settings
from fewshot_diti.distributed import gather, my_share
from fewshot_diti.encoding import PreparedImage
from fewshot_diti.folds import Fit, held_out_log_probabilities, judge_held_out, shared_errors, shared_scores
from fewshot_diti.presets import PRESETS
from fewshot_diti.temperature import fit_temperature, fit_weights
from fewshot_diti.timesteps import weighted_mean
from fewshot_diti.training import Groups, most_shots
from fewshot_diti.trials import drawn_grid, even_grid, stream
from fewshot_diti.weighting import fixed_weights, timestep_weights
from fewshot_diti.witnesses import FittedWitness, score_offsets

CALIBRATION_TRIALS = 16  # of each shot, at most, for weights estimated on errors, which are smooth in t


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What turns errors into labels and probabilities, all of it from the shots.

    Attributes:
        timesteps: of the trials [S].
        weights: of the trials [S].
        witness_weights: what a nat of each witness's log-probability takes off a score.
        token_temperature: of the class tokens' own scores, where no witness counts.
        temperature: of the softmax over -score, where witnesses count.
        temperature_from: "shots" where held-out shots fitted it, "user" where it was given, else "preset".
        accuracy: cross-validated on the shots, None where no folds were asked for. Under `auto` it is too high, since
            the window was chosen on the same errors. In a race a little too low where witnesses count: it is the class
            tokens alone that drop classes.
        shortlist_recall: share of held-out shots whose class is on the shortlist, None where no folds or no shortlist
            were asked for. No accuracy can be above it. The temperature is fitted on all classes, with the shortlist
            or without.
        held_out: probability of its own class for each held-out shot; none where no folds were asked for.
        held_out_labels: the class of each of them and the one that was predicted; none in banks of version 0.4.
        folds: in which they were held out, at most as many as the largest class has shots; 0 in banks of version 0.4.
    """

    timesteps: tuple[int, ...]
    weights: tuple[float, ...]
    temperature: float
    witness_weights: tuple[float, ...] = ()
    token_temperature: float = 1.0
    temperature_from: Literal["shots", "user", "preset"] = "user"
    accuracy: float | None = None
    shortlist_recall: float | None = None
    held_out: tuple[float, ...] = ()
    held_out_labels: tuple[tuple[Label, Label], ...] = ()
    folds: int = 0

    def __post_init__(self) -> None:
        if len(self.timesteps) != len(self.weights) or not all(t >= 0 for t in self.timesteps):
            raise ValueError(
                f"{len(self.timesteps)} timesteps of at least 0 and {len(self.weights)} weights of trials."
            )
        for name, values in (("weights", self.weights), ("witness_weights", self.witness_weights)):
            if not all(0 <= w < math.inf for w in values):
                raise ValueError(f"The {name} are {values}; they must be finite numbers of at least 0.")
        if not any(self.weights):
            raise ValueError("The weights of all trials are 0; then no image can be told from another.")
        if self.held_out_labels and len(self.held_out_labels) != len(self.held_out):
            raise ValueError(f"{len(self.held_out_labels)} labels of {len(self.held_out)} held-out shots.")
        temperatures = self.token_temperature, self.temperature
        if not all(0 < t < math.inf for t in temperatures):
            raise ValueError(f"The temperatures are {temperatures}; they must be finite numbers above 0.")


def calibrate(fit: Fit, bank: Bank, witnesses: Sequence[FittedWitness] = ()) -> Calibration:
    """Weights and temperature from the shots of the bank's classes.

    Where a class has one shot nothing can be held out: what should be fitted on held-out shots falls back to the
    preset's, with a warning.

    Args:
        witnesses: that have learned the same classes.

    Raises:
        TrainingError: a class's loss was not finite in a fold.
    """
    if len(fit.groups) < 2:
        return uncalibrated(fit.backbone, fit.settings, most_shots(fit.groups))
    fit = _without_impossible_folds(fit)
    scoring, published = fit.settings.scoring, fit.settings.prediction.schedule == "published"
    weighting, grid = weightings.parse_weighting(scoring.weighting), even_grid(scoring.trials, *scoring.timesteps)
    held_out = shot_errors = None
    if weighting.name == "auto":
        held_out = judge_held_out(fit, partial(shared_errors, fit, grid=grid))
    if weighting.name in weightings.FROM_ERRORS or scoring.density == "importance":
        some_trials = even_grid(min(CALIBRATION_TRIALS, scoring.trials), *scoring.timesteps)
        images = _spread_over_classes(fit.groups, scoring.calibration_images, scoring.seed)
        shot_errors = shared_errors(fit, bank, images, some_trials), some_trials
    weights_T = timestep_weights(
        scoring.weighting,
        fit.backbone.alphas_cumprod,
        shot_errors=shot_errors,
        held_out=None if held_out is None else (*held_out, grid),
        latents=partial(_shot_latents, fit),
    )
    grid, weights = _trials(scoring, weights_T, shot_errors, keep_grid=published)
    alone, mix, temperature = _mix(fit.backbone, without_folds(scoring, fit.backbone, most_shots(fit.groups)))
    accuracy = recall = None
    held: tuple[float, ...] = ()
    predicted: tuple[tuple[Label, Label], ...] = ()
    if scoring.folds:
        prediction = fit.settings.prediction
        log_p = []
        if witnesses and (scoring.uses_witnesses(prediction) or scoring.witness_weights == "fit"):
            log_p = [held_out_log_probabilities(fit, witness) for witness in witnesses]
        if held_out is not None:  # on its own even grid: training the folds once more would cost too much
            even = weightings.trial_weights(weights_T, even_grid(scoring.trials, *scoring.timesteps))
            scores, truth = weighted_mean(held_out[0], even / even.mean()), held_out[1]
        else:
            scores, truth = judge_held_out(fit, partial(shared_scores, fit, grid=grid, weights=weights))
        if scoring.temperature == "fit":
            fitted = fit_temperature(scores, truth)
            alone, mix, temperature = fitted, tuple(w * fitted / alone for w in mix), temperature * fitted / alone
        own = alone
        if log_p:
            if scoring.witness_weights == "fit":
                mix = fit_weights(scores, log_p, truth, mix, temperature)
            together = scores + score_offsets(log_p, mix)
            if "fit" in (scoring.temperature, scoring.witness_weights):
                temperature = fit_temperature(together, truth)
            if prediction.use_witnesses:
                scores, own = together, temperature
        held = tuple((-scores / own).softmax(1)[torch.arange(len(truth)), truth].tolist())
        if log_p and prediction.shortlist is not None:
            off_the_list = score_offsets(log_p, (0.0,) * len(log_p), prediction.shortlist)
            recall = float(off_the_list[torch.arange(len(truth)), truth].isfinite().double().mean())
            scores = scores + off_the_list
        order, winners = sorted(fit.groups), scores.argmin(1)
        accuracy = float((winners == truth).double().mean())
        predicted = tuple((order[c], order[w]) for c, w in zip(truth.tolist(), winners.tolist(), strict=True))
    return Calibration(
        timesteps=tuple(grid.tolist()),
        weights=tuple(weights.tolist()),
        witness_weights=mix,
        token_temperature=alone,
        temperature=temperature,
        temperature_from=_source(fit, scoring),
        accuracy=accuracy,
        shortlist_recall=recall,
        held_out=held,
        held_out_labels=predicted,
        folds=min(scoring.folds, most_shots(fit.groups)) if held else 0,
    )


def uncalibrated(backbone: Backbone, settings: Settings, num_shots: int) -> Calibration:
    """What needs no shots: all trials count the same unless the weighting is fixed (`pdae`, `window`); temperature and
    weights of the witnesses are those given, or the preset's for so many shots per class."""
    scoring = without_folds(settings.scoring, backbone, num_shots)
    fixed_T = fixed_weights(scoring.weighting, backbone.alphas_cumprod)
    weights_T = weightings.uniform(backbone.alphas_cumprod) if fixed_T is None else fixed_T
    even = replace(scoring, density="even")
    grid, weights = _trials(even, weights_T, None, keep_grid=settings.prediction.schedule == "published")
    alone, mix, temperature = _mix(backbone, scoring)
    return Calibration(
        timesteps=tuple(grid.tolist()),
        weights=tuple(weights.tolist()),
        witness_weights=mix,
        token_temperature=alone,
        temperature=temperature,
        temperature_from="preset",
    )


def _mix(backbone: Backbone, scoring: ScoringConfig) -> tuple[float, tuple[float, ...], float]:
    """The temperature of the class tokens alone, what a nat of each witness takes off a score, and the temperature of
    the whole decision; nothing is to fit."""
    assert not isinstance(scoring.temperature, str) and not isinstance(scoring.witness_weights, str), "replaced"
    relative, overlap = scoring.witness_weights, PRESETS[backbone.kind].overlap
    mix = tuple(weight * scoring.temperature for weight in relative)
    return scoring.temperature, mix, scoring.temperature * (1 + overlap * sum(relative))


def _trials(
    scoring: ScoringConfig, weights_T: Tensor, shot_errors: tuple[Tensor, Tensor] | None, *, keep_grid: bool
) -> tuple[Tensor, Tensor]:
    """Timesteps and weights [S] of the trials; `keep_grid`: even in t, as published stages need it."""
    density_T = weightings.where_weighted(weights_T, *scoring.timesteps)
    if scoring.density == "importance":
        assert shot_errors is not None, "scored for it"
        spread_T = weightings.spread(*shot_errors, len(weights_T))
        density_T = weightings.importance(density_T, weights_T, spread_T)
    grid = even_grid(scoring.trials, *scoring.timesteps) if keep_grid else drawn_grid(density_T, scoring.trials)
    weights = weightings.trial_weights(weights_T, grid)
    if scoring.density == "importance":
        weights = weights / density_T[grid]
    return grid, weights / weights.mean()  # a temperature then means the same under every weighting


def without_folds(scoring: ScoringConfig, backbone: Backbone, num_shots: int) -> ScoringConfig:
    """The scoring without what must be fitted on held-out shots; the preset's values stand in for that."""
    preset = PRESETS[backbone.kind]
    auto = weightings.parse_weighting(scoring.weighting).name == "auto"
    fits = scoring.witness_weights == "fit"
    return replace(
        scoring,
        folds=0,
        weighting=preset.scoring["weighting"] if auto else scoring.weighting,
        witness_weights=preset.weights_of(scoring.witnesses, num_shots) if fits else scoring.witness_weights,
        temperature=preset.temperature_of(num_shots) if scoring.temperature == "fit" else scoring.temperature,
    )


def _without_impossible_folds(fit: Fit) -> Fit:
    """The fit as it was asked for, or without folds where a class has nothing to hold out."""
    scoring, single = fit.settings.scoring, sorted(x for x, shots in fit.groups.items() if len(shots) < 2)
    if not scoring.folds or not single:
        return fit
    possible = without_folds(scoring, fit.backbone, most_shots(fit.groups))
    warnings.warn(
        f"Classes {single} have one shot, so none can be held out: folds={scoring.folds} is ignored, the weighting is "
        f"{possible.weighting!r}, the temperature {possible.temperature}, the witnesses' weights "
        f"{possible.witness_weights}.",
        stacklevel=4,
    )
    return replace(fit, settings=fit.settings._replace(scoring=possible))


def _source(fit: Fit, scoring: ScoringConfig) -> Literal["shots", "user", "preset"]:
    if "fit" in (scoring.temperature, scoring.witness_weights):
        return "shots"
    expected = PRESETS[fit.backbone.kind].temperature_of(most_shots(fit.groups))
    return "preset" if scoring.temperature == expected else "user"


def _shot_latents(fit: Fit) -> tuple[Tensor, Tensor]:
    """Latents of all shots [N, c, h, w] on the backbone's device, and their classes [N] in sorted order; the processes
    share the encoding."""
    order = sorted(fit.groups)
    training = fit.settings.training
    parts = gather(
        [
            (c, torch.stack([fit.encoder.variants(x, training)[0][0] for x in fit.groups[order[c]]]))
            for c in my_share(len(order))
        ]
    )
    latents = torch.cat([part for _, part in sorted(parts, key=lambda part: part[0])])
    labels = torch.arange(len(order)).repeat_interleave(torch.tensor([len(fit.groups[x]) for x in order]))
    return latents.to(fit.backbone.device), labels


def _spread_over_classes(groups: Groups, count: int, seed: int) -> list[PreparedImage]:
    """`count` shots (all, if there are fewer): one of every class, then the second of every class, and so on; where
    there are more classes than that, those of randomly drawn classes."""
    classes = sorted(groups)
    if count < len(classes):
        drawn = stream(seed, "calibration classes").permutation(len(classes))[:count]
        classes = [classes[c] for c in sorted(drawn)]
    turns = [(i, x) for x in classes for i in range(len(groups[x]))]
    return [groups[x][i] for i, x in sorted(turns, key=lambda turn: turn[0])[:count]]
