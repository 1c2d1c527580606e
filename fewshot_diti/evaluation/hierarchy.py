"""Accuracy at coarser levels than the classes, such as families of aircraft variants, from the same probabilities.

Shapes in names: N images, C classes, G groups of classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fewshot_diti.data import ImageSet


def level_probabilities(probabilities_NC: np.ndarray, groups_C: Sequence[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """The groups, sorted, and the probability of each [N, G]: the sum of its classes'.

    Args:
        probabilities_NC: of the classes.
        groups_C: the group of each class.

    Raises:
        ValueError: not one group per class.
    """
    if probabilities_NC.ndim != 2 or probabilities_NC.shape[1] != len(groups_C):
        raise ValueError(
            f"Probabilities {probabilities_NC.shape} and {len(groups_C)} groups; pass [N, C] and a group of each class."
        )
    names, places_C = np.unique(list(groups_C), return_inverse=True)
    return tuple(names.tolist()), probabilities_NC @ np.eye(len(names))[places_C]


def level_titles(class_names: Sequence[str], levels: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """What pictures and tables call the levels: the classes themselves (""), and each group of them by its name.

    Args:
        levels: the group of each class by the name of a level.
    """
    groups = {level: f"{level}, {len(set(of_classes))} groups" for level, of_classes in levels.items()}
    return {"": f"{len(class_names)} classes", **groups}


def levels_of(*parts: ImageSet) -> dict[str, tuple[str, ...]]:
    """Attributes that group the classes: those with one value on all images of a class, in all parts, that classes
    share; for each the value of every class. The finest level comes first.

    Args:
        parts: image sets of the same classes, such as train and test.
    """
    first, found = parts[0], {}
    for column in first.attributes:
        if any(column not in part.attributes for part in parts):
            continue
        pairs = {pair for part in parts for pair in zip(part.label_names, part.attributes[column], strict=True)}
        groups = dict(pairs)
        if len(groups) == len(pairs) == len(first.class_names) and all(groups.values()):
            of_classes = tuple(groups[name] for name in first.class_names)
            if 1 < len(set(of_classes)) < len(of_classes):
                found[column] = of_classes
    return dict(sorted(found.items(), key=lambda level: -len(set(level[1]))))
