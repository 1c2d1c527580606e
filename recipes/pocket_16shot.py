"""The pocket backbone on the bundled images: 12 aircraft variants, 16 shots per class, without a download.

    python recipes/pocket_16shot.py

`--config published` takes the paper's settings instead of this package's; `--num_shots` goes up to 24. Another
data set: `--dataset fgvc:DIR`. The settings are the pocket's whatever `--backbone` says.

Hardware: two CPU cores, 4 GB of memory.
Time: about 13 minutes in float32 on two cores with AVX2 (10 of them training).
Expected: 93.8 %, the row `fewshot-diti` of the table at 16 shots, draw 1, which has the same settings (version 0.4.0).
"""

from dataclasses import replace
from pathlib import Path

from fewshot_diti import presets
from fewshot_diti.backbone_files import POCKET
from fewshot_diti.evaluation.recipe import main
from fewshot_diti.evaluation.run import FewShotRun


def recommended(num_shots: int = 16) -> FewShotRun:
    """With the settings that this package uses by default."""
    return FewShotRun(
        output_dir=Path(f"runs/pocket_{num_shots}shot"),
        backbone=POCKET,
        dataset="bundled",
        num_shots=num_shots,
        prompt_template="a photo of a hta {}, a type of aircraft.",
        generic_prompt="a photo of an aircraft",
        **presets.recommended(num_shots)._asdict(),
    )


def published(num_shots: int = 16) -> FewShotRun:
    """As in the paper, whose settings are for Stable Diffusion 2.0 at 512 pixels."""
    return replace(
        recommended(num_shots),
        output_dir=Path(f"runs/pocket_{num_shots}shot_published"),
        **presets.published(num_shots)._asdict(),
    )


if __name__ == "__main__":
    main({"recommended": recommended, "published": published}, num_shots=16)
