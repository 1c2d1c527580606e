"""What class tokens make of their classes: a row of shots and generated images for each class, as one picture.

    python -m eval.generated --bank demo/bank --output docs/generated.png

The bank is one of the bundled images, such as `fewshot-diti demo` trains. Generated images are those of seeds 0 and up,
not selected. It also prints how often each source of evidence of the bank gives a generated image its own class; all of
them have learned the same shots.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

from fewshot_diti import DiTiClassifier
from fewshot_diti.data import ImageSet, load_images
from fewshot_diti.data.images import as_picture
from fewshot_diti.progress import Progress
from fewshot_diti.reports import bootstrap_interval

_LABEL, _TITLE, _GAP = 92, 20, 2  # pixels


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is drawn.

    Attributes:
        bank: folder of a classifier of the classes of `data`.
        data: whose train split shows what the classes look like.
        shown: train images of each class in the picture.
        drawn: generated images of each class in the picture.
        images: generated images of each class that are classified.
    """

    bank: Path
    output: Path = Path("docs/generated.png")
    data: str = "bundled"
    shown: int = 3
    drawn: int = 5
    images: int = 16
    num_inference_steps: int = 25
    guidance_scale: float = 1.0


def sheet(rows: dict[str, tuple[list[Image.Image], list[Image.Image]]]) -> Image.Image:
    """One row for each class: its label, shots, and generated images, all of one size."""
    shots, made = next(iter(rows.values()))
    width, height = shots[0].size
    left = _LABEL + len(shots) * (width + _GAP) + 4 * _GAP  # of the generated images
    canvas = Image.new("RGB", (left + len(made) * (width + _GAP), _TITLE + len(rows) * (height + _GAP)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    draw.text((_LABEL, 2), "images to learn from", fill="black", font=font)
    draw.text((left, 2), "images that the class token makes", fill="black", font=font)
    for row, (label, (shots, made)) in enumerate(rows.items()):
        top = _TITLE + row * (height + _GAP)
        draw.text((4, top + height // 2), label, fill="black", font=font, anchor="lm")
        for start, images in ((_LABEL, shots), (left, made)):
            for column, image in enumerate(images):
                canvas.paste(image, (start + column * (width + _GAP), top))
    return canvas


def first_images(classifier: DiTiClassifier, data: ImageSet, label: str, count: int) -> list[Image.Image]:
    """The first images of a class, as the backbone reads them."""
    rows = np.flatnonzero(data.labels == data.class_names.index(label))[:count].tolist()
    prepared = [classifier.encoder_.prepare(data.decode(row)) for row in rows]
    return [as_picture(image.pixels_CHW) for image in prepared]


def main(config: Config) -> None:
    """Writes the picture and prints one table."""
    classifier, data = DiTiClassifier.from_pretrained(config.bank), load_images(config.data, "train")
    labels = classifier.classes_.tolist()
    how = {"num_inference_steps": config.num_inference_steps, "guidance_scale": config.guidance_scale}
    made: dict[str, list[Image.Image]] = {}
    with Progress(len(labels), "generated images", "class") as bar:
        for label in labels:
            made[label] = classifier.generate(label, max(config.images, config.drawn), **how)
            bar.update()
    shots = {label: first_images(classifier, data, label, config.shown) for label in labels}
    config.output.parent.mkdir(parents=True, exist_ok=True)
    sheet({label: (shots[label], made[label][: config.drawn]) for label in labels}).save(config.output)
    classified = {label: images[: config.images] for label, images in made.items()}
    evidence = classifier.evidence([image for images in classified.values() for image in images])
    truth = np.repeat(np.arange(len(labels)), config.images)
    table = Table("source of evidence", "generated images given their class, %", *labels)
    for source, log_p in evidence.items():
        right = (log_p.argmax(1).numpy() == truth).astype(float)
        low, high = bootstrap_interval(right, [labels[c] for c in truth])
        shares = [f"{100 * right[truth == c].mean():.0f}" for c in range(len(labels))]
        table.add_row(source, f"{100 * right.mean():.1f} [{100 * low:.1f}, {100 * high:.1f}]", *shares)
    Console(width=200).print(table)
    print(f"{len(truth)} images of {len(labels)} classes; wrote {config.output}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
