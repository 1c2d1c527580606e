"""The pocket OpenCLIP: what the offline tables compare with, on the images and captions that the pocket saw.

Images have the size that the pocket sees, captions are drawn as its were.

    accelerate launch --cpu recipes/pocket_clip.py --data DIR

`DIR` holds Parquet shards with columns image, variant, manufacturer, airline. Started again, a run goes on at its last
checkpoint. A processor without bfloat16 wants --mixed_precision no. The rows with CLIP of `python -m eval.fewshot`
stand on the model that ships; `--clip local-dir:runs/pocket-clip/clip` takes this one.

Hardware: two CPU cores; on GPUs leave out --cpu.
Time: 67 minutes in float32 on two cores with AVX2 alone (0.65 steps/s where nothing else runs).
Expected: held_out_accuracy 0.387 / 0.584 / 0.616 / 0.627 / 0.703 after 500 / 1,000 / 1,500 / 2,000 / 2,600 steps,
features of variants left out of training, 16 images a variant (docs/logs/pocket-clip.jsonl; its first 600 steps had the
learning rate of a run of 4,000). Measured 2026-11-26.
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
        steps=2_600,
    )


if __name__ == "__main__":
    try:
        train_clip(tyro.cli(ClipConfig, default=pocket_clip()))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
