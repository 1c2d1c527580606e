"""SimCLR on the pocket's images: features that are alike for views of one image and unlike for other images.

    python -m recipes.representation_simclr --data DIR

As `representation_pdae.py`, but without the U-Net: the fair stand-in for a network that was pre-trained without labels,
on the same images. Four views of each image are encoded first, once.

Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, ICML 2020.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fewshot_diti.backbone import Backbone
from fewshot_diti.representation import Latents, SimclrConfig
from recipes.pocket.representation import PocketTraining, main


@dataclass(frozen=True, kw_only=True)
class SimclrTraining(PocketTraining):
    """Settings of a run of SimCLR.

    Attributes:
        dims: width of the feature.
        temperature: of the softmax over the other images of a batch.
    """

    dims: int = SimclrConfig.dims
    temperature: float = SimclrConfig.temperature
    views: bool = True
    batch_size: int = SimclrConfig.batch_size
    steps: int = 1_500


def method(config: SimclrTraining, backbone: Backbone, latents: Latents) -> SimclrConfig:
    """Settings of the method."""
    return SimclrConfig(dims=config.dims, temperature=config.temperature)


if __name__ == "__main__":
    main(SimclrTraining(output_dir=Path("runs/representation-simclr")), method)
