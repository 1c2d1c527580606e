"""How good the map of an explanation is: does the evidence sit on the object, and does it count?

    python -m eval.maps --bank BANK --data DIR

For test images of a data set in FGVC layout with masks: the share of positive evidence inside the object's mask, and
how often the strongest position lies in it, beside the mask's share of the picture and a map of the errors alone. As
checks of sanity: the map of two other classes, and of class tokens with random weights.

Then the tenth of the picture with the most positive evidence is blurred (deletion), and a blurred picture gets back
that tenth (insertion); the class tokens' gap between label and rival is measured each time, beside the tenth with the
largest errors and one at random.

Shapes in names: h, w latent height and width, H, W those in pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image, ImageFilter
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fewshot_diti import Bank, DiTiClassifier
from fewshot_diti.data import load_images
from fewshot_diti.encoding import PreparedImage
from fewshot_diti.reports import bootstrap_interval
from fewshot_diti.scoring import Scorer
from fewshot_diti.trials import torch_generator

BLURRED = 0.1  # of the picture


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is judged.

    Attributes:
        bank: folder of a classifier.
        data: folder of the data set, with masks/*.png beside images/.
        images: of the test split, at most.
    """

    bank: Path
    data: Path
    images: int = 60
    seed: int = 0


def positions(map_hw: Tensor, size: tuple[int, int]) -> np.ndarray:
    """A map by latent position, enlarged to pixels [H, W]."""
    enlarged = F.interpolate(map_hw[None, None].float(), size, mode="bilinear", align_corners=False)[0, 0]
    return np.asarray(enlarged)


def inside(map_HW: np.ndarray, mask_HW: np.ndarray) -> tuple[float, float]:
    """Share of what is positive that lies in the mask, and whether the largest value does."""
    positive = map_HW.clip(min=0)
    strongest = np.unravel_index(int(positive.argmax()), positive.shape)
    return float(positive[mask_HW].sum() / max(positive.sum(), 1e-12)), float(mask_HW[strongest])


def blurred(picture: Image.Image, where_HW: np.ndarray) -> Image.Image:
    """The picture with some of its pixels blurred."""
    soft = picture.filter(ImageFilter.GaussianBlur(max(picture.size) / 16))
    return Image.composite(soft, picture, Image.fromarray(np.where(where_HW, 255, 0).astype(np.uint8)))


def largest(map_HW: np.ndarray, share: float) -> np.ndarray:
    """Where the largest values are, bool [H, W]."""
    found: np.ndarray = map_HW >= np.quantile(map_HW, 1 - share)
    return found


def random_weights(bank: Bank, seed: int) -> Bank:
    """Class tokens whose LoRA has values of the same spread at random."""
    noise = torch.randn(bank.rows.shape, generator=torch_generator(seed, "random class tokens"))
    return replace(bank, rows=noise * bank.rows.std())


def main(config: Config) -> None:
    """Prints one table."""
    classifier = DiTiClassifier.from_pretrained(config.bank)
    decider, encoder = classifier.decider(), classifier.encoder_
    calibration, batch_size = classifier.calibration_, classifier.current_prediction().batch_size
    times, weights_S = calibration.timesteps, torch.tensor(calibration.weights)
    scorer = decider.scorer(batch_size)
    random = Scorer(classifier.backbone_, random_weights(decider.bank, config.seed), batch_size=batch_size)
    test = load_images(f"fgvc:{config.data}", "test")
    rng = np.random.default_rng(config.seed)
    rows = sorted(rng.permutation(len(test))[: config.images].tolist())
    found: dict[str, list[tuple[float, float]]] = {}
    areas: list[float] = []
    falls: dict[str, list[float]] = {}  # of the gap, where a part is blurred
    rises: dict[str, list[float]] = {}  # where it alone is not

    def maps(by: Scorer, image: PreparedImage, classes: tuple[int, ...]) -> Tensor:
        latents = encoder.latents([image])[0]
        errors = by.error_maps(latents, image.id, classes, range(len(times)), times)
        return (errors * weights_S[:, None, None]).mean(1)

    def gap(picture: Image.Image, image_id: str, pair: tuple[int, int]) -> float:
        prepared = replace(encoder.prepare(picture), id=image_id)  # the same noise
        first, second = maps(scorer, prepared, pair)
        return float(second.mean() - first.mean())

    for row in rows:
        image = encoder.prepare(test.decode(row))
        explanation = classifier.explain(image, top=2)
        picture = explanation.picture
        mask = Image.open(config.data / "masks" / f"{Path(test.names[row]).stem}.png").convert("L")
        mask_HW = np.asarray(mask.resize(picture.size, Image.Resampling.BOX)) > 127
        labels = classifier.classes_.tolist()
        first, second = labels.index(explanation.label), labels.index(explanation.rival)
        others = [c for c in rng.permutation(len(labels)).tolist() if c not in (first, second)]
        size = mask_HW.shape
        third, fourth = maps(scorer, image, (others[0], others[1]))
        by_chance = maps(random, image, (first, second))
        shown = {
            "evidence": explanation.evidence,
            "errors alone": positions(maps(scorer, image, (first,))[0], size),
            "two other classes": positions(fourth - third, size),
            "random class tokens": positions(by_chance[1] - by_chance[0], size),
        }
        for name, shown_HW in shown.items():
            found.setdefault(name, []).append(inside(shown_HW, mask_HW))
        areas.append(float(mask_HW.mean()))
        before = gap(picture, image.id, (first, second))
        anywhere = positions(torch.from_numpy(rng.random((8, 16))), size)
        everywhere = gap(blurred(picture, np.ones(size, bool)), image.id, (first, second))
        for name, where in {**{x: shown[x] for x in ("evidence", "errors alone")}, "at random": anywhere}.items():
            part = largest(where, BLURRED)
            falls.setdefault(name, []).append(before - gap(blurred(picture, part), image.id, (first, second)))
            rises.setdefault(name, []).append(gap(blurred(picture, ~part), image.id, (first, second)) - everywhere)
    table = Table("map", "positive evidence inside the object, %", "strongest position inside, %")
    groups = [test.names[row] for row in rows]
    for name, values in found.items():
        cells = []
        for column in np.array(values).T:
            low, high = bootstrap_interval(column, groups)
            cells.append(f"{100 * column.mean():.0f} [{100 * low:.0f}, {100 * high:.0f}]")
        table.add_row(name, *cells)
    table.add_row("area of the object", f"{100 * np.mean(areas):.0f}", f"{100 * np.mean(areas):.0f}")
    parts = Table("a tenth of the picture", "by", "the gap changes by, 1e-4", "more than at random, % of images")
    for what, of in (("blurred: the gap falls", falls), ("alone left sharp: the gap rises", rises)):
        for name in of:
            changes = np.array(of[name])
            low, high = bootstrap_interval(changes, groups)
            more = 100 * np.mean(changes > np.array(of["at random"]))
            parts.add_row(what, name, f"{1e4 * changes.mean():.1f} [{1e4 * low:.1f}, {1e4 * high:.1f}]", f"{more:.0f}")
    console = Console(width=120)
    console.print(table)
    console.print(parts)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
