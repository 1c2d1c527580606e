"""The temperature that turns scores into probabilities, fitted on held-out shots.

Shapes in names: N images, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.optimize import minimize, minimize_scalar
from scipy.special import log_softmax
from torch import Tensor

FOLDS = 4  # of `held_out_temperature`
LOG_TEMPERATURE_RANGE = 10.0  # searched on both sides of the scores' spread over classes


def fit_temperature(scores_NC: Tensor, labels_N: Tensor) -> float:
    """Temperature, above 0, that makes softmax(-score / temperature) most likely on held-out shots.

    Minimises the negative log-likelihood of the labels together with one further image of unknown class (each label's
    target is 1 - 1/(N+1), the rest spread over all classes). Without that one, shots that are all classified correctly
    would give temperature 0 and probabilities of exactly 0 and 1 (Platt, 1999, section 2.2, with the same cure).
    Convex in 1 / temperature, hence one minimum, found by bounded search within a factor of e^10 of the scores'
    standard deviation over classes; scores that say nothing about the labels end at the upper bound, where all
    probabilities are equal.

    ValueError: scores that are not finite or the same in all classes, fewer than two classes, labels outside 0..C-1.
    """
    _check(scores_NC, labels_N)
    # numpy, because the search calls this some thirty times and torch's threads cost more than the sums.
    scores = scores_NC.double().cpu().numpy()
    N, C = scores.shape
    spread = scores.std(axis=1).mean()
    if spread == 0:
        raise ValueError("the scores are the same in all classes on every image: no temperature fits")
    targets = np.eye(C)[labels_N.cpu().numpy()] * N / (N + 1) + 1 / (C * (N + 1))

    def loss(log_temperature: float) -> float:
        return -(targets * log_softmax(-scores / (spread * np.exp(log_temperature)), axis=1)).sum() / N

    found = minimize_scalar(
        loss, bounds=(-LOG_TEMPERATURE_RANGE, LOG_TEMPERATURE_RANGE), method="bounded", options={"xatol": 1e-7}
    )
    return float(spread * np.exp(found.x))


def held_out_temperature(labels_n: np.ndarray, judge: Callable[[np.ndarray, np.ndarray], Tensor]) -> float:
    """The temperature that is most likely on shots held out in folds; 1 where every class has one shot.

    Each class's shots are dealt out in turn: a class with fewer left than the others would look improbable. A class's
    only shot is never held out.

    Args:
        labels_n: classes of the shots, 0 to C - 1, those of one class side by side.
        judge: from which shots are learned and which are held out, bool [n] each, to logits [held out, C] of these.
    """
    counts = np.bincount(labels_n)
    others_n = counts[labels_n] > 1
    if not others_n.any():
        return 1.0
    fold_n = np.where(others_n, np.concatenate([np.arange(count) for count in counts]) % FOLDS, -1)
    logits_nC = torch.zeros(len(labels_n), len(counts), dtype=torch.float64)
    for fold in set(fold_n[others_n]):
        logits_nC[fold_n == fold] = judge(fold_n != fold, fold_n == fold)
    return fit_temperature(-logits_nC[others_n], torch.from_numpy(labels_n[others_n]))


def fit_weights(
    scores_NC: Tensor,
    log_probabilities: Sequence[Tensor],
    labels_N: Tensor,
    start: Sequence[float],
    temperature: float,
) -> tuple[float, ...]:
    """Weights, 0 or more, that make softmax(-(score - sum of weight x log-probability) / some temperature) most likely
    on held-out shots.

    A multinomial logistic regression on the scores and the log-probabilities [N, C] of each witness, whose coefficients
    are held near those of `start` and `temperature` by one nat for each unit of squared distance.

    Args:
        start: weights in units of the score, as those returned.
        temperature: of the whole decision with these.
    """
    _check(scores_NC, labels_N)
    inputs_KNC = torch.stack([-scores_NC / temperature, *log_probabilities]).double().cpu().numpy()
    expected_K = np.array([1.0, *(weight / temperature for weight in start)])
    rows, labels = np.arange(len(labels_N)), labels_N.cpu().numpy()

    def loss(coefficients_K: np.ndarray) -> float:
        log_p_NC = log_softmax(np.tensordot(coefficients_K, inputs_KNC, 1), axis=1)
        return float(-log_p_NC[rows, labels].sum() + np.square(coefficients_K - expected_K).sum())

    found_K = minimize(loss, expected_K, bounds=[(1e-3, None)] + [(0, None)] * len(start), method="L-BFGS-B").x
    return tuple((found_K[1:] / found_K[0] * temperature).tolist())


def negative_log_likelihood(scores_NC: Tensor, labels_N: Tensor, temperature: float) -> float:
    """Mean over images of -log softmax(-score / temperature)[label], in nats; log(C) is what guessing gives."""
    _check(scores_NC, labels_N)
    log_probabilities = log_softmax(-scores_NC.double().cpu().numpy() / temperature, axis=1)
    return float(-log_probabilities[np.arange(len(labels_N)), labels_N.cpu().numpy()].mean())


def _check(scores_NC: Tensor, labels_N: Tensor) -> None:
    if scores_NC.ndim != 2 or labels_N.shape != scores_NC.shape[:1] or scores_NC.shape[1] < 2 or not len(labels_N):
        raise ValueError(
            f"scores {tuple(scores_NC.shape)} and labels {tuple(labels_N.shape)}; give [N, C] and [N], C >= 2"
        )
    if not scores_NC.isfinite().all():
        image, label = (~scores_NC.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"class index {label} has the score {scores_NC[image, label].item()} on image {image}")
    if labels_N.min() < 0 or labels_N.max() >= scores_NC.shape[1]:
        raise ValueError(
            f"labels from {labels_N.min()} to {labels_N.max()}; with {scores_NC.shape[1]} classes they are indices "
            f"from 0 to {scores_NC.shape[1] - 1}"
        )
