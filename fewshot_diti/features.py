"""What the frozen U-Net itself holds of an image: it helps the class tokens decide, or names the classes worth a trial.

Shapes in names: N images, n shots, B batch, C classes, D values of a feature.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import log_softmax
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import normalize
from torch import Tensor, nn

from fewshot_diti.backbone import Backbone

TIMESTEP = 0.06  # as a share of the schedule
POSITIONS = (8, 16)  # a block's map is averaged down to at most this height and width
_COSINE_TEMPERATURE = 0.1


def telling_block(backbone: Backbone) -> tuple[str, nn.Module]:
    """The second block from the U-Net's end, with its name: the best on val images of the pocket."""
    ups = backbone.unet.up_blocks
    return f"up {len(ups) - 2}", ups[len(ups) - 2]


@torch.no_grad()
def block_features(
    backbone: Backbone,
    latents_Bchw: Tensor,
    prompt: str,
    *,
    timestep: float = TIMESTEP,
    blocks: Mapping[str, nn.Module] | None = None,
    positions: tuple[int, int] = POSITIONS,
) -> list[Tensor]:
    """What blocks hold of images without noise, one float32 [B, D] each on the CPU, from one pass through the U-Net.

    Args:
        prompt: of the text that the U-Net reads.
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
    text = backbone.encode_text(backbone.tokenize([prompt])).expand(len(latents_Bchw), -1, -1)
    times = torch.full((len(latents_Bchw),), round(timestep * backbone.num_train_timesteps), device=backbone.device)
    try:
        latents = latents_Bchw.to(backbone.device)
        backbone.errors(latents, torch.zeros_like(latents), times, text)
    finally:
        for handle in handles:
            handle.remove()
    return [kept[name] for name in blocks]


class Discriminant:
    """Linear discriminant analysis, its covariance shrunk towards the identity (Ledoit and Wolf, 2004).

    On directions: the shots' mean feature is taken away, then every length. With one shot a class nothing is known of
    the scatter within a class, and the cosine to the shot decides.

    Args:
        features_nD: of the shots.
        labels_n: their classes, 0 to C - 1, each with a shot or more.
    """

    def __init__(self, features_nD: np.ndarray, labels_n: np.ndarray) -> None:
        features_nD = features_nD.astype(np.float64)
        self._mean_D = features_nD.mean(0)
        directions_nD = normalize(features_nD - self._mean_D)
        one_each = np.bincount(labels_n).max() == 1
        self._shots_CD = directions_nD[labels_n.argsort()] if one_each else None
        if not one_each:
            # as many components as shots lose nothing, and make wide features cheap
            lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
            self._model = make_pipeline(PCA(), lda).fit(directions_nD, labels_n)

    def log_probabilities(self, features_ND: np.ndarray) -> np.ndarray:
        """Log-probabilities [N, C]; of cosines at a temperature of 0.1."""
        directions_ND = normalize(features_ND.astype(np.float64) - self._mean_D)
        if self._shots_CD is not None:
            return log_softmax(directions_ND @ self._shots_CD.T / _COSINE_TEMPERATURE, axis=1)
        return self._model.predict_log_proba(directions_ND)


def fit_discriminant(shots: Mapping[Any, Tensor]) -> Discriminant:
    """The discriminant of features [n_c, D] of each class's shots, its columns in the order of the classes given."""
    labels_n = np.repeat(np.arange(len(shots)), [len(features) for features in shots.values()])
    return Discriminant(torch.cat(list(shots.values())).numpy(), labels_n)


def evidence(discriminant: Discriminant, features_ND: Tensor) -> Tensor:
    """Log-probabilities [N, C], float64, of each image in standard deviations over its classes from their mean.

    How sure a discriminant is changes with the number of shots by far more than how often it is right; in which order
    and at what relative distance it sees the classes does not.
    """
    log_p_NC = torch.from_numpy(discriminant.log_probabilities(features_ND.numpy()))
    spread = log_p_NC.std(1, correction=0, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    return (log_p_NC - log_p_NC.mean(1, keepdim=True)) / spread


def score_offsets(evidence_NC: Tensor, weight: float, shortlist: int | None = None) -> Tensor:
    """What evidence adds to scores, [N, C]: -weight x evidence, and infinity off the shortlist of the likeliest."""
    offsets_NC = -weight * evidence_NC
    if shortlist is None:
        return offsets_NC
    ranks_NC = (-evidence_NC).argsort(dim=1, stable=True).argsort(dim=1)
    return offsets_NC.masked_fill(ranks_NC >= shortlist, torch.inf)
