"""Sets of classes that hold the true one as often as asked for: split conformal prediction on held-out shots.

Shapes in names: N images, C classes, n held-out shots.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from torch import Tensor


def prediction_sets(probabilities_NC: Tensor, held_out_n: Sequence[float], coverage: float) -> list[list[int]]:
    """Positions of the classes in each image's set, the most probable first.

    A class is in the set if its probability is at least the k-th smallest of the n held-out shots' probabilities of
    their own class, counted from the other end: k = ceil((n + 1) coverage) (Vovk et al., 2005; Sadinle et al., 2019).
    With fewer shots than that needs, every class is in every set. A set may be empty: nothing is probable enough.

    Args:
        held_out_n: probability of its own class for each held-out shot.
        coverage: share of images whose set holds their class, between 0 and 1.

    Raises:
        ValueError: no held-out shots, or `coverage` is no share.
    """
    if not 0 < coverage < 1:
        raise ValueError(f"coverage={coverage}; pass a share between 0 and 1.")
    if not held_out_n:
        raise ValueError(
            "Sets of classes need held-out shots; fit with ScoringConfig(folds=3, temperature='fit') and two shots or "
            "more of every class."
        )
    rank = ceil((len(held_out_n) + 1) * coverage)
    least = 0.0 if rank > len(held_out_n) else sorted(held_out_n, reverse=True)[rank - 1]
    sets = []
    for row in probabilities_NC.tolist():
        order = sorted(range(len(row)), key=lambda c: -row[c])
        sets.append([c for c in order if row[c] >= least])
    return sets
