"""The pocket Stable Diffusion: U-Net and text encoder on the latents of the pocket's autoencoder, from scratch.

    accelerate launch --cpu recipes/pocket_sd.py --data DIR --vae runs/pocket-vae/vae

With ACCELERATE_DYNAMO_BACKEND=inductor the networks are compiled, which takes some minutes and then saves a quarter of
each step. A processor without bfloat16 wants --mixed_precision no. `--start_from FOLDER` goes on from a Stable
Diffusion on the same autoencoder.

Hardware: two CPU cores with bfloat16; on GPUs leave out --cpu.
Time: the 18,700 steps of the weights that ship took 3 hours (1.1 steps/s, later 2.0 compiled on a faster machine).
Expected: the curves in docs/pocket.md. Those weights came in three runs, each from where the one before stood: 5,000
steps (a fifth of the samples in false colours, kinds never named), 7,200 and 6,500 as below, peak learning rates 1e-3,
8e-4 and 7e-4. All steps in one run: not measured.
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
        false_copies=5,
        steps=18_700,
        ema_decay=0.999,
    )


if __name__ == "__main__":
    try:
        train_unet(tyro.cli(UnetConfig, default=pocket_sd()))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
