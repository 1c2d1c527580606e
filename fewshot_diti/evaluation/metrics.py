"""The figures of one run: accuracy with its interval, by class and level, F1, calibration, and every prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix, f1_score

from fewshot_diti.evaluation.hierarchy import level_probabilities
from fewshot_diti.evaluation.reliability import calibration_figures
from fewshot_diti.reports import bootstrap_interval, single_groups, wilson_interval

FEWEST_GROUPS = 5


def summarize(
    labels_N: np.ndarray,
    probabilities_NC: np.ndarray,
    class_names: Sequence[str],
    image_ids: Sequence[str],
    *,
    groups: Sequence[str] | None = None,
    parts: Mapping[str, np.ndarray] = MappingProxyType({}),
    levels: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> dict[str, Any]:
    """Figures of N test images, ready for JSON; shares are 0 to 1.

    Args:
        labels_N: true classes, positions in `class_names`.
        probabilities_NC: by class; the largest is the prediction.
        image_ids: of the images.
        groups: of each image, as `accuracy_with_interval` takes them.
        parts: masks [N] by name, such as test images that share a spurious attribute with the shots of their class, and
            others; the accuracy on each is reported by itself.
        levels: the group of each class by the name of a level, as `hierarchy.levels_of` finds them.

    Raises:
        ValueError: probabilities that are not finite, or lengths that differ.
    """
    if probabilities_NC.shape != (len(labels_N), len(class_names)) or len(image_ids) != len(labels_N):
        raise ValueError(
            f"Probabilities {probabilities_NC.shape} for {len(labels_N)} labels, {len(image_ids)} image ids and "
            f"{len(class_names)} classes."
        )
    if not np.isfinite(probabilities_NC).all():
        image, label = np.argwhere(~np.isfinite(probabilities_NC))[0]
        raise ValueError(f"Image {image_ids[image]} has no finite probability of class {class_names[label]!r}.")
    predicted = probabilities_NC.argmax(1)
    correct = predicted == labels_N
    top_two = np.sort(probabilities_NC, axis=1)[:, -2:]
    return {
        **accuracy_with_interval(correct, groups),
        **{
            name: accuracy_with_interval(correct[mask], groups and [g for g, m in zip(groups, mask, strict=True) if m])
            for name, mask in parts.items()
            if mask.any()
        },
        "accuracy_by_class": {
            name: float(correct[labels_N == c].mean()) for c, name in enumerate(class_names) if (labels_N == c).any()
        },
        "levels": {name: _at_level(labels_N, probabilities_NC, of, groups) for name, of in levels.items()},
        **calibration_figures(labels_N, probabilities_NC),
        "macro_f1": float(f1_score(labels_N, predicted, average="macro")),
        "confusion": confusion_matrix(labels_N, predicted, labels=range(len(class_names))).tolist(),
        "predictions": [
            {
                "image_id": i,
                "true_label": class_names[y],
                "label": class_names[p],
                "probability": float(b),
                "margin": float(b - a),
            }
            for i, y, p, (a, b) in zip(image_ids, labels_N, predicted, top_two, strict=True)
        ],
    }


def _at_level(
    labels_N: np.ndarray, probabilities_NC: np.ndarray, groups_C: Sequence[str], groups: Sequence[str] | None
) -> dict[str, Any]:
    names, p_NG = level_probabilities(probabilities_NC, groups_C)
    truth_N = np.array([names.index(name) for name in groups_C])[labels_N]
    return accuracy_with_interval(p_NG.argmax(1) == truth_N, groups)


@dataclass(frozen=True, kw_only=True)
class Drop:
    """Accuracy, 0 to 1, on matched and on shifted images, each the mean over the classes that have both.

    Attributes:
        low, high: 95 % interval of matched minus shifted, by bootstrap over these classes.
        classes: how many there are.
    """

    matched: float
    shifted: float
    low: float
    high: float
    classes: int


def drop_from_matched_to_shifted(correct_N: np.ndarray, matched_N: np.ndarray, labels_N: np.ndarray) -> Drop | None:
    """The drop of accuracy where a spurious cue is gone; None where no class has images of both kinds.

    Classes weigh the same on both sides, so that a class of many matched images does not pass for an effect of the cue.
    They are what the bootstrap draws: the matched images of a class may all wear one livery, and are right or wrong
    together.
    """
    sides = [
        [correct_N[(labels_N == c) & kind].mean() for kind in (matched_N, ~matched_N)]
        for c in np.unique(labels_N)
        if 0 < matched_N[labels_N == c].sum() < (labels_N == c).sum()
    ]
    if not sides:
        return None
    matched_C, shifted_C = np.array(sides).T
    low, high = bootstrap_interval(matched_C - shifted_C, [str(c) for c in range(len(sides))])
    return Drop(
        matched=float(matched_C.mean()), shifted=float(shifted_C.mean()), low=low, high=high, classes=len(sides)
    )


def accuracy_with_interval(correct: np.ndarray, groups: Sequence[str] | None) -> dict[str, Any]:
    """Accuracy of images, 0 to 1, with its 95 % interval, and what that is over.

    Images of one group, such as a livery, are right or wrong together: the interval is `bootstrap_interval`'s. Without
    groups, and with fewer than `FEWEST_GROUPS`, which say too little of their spread, it is Wilson's over images.
    """
    found = {"accuracy": float(correct.mean()), "images": len(correct)}
    if len(set(single_groups(groups or ()))) < FEWEST_GROUPS:
        interval, over = wilson_interval(int(correct.sum()), len(correct)), "images"
    else:
        interval, over = bootstrap_interval(correct.astype(float), groups or ()), "groups"
    return found | {"interval": list(interval), "interval_over": over}
