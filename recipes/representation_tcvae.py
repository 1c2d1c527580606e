"""The beta-TCVAE on the pocket's images: a variational autoencoder whose dimensions are pushed to be independent.

    python -m recipes.representation_tcvae --data DIR

As `representation_pdae.py`, and the U-Net is not used.

Chen et al., Isolating Sources of Disentanglement in Variational Autoencoders, NeurIPS 2018.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fewshot_diti.backbone import Backbone
from fewshot_diti.representation import Latents, TcvaeConfig
from recipes.pocket.representation import PocketTraining, main


@dataclass(frozen=True, kw_only=True)
class TcvaeTraining(PocketTraining):
    """Settings of a run of the beta-TCVAE.

    Attributes:
        dims: width of the feature.
        beta: weight of the total correlation.
    """

    dims: int = TcvaeConfig.dims
    beta: float = TcvaeConfig.beta
    batch_size: int = TcvaeConfig.batch_size


def method(config: TcvaeTraining, backbone: Backbone, latents: Latents) -> TcvaeConfig:
    """Settings of the method."""
    return TcvaeConfig(dims=config.dims, beta=config.beta)


if __name__ == "__main__":
    main(TcvaeTraining(output_dir=Path("runs/representation-tcvae")), method)
