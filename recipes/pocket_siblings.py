"""A small network trained with the variant labels that the pocket was not told: the mark to reach.

    accelerate launch --cpu recipes/pocket_siblings.py --data DIR

`DIR` holds Parquet shards with columns image, variant, manufacturer, airline. Started again, a run goes on at its last
checkpoint. A processor without bfloat16 wants --mixed_precision no. The row `siblings` of `python -m eval.fewshot`
stands on the features of `runs/pocket-siblings/network`.

Hardware: two CPU cores; on GPUs leave out --cpu.
Time: not measured.
Expected: not measured.
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
