"""The pocket Stable Diffusion: U-Net and text encoder on the latents of the pocket's autoencoder, from scratch.

accelerate launch --cpu recipes/pocket_sd.py --data DIR --vae runs/pocket-vae/vae
"""

from pathlib import Path

import tyro

from fewshot_diti.pretraining.unet import UnetConfig, train_unet


def pocket_sd() -> UnetConfig:
    """The configuration of the backbone that ships."""
    here = Path(__file__).parent
    return UnetConfig(
        data=Path("pocket-train"),
        held_out=here / "held_out_variants.json",
        kinds=here / "aircraft_kinds.json",
        vae=Path("runs/pocket-vae/vae"),
        output_dir=Path("runs/pocket-sd"),
    )


if __name__ == "__main__":
    try:
        train_unet(tyro.cli(UnetConfig, default=pocket_sd()))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
