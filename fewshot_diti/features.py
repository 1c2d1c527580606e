"""What the frozen U-Net itself holds of an image: it helps the class tokens decide, or names the classes worth a trial.

Shapes in names: N images, n shots, B batch, C classes, D values of a feature, m dimensions that the shots span.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import eigh
from scipy.special import log_softmax
from sklearn.covariance import ledoit_wolf
from sklearn.preprocessing import normalize
from torch import Tensor, nn

from fewshot_diti.backbone import Backbone
from fewshot_diti.held_out import fit_temperature, split_folds

TIMESTEP = 0.06  # as a share of the schedule
POSITIONS = (8, 16)  # a block's map is averaged down to at most this height and width
FOLDS = 4  # in which shots tell how sure a discriminant may be
_COSINE_TEMPERATURE = 0.1


def telling_block(backbone: Backbone) -> tuple[str, nn.Module]:
    """The second block from the U-Net's end, with its name: the best on val images of the pocket."""
    ups = backbone.unet.up_blocks
    return f"up {len(ups) - 2}", ups[len(ups) - 2]


@torch.no_grad()
def block_features(
    backbone: Backbone,
    latents_Bchw: Tensor,
    text_1LD: Tensor,
    *,
    timestep: float = TIMESTEP,
    blocks: Mapping[str, nn.Module] | None = None,
    positions: tuple[int, int] = POSITIONS,
) -> list[Tensor]:
    """What blocks hold of images without noise, one float32 [B, D] each on the CPU, from one pass through the U-Net.

    Args:
        text_1LD: embeddings of the text that the U-Net reads, L tokens of D values.
        timestep: that it is told, as a share of the schedule.
        blocks: modules by name; by default `telling_block`.
    """
    kept: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor | tuple[Tensor, ...]) -> None:
        maps = output[0] if isinstance(output, tuple) else output  # down blocks return their skips too
        height, width = (min(a, b) for a, b in zip(maps.shape[2:], positions, strict=True))
        kept[name] = F.adaptive_avg_pool2d(maps.float(), (height, width)).flatten(1).cpu()

    blocks = dict([telling_block(backbone)]) if blocks is None else blocks
    handles = [
        block.register_forward_hook(lambda _, __, output, name=name: keep(name, output))
        for name, block in blocks.items()
    ]
    text = text_1LD.expand(len(latents_Bchw), -1, -1)
    times = torch.full((len(latents_Bchw),), round(timestep * backbone.num_train_timesteps), device=backbone.device)
    try:
        latents = latents_Bchw.to(backbone.device)
        backbone.errors(latents, torch.zeros_like(latents), times, text)
    finally:
        for handle in handles:
            handle.remove()
    return [kept[name] for name in blocks]


class Discriminant:
    """Linear discriminant analysis, the classes' common covariance shrunk towards the identity (Ledoit and Wolf, 2004).

    On directions: the mean of the classes' mean features is taken away, then every length. All classes are equally
    likely beforehand. With one shot a class nothing is known of the scatter within a class, and the cosine to the shot
    decides.

    Args:
        features_nD: of the shots.
        labels_n: their classes, 0 to C - 1, each with a shot or more.
        temperature: of the softmax over the discriminants.
    """

    def __init__(self, features_nD: np.ndarray, labels_n: np.ndarray, temperature: float = 1.0) -> None:
        classes = range(labels_n.max() + 1)
        self._mean_D = np.mean([features_nD[labels_n == c].mean(0, dtype=np.float64) for c in classes], axis=0)
        directions_nD = normalize(features_nD - self._mean_D)
        # the directions span no more dimensions than there are shots: all else is done in these
        squares, vectors = eigh(directions_nD @ directions_nD.T)
        spanned = squares > squares[-1] * 1e-8
        lengths, vectors = np.sqrt(squares[spanned]), vectors[:, spanned]
        places_nm = vectors * lengths
        means_Cm = np.stack([places_nm[labels_n == c].mean(0) for c in classes])
        within_nm = places_nm - means_Cm[labels_n]
        freedom = len(labels_n) - len(means_Cm)
        if freedom:
            covariance, _ = ledoit_wolf(within_nm, assume_centered=True)
            solved_Cm = np.linalg.solve(covariance * len(labels_n) / freedom, means_Cm.T).T
            offsets_C = -(solved_Cm * means_Cm).sum(1) / 2
        else:
            solved_Cm, offsets_C = means_Cm / _COSINE_TEMPERATURE, np.zeros(len(means_Cm))
        self._slopes_CD = solved_Cm @ (vectors / lengths).T @ directions_nD / temperature
        self._offsets_C = offsets_C / temperature

    def log_probabilities(self, features_ND: Tensor) -> Tensor:
        """Log-probabilities [N, C], float64."""
        directions_ND = normalize(features_ND.numpy() - self._mean_D)
        return torch.from_numpy(log_softmax(directions_ND @ self._slopes_CD.T + self._offsets_C, axis=1))


def fit_discriminant(shots: Mapping[Any, Tensor]) -> Discriminant:
    """The discriminant of features [n_c, D] of each class's shots, its columns in the order of the classes given.

    Its temperature is fitted on shots that other discriminants judge in four folds, which knew too little of the
    covariance to be as sure as they were; 1 where every class has one shot.
    """

    def fit(groups: Mapping[int, Sequence[Tensor]], temperature: float = 1.0) -> Discriminant:
        labels_n = np.repeat(sorted(groups), [len(groups[c]) for c in sorted(groups)])
        features_nD = torch.stack([x for c in sorted(groups) for x in groups[c]]).numpy()
        return Discriminant(features_nD, labels_n, temperature)

    groups = {c: list(features) for c, features in enumerate(shots.values())}
    several = {c: features for c, features in groups.items() if len(features) > 1}
    if not several:
        return fit(groups)
    log_p, truth = [], []
    for kept, held in split_folds(several, FOLDS):
        log_p.append(fit(groups | kept).log_probabilities(torch.stack([features for _, features in held])))
        truth += [list(several)[c] for c, _ in held]
    return fit(groups, fit_temperature(-torch.cat(log_p), torch.tensor(truth)))


def score_offsets(log_probabilities_NC: Tensor, weight: float, shortlist: int | None = None) -> Tensor:
    """What the features add to scores, [N, C]: -weight x log-probability, and infinity off the shortlist."""
    offsets_NC = -weight * log_probabilities_NC
    if shortlist is None:
        return offsets_NC
    ranks_NC = (-log_probabilities_NC).argsort(dim=1, stable=True).argsort(dim=1)
    return offsets_NC.masked_fill(ranks_NC >= shortlist, torch.inf)
