"""The U-Net's own features of an image, and a linear discriminant on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fewshot_diti.config import TrainingConfig
from fewshot_diti.discriminant import Discriminant, fit_discriminant
from fewshot_diti.encoding import Encoder, PreparedImage
from fewshot_diti.witnesses.base import ShotsRead, Witness


class UnetWitness(Witness):
    """A block of the frozen U-Net describes an image without noise; of the shots it reads copies in other colours too,
    as many as the preset says."""

    evaluations = 1
    kept = torch.float16

    def read_shots(self, encoder: Encoder, shots: Sequence[PreparedImage], training: TrainingConfig) -> Tensor:
        """float16 [n, V, D]."""
        return encoder.shot_features(shots, training)

    def read(self, encoder: Encoder, images: Sequence[PreparedImage], latents_Nchw: Tensor) -> Tensor:
        """float32 [N, D]."""
        return encoder.features(latents_Nchw)

    def judge(self, shots: ShotsRead, learned: Mapping[str, Tensor]) -> Discriminant:
        """`fit_discriminant` of the shots."""
        return fit_discriminant(shots)
