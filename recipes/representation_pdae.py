"""PDAE on the pocket: features of images without labels, for the frozen backbone to restore them with.

    python -m recipes.representation_pdae --data DIR

`DIR` holds the pocket's pre-training images (see recipes/pocket/sd.py); four of their variants are not trained on. The
log `runs/representation-pdae/log.jsonl` has the share of the backbone's error that the features save on these. A
processor without bfloat16 needs --mixed_precision no. Started again, a run continues at its last checkpoint.

Zhang et al., Unsupervised Representation Learning from Pre-trained Diffusion Probabilistic Models, NeurIPS 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fewshot_diti.backbone import Backbone
from fewshot_diti.representation import Latents, PdaeConfig
from recipes.pocket.representation import PocketTraining, main


@dataclass(frozen=True, kw_only=True)
class PdaeTraining(PocketTraining):
    """Settings of a run of PDAE.

    Attributes:
        dims: width of the feature.
    """

    dims: int = 512


def method(config: PdaeTraining, backbone: Backbone, latents: Latents) -> PdaeConfig:
    """Settings of the method."""
    return PdaeConfig(dims=config.dims)


if __name__ == "__main__":
    main(PdaeTraining(output_dir=Path("runs/representation-pdae")), method)
