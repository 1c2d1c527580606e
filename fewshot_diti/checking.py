"""What may be wrong with a folder of labelled images, by the frozen U-Net's features, before anything is trained.

Shapes in names: N images, n shots, C classes, D values of a feature.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fewshot_diti.data import ImageSet, near_duplicates
from fewshot_diti.discriminant import directions, fit_discriminant
from fewshot_diti.folds import K, split_folds

SURE = 0.9  # probability of another class from which a label is doubted
TIMES = 50  # as probable as the label: from there on another class makes it doubted, however sure that class is
ALIKE = 0.95  # cosine of features from which one of two images is enough to label


class Doubt(NamedTuple):
    """An image whose label is improbable to a discriminant that has not learned it.

    Attributes:
        own: probability of the label.
        probability: of the class that it looks like.
    """

    name: str
    label: str
    looks_like: str
    own: float
    probability: float


class Confusion(NamedTuple):
    """Two classes, and how many of their images are taken for the other one."""

    first: str
    second: str
    mistaken: int
    images: int


class Wanted(NamedTuple):
    """An image whose label would help: it lies between two classes."""

    name: str
    first: str
    second: str
    margin: float


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What was found.

    Attributes:
        accuracy: of the discriminant on images that it had not learned, 0 to 1; None where no class has two.
        judged: how many images that is.
        doubts: labels that may be wrong, the least probable first.
        copies: pairs of names of one picture, in the same pixels or in others, within a class.
        copies_between: such pairs under two classes.
        confusions: classes that are taken for each other, the most frequent first.
        wanted: unlabelled images, the most useful first.
    """

    accuracy: float | None
    judged: int
    doubts: tuple[Doubt, ...]
    copies: tuple[tuple[str, str], ...]
    copies_between: tuple[tuple[str, str], ...]
    confusions: tuple[Confusion, ...]
    wanted: tuple[Wanted, ...] = ()


def check_images(
    images: ImageSet,
    features: Callable[[Sequence[int]], Tensor],
    *,
    folds: int = 5,
    unlabelled: tuple[ImageSet, Tensor] | None = None,
    wanted: int = 10,
) -> Findings:
    """Looks at every image through the eyes of the others.

    Args:
        images: of two classes or more.
        features: from rows of `images` to what a discriminant learns of them, [n, V, D].
        folds: in which images are held out; no more than the largest class has.
        unlabelled: images without labels, and their features [N, D].
        wanted: how many of these to name.

    Raises:
        ValueError: as `ImageSet.ids`: images that cannot be read, all named.
    """
    pairs = [(images.names[a], images.names[b], images.labels[a] == images.labels[b]) for a, b in find_copies(images)]
    names = images.class_names
    rows = {name: np.flatnonzero(images.labels == c).tolist() for c, name in enumerate(names)}
    views = {name: features(of_class) for name, of_class in rows.items()}
    labels = {row: name for name, of_class in rows.items() for row in of_class}
    judged = [(rows[name][place], log_p_C.exp()) for name, place, log_p_C in judged_by_others(views, views, folds)]
    order = sorted(rows)
    predicted = {row: order[int(p_C.argmax())] for row, p_C in judged}
    doubts = []
    for row, p_C in judged:
        label = labels[row]
        own = float(p_C[order.index(label)])
        if predicted[row] != label and (p_C.max() >= SURE or p_C.max() >= TIMES * own):
            doubts.append(Doubt(images.names[row], label, predicted[row], own, float(p_C.max())))
    return Findings(
        accuracy=float(np.mean([predicted[row] == labels[row] for row, _ in judged])) if judged else None,
        judged=len(judged),
        doubts=tuple(sorted(doubts, key=lambda doubt: doubt.own)),
        copies=tuple((a, b) for a, b, same in pairs if same),
        copies_between=tuple((a, b) for a, b, same in pairs if not same),
        confusions=_confusions(predicted, labels, rows),
        wanted=() if unlabelled is None else _wanted(*unlabelled, views, wanted),
    )


def judged_by_others(views: Mapping[K, Tensor], asked: Iterable[K], folds: int) -> Iterator[tuple[K, int, Tensor]]:
    """Images as a discriminant that has not learned them sees them: class, place in it, log-probabilities [C] of the
    classes in sorted order.

    Args:
        views: of the images of each class, [n, V, D].
        asked: classes whose images are held out, in folds; those of one image are learned and not judged.
        folds: as `split_folds` takes them.
    """
    several = {x: range(len(views[x])) for x in asked if len(views[x]) > 1}
    order = sorted(several)
    for kept, held in split_folds(several, folds) if several else ():
        judge = fit_discriminant({x: views[x][kept[x]] if x in kept else views[x] for x in sorted(views)})
        for c, place in held:
            yield order[c], place, judge.log_probabilities(views[order[c]][place, :1].float())[0]


def find_copies(images: ImageSet) -> list[tuple[int, int]]:
    """(later row, earlier row) of one picture: files of the same pixels, and `near_duplicates`."""
    first: dict[str, int] = {}
    same = [(row, first.setdefault(image_id, row)) for row, image_id in enumerate(images.ids)]
    return sorted([*((row, earlier) for row, earlier in same if row != earlier), *near_duplicates(images)])


def _confusions(
    predicted: Mapping[int, str], labels: Mapping[int, str], rows: Mapping[str, Sequence[int]]
) -> tuple[Confusion, ...]:
    """Pairs of classes of whose images a quarter or more are taken for the other one."""
    mistaken = Counter(frozenset((labels[row], name)) for row, name in predicted.items() if name != labels[row])
    found = []
    for pair, count in mistaken.items():
        first, second = sorted(pair)
        images = len(rows[first]) + len(rows[second])
        if count >= images / 4:
            found.append(Confusion(first, second, count, images))
    return tuple(sorted(found, key=lambda x: (-x.mistaken / x.images, x.first, x.second)))


def _wanted(images: ImageSet, features_ND: Tensor, views: Mapping[str, Tensor], count: int) -> tuple[Wanted, ...]:
    """The images with the smallest margin between the two most probable classes, without those much like one that is
    named already."""
    order = sorted(views)
    learned = {name: views[name] for name in order}
    p_NC = fit_discriminant(learned).log_probabilities(features_ND.float()).exp()
    best_N2, places_N2 = p_NC.topk(2, dim=1)
    margins_N = best_N2[:, 0] - best_N2[:, 1]
    mean_D = torch.cat([x[:, 0] for x in learned.values()]).float().mean(0)
    directions_ND = directions(features_ND, mean_D)
    chosen: list[int] = []
    for row in margins_N.argsort(stable=True).tolist():
        if len(chosen) == count:
            break
        if not chosen or (directions_ND[chosen] @ directions_ND[row]).max() < ALIKE:
            chosen.append(row)
    found = []
    for row in chosen:
        first, second = (order[c] for c in places_N2[row].tolist())
        found.append(Wanted(images.names[row], first, second, float(margins_N[row])))
    return tuple(found)
