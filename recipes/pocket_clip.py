"""The pocket OpenCLIP: what the offline tables compare with, on the images and captions that the pocket saw.

Images have the size that the pocket sees, captions are drawn as its were.

    accelerate launch --cpu recipes/pocket_clip.py --data DIR

`DIR` holds Parquet shards with columns image, variant, manufacturer, airline. Started again, a run goes on at its last
checkpoint. A processor without bfloat16 wants --mixed_precision no.

Hardware: two CPU cores with bfloat16; on GPUs leave out --cpu.
Time: not measured.
Expected: not measured.
"""

from pathlib import Path

import tyro

from fewshot_diti.backbone import resolve
from fewshot_diti.pretraining.clip import ClipConfig, train_clip


def pocket_clip() -> ClipConfig:
    """The configuration of the pocket's counterpart."""
    here = Path(__file__).parent
    return ClipConfig(
        data=Path("pocket-train"),
        held_out=here / "held_out_variants.json",
        kinds=here / "aircraft_kinds.json",
        tokenizer=Path(resolve("pocket")) / "tokenizer",
        output_dir=Path("runs/pocket-clip"),
    )


if __name__ == "__main__":
    try:
        train_clip(tyro.cli(ClipConfig, default=pocket_clip()))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
