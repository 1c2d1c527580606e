"""What studies on the val split share: their draws of shots, and how predictions are judged."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fewshot_diti.data import ImageSet, check_disjoint, sample_shots
from fewshot_diti.temperature import fit_temperature, negative_log_likelihood


class Verdict(NamedTuple):
    """How good predictions are.

    Attributes:
        accuracy: from 0 to 1.
        nats: mean negative logarithm of the probability of the true class, at the best temperature.
        temperature: the best one.
    """

    accuracy: float
    nats: float
    temperature: float


def judged(scores_NC: Tensor, truth_N: Tensor) -> Verdict:
    """The verdict on scores, of which the smallest wins, such as negative log-probabilities."""
    best = fit_temperature(scores_NC, truth_N)
    accuracy = float((scores_NC.argmin(1) == truth_N).double().mean())
    return Verdict(accuracy, negative_log_likelihood(scores_NC, truth_N, best), best)


def draw(pool: ImageSet, val: ImageSet, num_shots: int, seed: int) -> ImageSet:
    """Shots of the pool.

    Raises:
        ValueError: a class has too few images, or a val image is a shot.
    """
    shots = pool.subset(sample_shots(pool, num_shots, seed).rows(pool))
    check_disjoint(shots, val)
    return shots
