"""A small network trained with the variant labels that the pocket was not told: the mark to reach.

    accelerate launch --cpu recipes/pocket_siblings.py --data DIR

`DIR` holds Parquet shards with columns image, variant, manufacturer, airline. Started again, a run goes on at its last
checkpoint. A processor without bfloat16 wants --mixed_precision no. The row `siblings` of `python -m eval.fewshot`
stands on the features of the network that ships; `--siblings local-dir:runs/pocket-siblings/network` takes this one.

Hardware: two CPU cores; on GPUs leave out --cpu.
Time: 28 minutes in float32 on two cores with AVX2 alone (1.8 steps/s).
Expected: held_out_accuracy 0.989 after 3,000 steps (0.940 after 500), features of variants left out of training, 16
images a variant; as the row `siblings` 77.6 / 86.9 / 89.3 / 95.0 / 95.6 % at 1 / 2 / 4 / 8 / 16 shots of the 12 bundled
variants, seeds 1 to 3, measured 2026-11-26. `regnetx_002` stood at 0.702 after 1,500 steps.
"""

from pathlib import Path

import tyro

from fewshot_diti.pretraining.siblings import SiblingsConfig, train_siblings


def pocket_siblings() -> SiblingsConfig:
    """Images of the size that the pocket sees."""
    here = Path(__file__).parent
    return SiblingsConfig(
        data=Path("pocket-train"), held_out=here / "held_out_variants.json", output_dir=Path("runs/pocket-siblings")
    )


if __name__ == "__main__":
    try:
        train_siblings(tyro.cli(SiblingsConfig, default=pocket_siblings()))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
