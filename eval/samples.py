"""Sample sheets of a backbone: seeds 0 to 15, not selected, one row per prompt.

python -m eval.samples --backbone pocket --output docs/pocket-samples.png
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from PIL import Image, ImageDraw

from fewshot_diti import Backbone

PROMPTS = (
    "a photo of an aircraft",
    "a photo of a Fed Ex aircraft",
    "a photo of a Delta aircraft",
    "a photo of a Singapore Airlines aircraft",
    "a photo of a Hebridean aircraft",
    "a photo of an A380, a type of aircraft",
    "a photo of a MD-11, a type of aircraft",
    "a photo of a Saab 2000, a type of aircraft",
    "a photo of a DHC-6, a type of aircraft",
    "a photo of a CRJ-200, a type of aircraft",
    "a photo of an aircraft in a grey sky",
)


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What to draw and where to put it."""

    backbone: str = "pocket"
    output: Path = Path("docs/pocket-samples.png")
    seeds: int = 16
    steps: int = 30
    guidance_scale: float = 3.0


def sheet(config: Samples) -> Image.Image:
    """The sheet: a line of text above each row of samples."""
    backbone = Backbone.from_pretrained(config.backbone)
    height, width = backbone.image_size
    text = 14
    canvas = Image.new("RGB", (width * config.seeds // 2, (2 * height + text) * len(PROMPTS)), "white")
    draw = ImageDraw.Draw(canvas)
    for row, prompt in enumerate(PROMPTS):
        latents = backbone.generate_latents(
            prompt,
            range(config.seeds),
            size=backbone.image_size,
            steps=config.steps,
            guidance_scale=config.guidance_scale,
        )
        top = row * (2 * height + text)
        draw.text((2, top + 1), prompt, fill="black")
        for i, image in enumerate(backbone.decode_latents(latents)):
            column, line = i % (config.seeds // 2), i // (config.seeds // 2)
            canvas.paste(image, (column * width, top + text + line * height))
    return canvas


if __name__ == "__main__":
    config = tyro.cli(Samples)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    sheet(config).save(config.output)
    print(f"wrote {config.output}")
