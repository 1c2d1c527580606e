"""From the name of a weighting to weights w(t), and the window that held-out shots choose.

Shapes in names: N images, C classes, S trials of an image, T timesteps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

from torch import Tensor

from fewshot_diti import timesteps as weightings
from fewshot_diti.attribute_distance import attribute_distance, attribute_distance_released
from fewshot_diti.temperature import fit_temperature, negative_log_likelihood
from fewshot_diti.timesteps import weighted_mean

WINDOW_EDGES = 10  # the candidates of `auto` start and end at tenths of the schedule
TIED = 1e-6  # nats; windows whose likelihoods are closer are equally good


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


def timestep_weights(
    name: str,
    alphas_cumprod: Tensor,
    *,
    shot_errors: tuple[Tensor, Tensor] | None = None,
    held_out: tuple[Tensor, Tensor, Tensor] | None = None,
    latents: Callable[[], tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """Weights [T] of a weighting, from what it reads.

    Args:
        name: as `timesteps.parse_weighting` reads it.
        shot_errors: errors [N, C, S] of shots and their timesteps, for `spread` and `relative`.
        held_out: errors [N, C, S] of held-out shots, their classes [N] and their timesteps [S], for `auto`.
        latents: gives the latents [N, c, h, w] of the shots and their classes [N], for `tif` and `tif_released`.

    Raises:
        ValueError: no such weighting, or what it reads is missing.
    """
    weighting = weightings.parse_weighting(name)
    fixed_T = fixed_weights(name, alphas_cumprod)
    if fixed_T is not None:
        return fixed_T
    if weighting.name == "auto" and held_out is not None:
        return weightings.window(alphas_cumprod, *choose_window(*held_out, candidate_windows(len(alphas_cumprod))))
    if weighting.name in weightings.FROM_ERRORS and shot_errors is not None:
        return weightings.FROM_ERRORS[weighting.name](*shot_errors, len(alphas_cumprod))
    if weighting.name in ("tif", "tif_released") and (weighting.parameters or latents is not None):
        if weighting.parameters:
            distance = weighting.parameters[0]
        else:
            assert latents is not None, "checked above"
            released = weighting.name == "tif_released"
            of = attribute_distance_released if released else attribute_distance
            distance = of(*latents())
        return (
            weightings.tif(alphas_cumprod, distance) if weighting.name == "tif" else weightings.tif_released(distance)
        )
    raise ValueError(f"The weighting {name!r} reads errors or latents of the shots, and these are missing.")


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
        scores_NC = weighted_mean(errors_NCS, inside.double())
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
