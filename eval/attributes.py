"""What do features hold of an aircraft? Attributes from many labels, from few, and as numbers.

    python -m eval.attributes --dataset fgvc:DIR --data DIR --representations runs/representation-diti/representation

Rows are the frozen U-Net's features, those of learned representations, and of DiTi also single bands of its dimensions.
Three tables: average precision for attributes of the variant ("nuanced") and for the sky's name ("prominent"), with
heads fitted on the training images of the twelve variants or on pre-training images of 22 others; balanced accuracy
from a few images of each side, also where all that have the attribute are drawn under light skies and all others under
dark ones; and ridge regression of the length and of the sky's colour. Strengths and bands are chosen on val, and test
is reported. Intervals are over variants, whose images share all nuanced attributes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits

from eval.counterfactuals import stage_bands
from fewshot_diti.backbone import load_backbone
from fewshot_diti.data import ImageGeometry, ImageSet, load_images
from fewshot_diti.data.images import as_picture
from fewshot_diti.encoding import Encoder
from fewshot_diti.files import write_atomically
from fewshot_diti.progress import Progress
from fewshot_diti.representation import Representation, probes
from fewshot_diti.representation.attributes import NUANCED, attributes_of, log_lengths, sky_colour
from recipes.pocket.captions import GENERIC_CAPTION, sky_name
from recipes.pocket.representation import PocketImages

PROMINENT = ("a light blue sky", "a dark blue sky", "a grey sky")
TASKS = ("winglets", "Boeing", "wide body")  # of few labels
CONTROL = "light sky"  # prominent, so that dropping large timesteps should lose it
RESAMPLES = 200  # of variants
SPLITS, SIBLINGS = ("train", "val", "test"), "siblings"


@dataclass(frozen=True, kw_only=True)
class Config(PocketImages):
    """What is measured.

    Attributes:
        dataset: the twelve variants, as `load_images` reads them, with the splits train, val and test.
        representations: folders.
        siblings: pre-training images of each of the 22 variants.
        shots: of few labels: images that have the attribute, and as many that have it not.
        draws: of these.
        log: gets the figures.
    """

    dataset: str
    representations: tuple[Path, ...] = ()
    backbone: str = "pocket"
    siblings: int = 60
    shots: tuple[int, ...] = (5, 10, 20, 50)
    draws: int = 10
    seed: int = 0
    log: Path = Path("docs/logs/attributes.json")


class Labelled:
    """Images of the backbone's size with all that is asked about them.

    Attributes:
        truth: attributes by name, 1.0, 0.0 or NaN, [N].
        numbers: by name, [N], NaN where unknown.
    """

    def __init__(self, pictures: Sequence[Image.Image], variants: Sequence[str], makers: Sequence[str]) -> None:
        self.pictures, self.variants = pictures, np.array(variants)
        pixels = [np.array(picture) for picture in pictures]
        skies = np.array([sky_name(torch.from_numpy(x).permute(2, 0, 1)) for x in pixels])
        colours_N3 = np.stack([sky_colour(x) for x in pixels])
        self.truth = attributes_of(variants, makers) | {name: (skies == name).astype(float) for name in PROMINENT}
        self.truth[CONTROL] = (colours_N3[:, 0] > np.median(colours_N3[:, 0])).astype(float)
        self.numbers = {"log length": log_lengths(variants), "sky L*": colours_N3[:, 0], "sky b*": colours_N3[:, 2]}

    @classmethod
    def of(cls, images: ImageSet, geometry: ImageGeometry) -> Labelled:
        """Of a split with the attribute manufacturer."""
        decoded = (images.decode(row) for row in range(len(images)))
        pictures = [as_picture(geometry.resized(image.rgb, image.name)) for image in decoded]
        return cls(pictures, images.label_names, images.attributes["manufacturer"])


Parts = Mapping[str, Labelled]  # by split, and SIBLINGS


def read(config: Config, geometry: ImageGeometry) -> dict[str, Labelled]:
    """The images of the twelve variants by split, and some of each sibling variant."""
    renders, _ = config.load(geometry.size)
    names = np.array(renders.variants)
    rows = [row for name in np.unique(names) for row in np.flatnonzero(names == name)[: config.siblings].tolist()]
    chosen = renders.subset(rows)
    siblings = Labelled([as_picture(x) for x in chosen.pixels_NCHW], chosen.variants, chosen.manufacturers)
    parts = {split: Labelled.of(load_images(config.dataset, split), geometry) for split in SPLITS}
    return {SIBLINGS: siblings, **parts}


def precision(features: probes.Features, parts: Parts, source: str, seed: int) -> dict[str, Any]:
    """Average precision of each attribute, their means, and 95 % intervals of these over variants."""
    scaled, test = probes.standardised(features, source), parts["test"]
    scores = {}
    for name in (*NUANCED, *PROMINENT):
        truth = {part: x.truth[name] for part, x in parts.items()}
        if {0.0, 1.0} <= set(truth[source].tolist()):
            scores[name] = probes.scores(scaled, truth, source)

    def of(rows: np.ndarray) -> dict[str, float]:
        each = {name: probes.average_precision(x[rows], test.truth[name][rows]) for name, x in scores.items()}
        return {name: value for name, value in each.items() if value is not None}

    found: dict[str, Any] = dict(of(np.arange(len(test.variants))))
    every, rng = np.unique(test.variants), np.random.default_rng(seed)
    places = {v: np.flatnonzero(test.variants == v) for v in every}
    resampled = [of(np.concatenate([places[v] for v in rng.choice(every, len(every))])) for _ in range(RESAMPLES)]
    for kind, names in (("nuanced", NUANCED), ("prominent", PROMINENT)):
        means = [float(np.mean([x[n] for n in names if n in x])) for x in (found, *resampled)]
        found |= {kind: means[0], f"{kind} interval": np.quantile(means[1:], (0.025, 0.975)).tolist()}
    return found


def few_labels(
    features: probes.Features, parts: Parts, bands: Mapping[str, slice], config: Config
) -> dict[str, list[float]]:
    """Balanced accuracies by draws, dimensions, attribute and shots: of all dimensions and of the band best on val."""
    scaled = probes.standardised({split: features[split] for split in SPLITS}, "train")
    found: dict[str, list[float]] = {}
    for name, sky in (("fair", None), ("biased", parts["train"].truth[CONTROL])):

        def accuracies(part: str, band: slice, task: str, k: int, sky: np.ndarray | None = sky) -> list[float]:
            cut = {split: values[:, band] for split, values in scaled.items()}
            truth = {split: parts[split].truth[task] for split in SPLITS}
            return probes.few_shot_accuracies(cut, truth, part, k, config.draws, seed=config.seed, confounder_N=sky)

        merits = {
            band: np.mean([accuracies("val", dims, task, k) for task in TASKS for k in config.shots])
            for band, dims in bands.items()
        }
        kept = {"all": slice(None)}
        if merits:
            best = max(merits, key=lambda band: merits[band])
            kept[best] = bands[best]
        for dims, band in kept.items():
            for task in (*TASKS, CONTROL) if sky is None else TASKS:  # the bias is the control
                for k in config.shots:
                    found[f"{name}, {dims}, {task}, {k}"] = accuracies("test", band, task, k)
    return found


def measure(
    parts: Parts,
    features_of: Callable[[Sequence[Image.Image]], np.ndarray],
    bands: Mapping[str, slice],
    config: Config,
) -> dict[str, Any]:
    """All figures of one kind of features."""
    features = {part: features_of(images.pictures) for part, images in parts.items()}
    scaled = probes.standardised(features, "train")
    numbers = {name: {part: x.numbers[name] for part, x in parts.items()} for name in parts["train"].numbers}
    with threadpool_limits(1):  # more threads are slower on products this small
        return {
            "precision": {source: precision(features, parts, source, config.seed) for source in ("train", SIBLINGS)},
            "few labels": few_labels(features, parts, bands, config),
            "regression": {name: probes.regression(scaled, truth) for name, truth in numbers.items()},
        }


def tables(found: Mapping[str, Mapping[str, Any]], config: Config) -> list[Table]:
    """Average precision, accuracy from few labels, and regression."""
    precise = Table("features", "fitted on", title="average precision, %")
    for column in (*NUANCED, "nuanced", *PROMINENT, "prominent"):
        precise.add_column(column)
    few = Table("features", "draws, dimensions, attribute", title="balanced accuracy, %")
    for k in config.shots:
        few.add_column(f"{k}")
    numbers = Table("features", "target", "r", "mean squared error")
    for row, figures in found.items():
        for source, cells in figures["precision"].items():
            columns = []
            for kind, names in (("nuanced", NUANCED), ("prominent", PROMINENT)):
                low, high = (100 * x for x in cells[f"{kind} interval"])
                columns += [f"{100 * cells[n]:.0f}" if n in cells else "" for n in names]
                columns.append(f"{100 * cells[kind]:.1f} [{low:.0f}, {high:.0f}]")
            precise.add_row(row, source, *columns)
        for what in dict.fromkeys(key.rsplit(", ", 1)[0] for key in figures["few labels"]):
            draws = [figures["few labels"][f"{what}, {k}"] for k in config.shots]
            few.add_row(row, what, *(f"{100 * np.mean(x):.1f} ± {100 * np.std(x):.1f}" for x in draws))
        for name, (r, error) in figures["regression"].items():
            numbers.add_row(row, name, f"{r:.3f}", f"{error:.3f}")
    return [precise, few, numbers]


def main(config: Config) -> None:
    """Measures, writes the log and prints the tables.

    Raises:
        OSError, ValueError: images, the backbone or a representation cannot be loaded.
    """
    backbone = load_backbone(config.backbone)
    geometry = ImageGeometry(size=backbone.image_size)
    encoder, parts = Encoder(backbone, geometry, GENERIC_CAPTION), read(config, geometry)

    def frozen(pictures: Sequence[Image.Image]) -> np.ndarray:
        latents = encoder.latents([encoder.prepare(picture) for picture in pictures])
        features: np.ndarray = encoder.features(latents).numpy()
        return features

    found = {}
    with Progress(1 + len(config.representations), "features", "row") as bar:
        found["frozen U-Net"] = measure(parts, frozen, {}, config)
        bar.update()
        for folder in config.representations:
            representation = Representation.from_pretrained(folder)
            tied = representation.method.subsets(representation.backbone) is not None
            name = folder.parent.name.removeprefix("representation-")
            bands = stage_bands(representation) if tied else {}
            found[name] = measure(parts, representation.features, bands, config)
            bar.update()
    write_atomically(config.log, (json.dumps(found, indent=1) + "\n").encode())
    for table in tables(found, config):
        Console(width=200).print(table)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
