"""Races: after every few trials, drop the classes that are not likely to win any more.

Shapes in names: A classes still in, n trials done, S trials of an image, K cells of an integral.
Source: Maron and Moore, "Hoeffding Races" (NIPS 1993); the rule that drops a class is this package's own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import special
from torch import Tensor

from fewshot_diti.elimination import check_positions


@dataclass(frozen=True, kw_only=True)
class Look:
    """One round of a race: the trials at `trial_positions`, then drop the classes that are not likely to win any more.

    The race is for the class with the least mean over all S trials. After n of them the least likely classes are
    dropped, as many as together win with a probability of at most `error_rate`. What is known of a class's mean over S
    trials (`final_means`) has Student's distribution about what its trials so far and those of the other classes make
    likely, and the chances follow from all of them (`chances_of_least`).

    The variance of a class's weighted errors is half the mean squared difference between trials that are neighbours in
    t, after the mean over classes is taken out: the estimator for systematic samples (Wolter, "Introduction to Variance
    Estimation", section 8.2), in which what changes slowly with t is no noise.

    What it guarantees, and when: given the timesteps, the noise of the trials is independent. If that of the classes'
    errors is normal with one variance and independent from class to class, a look drops the class that all S trials
    would choose with a probability of about `error_rate` at most, and a race ends without it with about the sum of its
    looks' at most. About, since the prior is estimated, at each look anew. Where classes come in families that share
    their noise, or noise differs between classes by a factor of 3 or more, it is no bound: at
    confidence 0.9, up to 17 and 14 of 100 races among 12 classes miss, mostly where several are as good as the best
    (`eval/races.py`).

    ValueError: positions as in `Stage`, fewer than 2 trials at the first look, or an error rate outside (0, 1).
    """

    trial_positions: tuple[int, ...]
    trials: int
    error_rate: float

    def __post_init__(self) -> None:
        check_positions(self.trial_positions)
        if not 0 < self.error_rate < 1:
            raise ValueError(f"error_rate = {self.error_rate}; give a probability between 0 and 1")

    def survivors(self, weighted_An: Tensor, positions_n: Tensor) -> Tensor:
        """Which classes stay, bool [A], by their weighted errors; positions ascend with t."""
        classes, done = weighted_An.shape
        mean_A = weighted_An.mean(1)
        leader = int(mean_A.argmin())
        if done >= self.trials or classes == 1:
            return torch.arange(classes) == leader
        if done < 2:
            raise ValueError("a look after one trial cannot tell noise from difference; give the first look 2 or more")
        in_order_An = (weighted_An - weighted_An.mean(0))[:, positions_n.argsort()]
        variance = float(in_order_An.diff().square().sum()) / 2 / ((classes - 1) * (done - 1))
        freedom = (classes - 1) * 2 * (done - 1) ** 2 / (3 * done - 4)  # neighbouring differences are correlated
        chances_A = chances_of_least(*final_means(mean_A, variance, freedom, done, self.trials), freedom)
        least_likely_A = classes - 1 - chances_A.flip(0).argsort(stable=True)  # of equal ones the last comes first
        out = least_likely_A[:-1]  # one class stays in
        out = out[chances_A[out].cumsum(0) <= self.error_rate]
        return ~torch.isin(torch.arange(classes), out)

    def over(self, num_alive: int) -> bool:
        """Whether an image is done before this look, which is not its first: when one class is left."""
        return num_alive == 1


def final_means(mean_A: Tensor, variance: float, freedom: float, done: int, trials: int) -> tuple[Tensor, float]:
    """What `done` trials of each class make likely of its mean over all `trials`: expectation [A], standard deviation.

    `mean_A`: over the trials done; `variance`: of one trial, estimated with `freedom`. The trials to come are expected
    between the class's own mean and the middle of all classes, the nearer to the latter the less the classes differ
    beyond their noise: the normal prior of an empirical Bayes estimate (Efron and Morris, 1973). The prior's variance
    is that of the better half about the median, since a class far behind is no evidence about those in front (of 3
    classes or fewer it is that of all), and the lower end of its one-sided 90 % interval: the point estimate is too
    large so often that a look would drop the best of 12 equal classes up to twice as often as it may.
    """
    classes, noise = len(mean_A), variance / done
    if classes < 4:
        middle, between, squares = mean_A.mean(), float(mean_A.var()), classes - 1
    else:
        middle, squares = mean_A.median(), (classes - 1) // 2
        between = float((middle - mean_A).clamp(min=0).square().sum()) / squares
    by_chance = special.fdtri(squares, freedom, 0.9) * noise  # what classes without a difference would show at most
    own = 1.0 if not noise else max(0.0, 1 - by_chance / between) if between else 0.0
    share, left = done / trials, trials - done
    expected_A = share * mean_A + (1 - share) * (own * mean_A + (1 - own) * middle)
    return expected_A, (1 - share) * (own * noise + variance / left) ** 0.5


def chances_of_least(expected_A: Tensor, deviation: float, freedom: float) -> Tensor:
    """Probability [A] that each of A independent variables is the least of all.

    Each has Student's distribution with `freedom` about its expectation, and one scale. Summed over cells that grow
    with the distance from the smallest expectation, from a twentieth of the deviation to millions of it.
    """
    behind_A = (expected_A - expected_A.min()).numpy()
    if not deviation:
        least_A = torch.from_numpy(behind_A == 0).double()
        return least_A / least_A.sum()
    edges_K1 = np.sinh(np.linspace(-16, 16, 321))[:, None] / 2
    below_KA = special.stdtr(freedom, edges_K1 - behind_A / deviation)
    below_KA = np.vstack([np.zeros_like(below_KA[:1]), below_KA, np.ones_like(below_KA[:1])])
    inside_KA, above_KA = np.diff(below_KA, axis=0), 1 - (below_KA[1:] + below_KA[:-1]) / 2
    log_above_KA = np.log(above_KA.clip(1e-300))
    others_KA = np.exp(log_above_KA.sum(1, keepdims=True) - log_above_KA)
    chances_A = torch.from_numpy((inside_KA * others_KA).sum(0))
    return chances_A / chances_A.sum()


def racing(trials: int, *, confidence: float) -> tuple[Look, ...]:
    """Looks after 2, 4, 6, 8, 12, 18, 26, .. and all `trials`, spread evenly over t (`nested_order`).

    `confidence`: about the probability, at least, that a race ends with the label of all trials, where the assumptions
    of `Look` hold; the looks that can drop a class early share 1 - confidence evenly. ValueError: outside (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence = {confidence}; give a probability between 0 and 1")
    order, ends, end = nested_order(trials), [], 2  # one trial cannot tell noise from difference
    while end < trials:
        ends.append(end)
        end += max(2, end // 4 * 2)
    ends.append(trials)
    rate = (1 - confidence) / max(1, len(ends) - 1)
    return tuple(
        Look(trial_positions=order[start:end], trials=trials, error_rate=rate)
        for start, end in zip([0, *ends], ends, strict=False)
    )


def nested_order(trials: int) -> tuple[int, ...]:
    """All positions of an even grid in an order whose every beginning is spread evenly over the grid.

    The van der Corput sequence in base 2 (bits of the counter reversed), its bits flipped by those of 1/3, so that
    beginnings lie near the middle of their strata and not at their lower ends.
    """
    bits = max(1, (trials - 1).bit_length())
    shift = int(("01" * bits)[:bits], 2)
    cells = (int(f"{counter:0{bits}b}"[::-1], 2) ^ shift for counter in range(2**bits))
    return tuple(dict.fromkeys(cell * trials >> bits for cell in cells))
