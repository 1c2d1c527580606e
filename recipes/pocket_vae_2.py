"""The second edition of the pocket's autoencoder: whole images, the aircraft weighted up, and a perceptual loss.

    accelerate launch --cpu recipes/pocket_vae_2.py --data DIR

Begins with the autoencoder that ships. Needs the extra `imagenet`. Started again, a run goes on at its last checkpoint;
`runs/pocket-vae-2/vae` is the autoencoder at the last validation. A processor without bfloat16 wants
--mixed_precision no.

Hardware: two CPU cores; or a GPU, without `--cpu`.
Time, expected: not measured to the end yet; the log of what has run is docs/logs/pocket-vae-2.jsonl.
"""

from pathlib import Path

import tyro

from fewshot_diti.backbone import resolve
from fewshot_diti.pretraining.vae import VaeConfig, train_vae


def pocket_vae_2() -> VaeConfig:
    """The configuration of the second edition."""
    here = Path(__file__).parent
    return VaeConfig(
        data=Path("pocket-train"),
        held_out=here / "held_out_variants.json",
        output_dir=Path("runs/pocket-vae-2"),
        start_from=Path(resolve("pocket")) / "vae",
        full_share=1.0,
        steps=20_000,
        lr=4e-4,
        warmup=200,
        ema_decay=0.998,
        perceptual_weight=1.0,
        object_weight=4.0,
        scale_weight=0.25,
        kl_weight=1e-7,
        validate_every=500,
    )


if __name__ == "__main__":
    try:
        train_vae(tyro.cli(VaeConfig, default=pocket_vae_2()))
    except (ImportError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
