"""Which score tells images of no known class: variants that are like the known ones, and pictures of something else.

    python -m eval.unknown --bank BANK --dataset fgvc:DIR --data DIR

A bank of the few-shot classes judges their test images (known), images of the four variants that pre-training leaves
out (unknown, and much like them), and crops of the photographs that come with scikit-learn (no aircraft). AUROC is the
chance that a known image has a higher score than an unknown one; "lost" is the share of known images that go when 95 %
of the unknown ones are caught.

Shapes in names: N images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_sample_images
from sklearn.metrics import roc_auc_score

from fewshot_diti import DiTiClassifier
from fewshot_diti.data import load_images
from fewshot_diti.data.images import ImageSource
from recipes.pocket.renders import HELD_OUT, load_renders, split_held_out


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is judged.

    Attributes:
        bank: folder of a classifier of the few-shot classes.
        dataset: of these, as `load_images` reads it, with the split test.
        data: folder of the pre-training images.
        images: of each kind, at most.
        reject: as of `DiTiClassifier.is_unknown`.
    """

    bank: Path
    dataset: str
    data: Path
    images: int = 120
    reject: float = 0.01
    seed: int = 0


def crops(photographs: Sequence[np.ndarray], count: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Parts of photographs, twice as wide as high."""
    found = []
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        height, width = photograph.shape[:2]
        h = int(rng.integers(height // 4, min(height, width // 2)))
        y, x = int(rng.integers(height - h + 1)), int(rng.integers(width - 2 * h + 1))
        found.append(photograph[y : y + h, x : x + 2 * h])
    return found


def scores(classifier: DiTiClassifier, images: Sequence[ImageSource]) -> dict[str, np.ndarray]:
    """Scores [N] of images, higher for what is known."""
    decider = classifier.decider()
    probabilities_NC = classifier.predict_proba(images)
    return {
        "highest probability": probabilities_NC.max(1),
        "similarity of the nearest shot": decider.similarities(images),
    }


def main(config: Config) -> None:
    """Prints one table."""
    rng = np.random.default_rng(config.seed)
    classifier = DiTiClassifier.from_pretrained(config.bank)
    test = load_images(config.dataset, "test")
    known = [test.decode(int(row)) for row in rng.permutation(len(test))[: config.images]]
    _, left_out = split_held_out(load_renders(config.data, (128, 256)), HELD_OUT)
    rows = rng.permutation(len(left_out))[: config.images]
    pixels = [left_out.pixels_NCHW[int(row)].permute(1, 2, 0).numpy() for row in rows]
    kinds: dict[str, Sequence[ImageSource]] = {
        "variants left out": [Image.fromarray(x) for x in pixels],
        "photographs": [Image.fromarray(x) for x in crops(load_sample_images().images, config.images, rng)],
    }
    mine = scores(classifier, known)
    theirs = {kind: scores(classifier, images) for kind, images in kinds.items()}
    table = Table("score", *(f"{kind}: {what}" for kind in kinds for what in ("AUROC", "lost, %")))
    for name, known_N in mine.items():
        cells = []
        for found in theirs.values():
            unknown_N = found[name]
            truth = [1] * len(known_N) + [0] * len(unknown_N)
            area = roc_auc_score(truth, np.concatenate([known_N, unknown_N]))
            lost = (known_N <= np.quantile(unknown_N, 0.95)).mean()
            cells += [f"{area:.3f}", f"{100 * lost:.0f}"]
        table.add_row(name, *cells)
    console = Console(width=140)
    console.print(table)
    least = classifier.decider().familiarity.least(config.reject)
    nearest = "similarity of the nearest shot"
    shares = {"known": mine[nearest], **{kind: found[nearest] for kind, found in theirs.items()}}
    told = ", ".join(f"{100 * (x < least).mean():.0f} % of {kind}" for kind, x in shares.items())
    console.print(f"reject={config.reject} (similarity below {least:.2f}) rejects {told}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
