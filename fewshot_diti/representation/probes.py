"""Linear heads on features: what is settled with many labels, with few, and as a number.

Truth is 1.0 or 0.0, or NaN where it is not known: such images are left out. Strengths are chosen on val.

Shapes in names: N images, D width of a feature. Features and truth are dicts by part: that fitted on, "val", "test".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
from scipy.stats import pearsonr
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import average_precision_score, balanced_accuracy_score
from sklearn.preprocessing import StandardScaler

Features: TypeAlias = Mapping[str, np.ndarray]  # [N, D] of each part
Truth: TypeAlias = Mapping[str, np.ndarray]  # [N] of each part

STRENGTHS = tuple(np.logspace(-3, 1, 5))  # C of logistic regression; of ridge 1 / alpha


def standardised(features: Features, source: str) -> dict[str, np.ndarray]:
    """Features less the mean of one part's, in units of its deviations."""
    scaler = StandardScaler().fit(features[source])
    return {part: scaler.transform(values) for part, values in features.items()}


def scores(features: Features, truth: Truth, source: str) -> np.ndarray:
    """Logits [N] of all test images for one attribute, by logistic regression on a part.

    The strength with the highest average precision on val is taken.
    """
    known = {part: ~np.isnan(truth[part]) for part in (source, "val")}
    x = {part: features[part][rows] for part, rows in known.items()}
    y = {part: truth[part][rows] for part, rows in known.items()}
    models = [LogisticRegression(C=c, max_iter=500).fit(x[source], y[source]) for c in STRENGTHS]
    best = max(models, key=lambda m: average_precision_score(y["val"], m.decision_function(x["val"])))
    found: np.ndarray = best.decision_function(features["test"])
    return found


def average_precision(scores_N: np.ndarray, truth_N: np.ndarray) -> float | None:
    """Of the images whose truth is known; None where all have the attribute, or none."""
    known = ~np.isnan(truth_N)
    if len(np.unique(truth_N[known])) < 2:
        return None
    return float(average_precision_score(truth_N[known], scores_N[known]))


def few_shot_accuracies(
    features: Features,
    truth: Truth,
    part: str,
    shots: int,
    draws: int,
    *,
    seed: int = 0,
    confounder_N: np.ndarray | None = None,
) -> list[float]:
    """Balanced accuracy on images of a part, from a few training images of each side, by draw.

    Args:
        part: "val" or "test".
        shots: of each side, all where it has fewer.
        confounder_N: of the training images, 1.0 or 0.0: those that have the attribute are drawn where it is 1, those
            that have it not where it is 0.

    Raises:
        ValueError: a side has no image.
    """
    sides = []
    for side in (0.0, 1.0):
        among = truth["train"] == side
        if confounder_N is not None:
            among &= confounder_N == side
        if not among.any():
            raise ValueError(f"No training image has the attribute {side:.0f}; pass images of both sides.")
        sides.append(np.flatnonzero(among))
    known, found = ~np.isnan(truth[part]), []
    for draw in range(draws):
        rng = np.random.default_rng([seed, draw, shots])
        rows = np.concatenate([rng.choice(side, min(shots, len(side)), replace=False) for side in sides])
        model = LogisticRegression(max_iter=500).fit(features["train"][rows], truth["train"][rows])
        found.append(float(balanced_accuracy_score(truth[part][known], model.predict(features[part][known]))))
    return found


def regression(features: Features, numbers: Truth) -> tuple[float, float]:
    """Ridge regression: Pearson's r on test, and the mean squared error in units of the training images' variance."""
    known = {part: ~np.isnan(numbers[part]) for part in ("train", "val", "test")}
    x = {part: features[part][rows] for part, rows in known.items()}
    raw = {part: numbers[part][rows] for part, rows in known.items()}
    y = {part: (values - raw["train"].mean()) / raw["train"].std() for part, values in raw.items()}
    models = [Ridge(alpha=1 / c).fit(x["train"], y["train"]) for c in STRENGTHS]
    best = min(models, key=lambda m: float(((m.predict(x["val"]) - y["val"]) ** 2).mean()))
    predicted = best.predict(x["test"])
    return float(pearsonr(predicted, y["test"]).statistic), float(((predicted - y["test"]) ** 2).mean())
