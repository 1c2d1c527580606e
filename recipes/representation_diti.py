"""DiTi on the pocket: PDAE whose feature is cut by timestep, fine attributes first.

    python -m recipes.representation_diti --data DIR

As `representation_pdae.py`. `--stages` says how many dimensions each of the 64 subsets of timesteps gets: "snr" as
published, at timesteps with the published signal-to-noise ratios; "published" at the published timesteps, which belong
to another schedule; "loss" in proportion to the backbone's weighted error; "even" the same for all.

Yue et al., Exploring Diffusion Time-steps for Unsupervised Representation Learning, ICLR 2024.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fewshot_diti.backbone import Backbone
from fewshot_diti.representation import DitiConfig, Latents
from fewshot_diti.representation.pdae import Mode
from fewshot_diti.representation.subsets import Stages
from fewshot_diti.representation.training import choose_sizes
from recipes.pocket.representation import PocketTraining, main


@dataclass(frozen=True, kw_only=True)
class DitiTraining(PocketTraining):
    """Settings of a run of DiTi.

    Attributes:
        dims: width of the feature.
        stages: as of `choose_sizes`.
        mode: "base", or "stop_grad", in which the loss at a timestep teaches the encoder the dimensions of its subset
            alone.
    """

    dims: int = 512
    stages: Stages = "snr"
    mode: Mode = "base"


def method(config: DitiTraining, backbone: Backbone, latents: Latents) -> DitiConfig:
    """Settings of the method."""
    sizes = choose_sizes(config.stages, config.dims, backbone, latents, config.prompt)
    return DitiConfig(sizes=sizes, mode=config.mode)


if __name__ == "__main__":
    main(DitiTraining(output_dir=Path("runs/representation-diti")), method)
