"""The pocket's autoencoder: f8, 32 latent channels, 128 x 64 pixels, trained from scratch.

accelerate launch --cpu recipes/pocket_vae.py --data DIR
"""

from pathlib import Path

import tyro

from fewshot_diti.pretraining.vae import VaeConfig, train_vae


def pocket_vae() -> VaeConfig:
    """The configuration of the autoencoder that ships."""
    here = Path(__file__).parent
    return VaeConfig(
        data=Path("pocket-train"), held_out=here / "held_out_variants.json", output_dir=Path("runs/pocket-vae")
    )


if __name__ == "__main__":
    try:
        train_vae(tyro.cli(VaeConfig, default=pocket_vae()))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
