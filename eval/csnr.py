"""Which timestep makes the best features? Probes of all blocks, and the class signal-to-noise ratio of restorations.

    python -m eval.csnr --dataset fgvc:DIR

Images go through the U-Net at ten timesteps, without noise and with it. Measured at each are logistic regression on the
features of every block (Xiang et al., DDAE, ICCV 2023) and on the one-step restoration, and the restoration's class
signal-to-noise ratio (CSNR; Li et al., NeurIPS 2025): its energy inside the subspace of its class, the first singular
vectors of the class's training latents, over that outside. There are three sets of classes: the variant, the kind of
aircraft, and the sky. Heads and subspaces come from the split train, choices from val, reported figures from test.

Shapes in names: N images, C classes, n values of a latent.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from eval.noise import restored
from fewshot_diti import plots
from fewshot_diti.backbone import load_backbone
from fewshot_diti.data import ImageGeometry, ImageSet, load_images
from fewshot_diti.encoding import Encoder
from fewshot_diti.features import block_features, chosen_block, named_blocks
from fewshot_diti.files import write_atomically
from fewshot_diti.progress import Progress
from fewshot_diti.representation.molrg import csnr, is_unimodal, subspace
from recipes.pocket.captions import GENERIC_CAPTION, sky_name

SPLITS = ("train", "val", "test")
KINDS = {"747-8": "four engines", "A340-300": "four engines", "ATR-72": "propellers", "CRJ-700": "engines at the rear"}
INPUTS = ("clean", "noisy")
LOOK = {"variant": plots.BLUE, "kind": plots.GREEN, "sky": plots.ORANGE}
RESTORED = "restoration"


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is measured.

    Attributes:
        dataset: as `load_images` reads it, with the splits train, val and test.
        timesteps: as shares of the schedule.
        rank: singular vectors of a class, fewer where it has fewer images.
        strength: C of the logistic regressions.
        output: the picture.
        log: gets the figures.
    """

    dataset: str
    backbone: str = "pocket"
    timesteps: tuple[float, ...] = (0.01, 0.03, 0.06, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)
    rank: int = 20
    strength: float = 0.1
    batch_size: int = 32
    seed: int = 0
    output: Path = Path("docs/csnr.png")
    log: Path = Path("docs/logs/csnr.json")


class Reader:
    """The images of all splits as latents, with their classes in each sense, and what the U-Net makes of them."""

    def __init__(self, encoder: Encoder, splits: Sequence[ImageSet], config: Config) -> None:
        self.encoder, self.config = encoder, config
        prepared = [[encoder.prepare(images.decode(row)) for row in range(len(images))] for images in splits]
        self.sizes = [len(images) for images in splits]
        with Progress(len(splits), "latents", "split") as bar:
            parts = []
            for images in prepared:
                parts.append(encoder.latents(images))
                bar.update()
        self.latents_Nchw = torch.cat(parts)
        self.noise_Nchw = torch.randn(self.latents_Nchw.shape, generator=torch.Generator().manual_seed(config.seed))
        variants = [name for images in splits for name in images.label_names]
        classes = {
            "variant": _places(variants),
            "kind": _places([KINDS.get(name, "two engines under the wings") for name in variants]),
            "sky": _places([sky_name(image.pixels_CHW) for images in prepared for image in images]),
        }
        self.classes = {name: rows for name, rows in classes.items() if len(np.unique(self.split(rows)[0])) > 1}

    def split(self, rows_N: np.ndarray) -> list[np.ndarray]:
        """Rows of train, val and test."""
        return np.split(rows_N, np.cumsum(self.sizes)[:-1])

    def read(self, share: float, noisy: bool) -> dict[str, np.ndarray]:
        """Of all images [N, D]: each block's features, averaged over positions, and the restoration."""
        backbone = self.encoder.backbone
        text = backbone.encode_text(backbone.tokenize([self.encoder.generic_prompt]))
        t = round(share * backbone.num_train_timesteps)
        blocks, size, found = named_blocks(backbone), self.config.batch_size, []
        for latents, noise in zip(self.latents_Nchw.split(size), self.noise_Nchw.split(size), strict=True):
            noise = noise * noisy
            parts = block_features(
                backbone, latents, text, noise_Bchw=noise, timestep=share, blocks=blocks, positions=(1, 1)
            )
            found.append([*parts, restored(self.encoder, latents, noise, t)[1].flatten(1)])
        columns = [torch.cat(column).numpy() for column in zip(*found, strict=True)]
        return dict(zip([*blocks, RESTORED], columns, strict=True))


def probe(features_ND: np.ndarray, labels_N: np.ndarray, reader: Reader) -> tuple[float, float]:
    """Share of val and of test images that logistic regression on the training images' features classifies right."""
    head = make_pipeline(StandardScaler(), PCA(), LogisticRegression(C=reader.config.strength, max_iter=1000))
    features, labels = reader.split(features_ND), reader.split(labels_N)
    with threadpool_limits(1):  # more threads are slower on products this small
        head.fit(features[0], labels[0])
        val, test = (float(head.score(f, y)) for f, y in zip(features[1:], labels[1:], strict=True))
    return val, test


def class_ratio(restored_Nn: np.ndarray, labels_N: np.ndarray, reader: Reader) -> float:
    """CSNR of the val images' restorations, around the mean of the training latents, for the classes that val has."""
    train, _, _ = reader.split(reader.latents_Nchw.flatten(1).double().numpy())
    centre, labels = train.mean(0), reader.split(labels_N)
    present = [int(c) for c in np.unique(labels[1]) if (labels[0] == c).sum() > 1]
    counted = np.isin(labels[1], present)
    bases = [subspace(x, min(reader.config.rank, len(x))) for x in (train[labels[0] == c] - centre for c in present)]
    found = reader.split(restored_Nn)[1][counted].astype(np.float64) - centre
    return csnr(found, np.searchsorted(present, labels[1][counted]), bases)


def measure(reader: Reader) -> dict[str, Any]:
    """Accuracy on val and test by set of classes, input, block and timestep; CSNR by set of classes and input."""
    timesteps = reader.config.timesteps
    found: dict[str, Any] = {"timesteps": timesteps, "accuracy": {}, "csnr": {}}
    with Progress(len(timesteps) * len(INPUTS), "timesteps", "pass") as bar:
        for share in timesteps:
            for name in INPUTS:
                read = reader.read(share, name == "noisy")
                for classes, labels_N in reader.classes.items():
                    for block, features in read.items():
                        cells = found["accuracy"].setdefault(classes, {}).setdefault(name, {}).setdefault(block, [])
                        cells.append(probe(features, labels_N, reader))
                    ratio = class_ratio(read[RESTORED], labels_N, reader)
                    found["csnr"].setdefault(classes, {}).setdefault(name, []).append(ratio)
                bar.update()
    found["counts"] = {name: np.bincount(labels).tolist() for name, labels in reader.classes.items()}
    found["features block"] = chosen_block(reader.encoder.backbone)[0]
    return found


def best(found: dict[str, Any], classes: str) -> tuple[str, str, int]:
    """Input, block and place of the timestep with the highest accuracy on val; the first of equals."""
    cells = found["accuracy"][classes]
    return max(
        ((name, block, place) for name in cells for block in cells[name] for place in range(len(found["timesteps"]))),
        key=lambda cell: cells[cell[0]][cell[1]][cell[2]][0],
    )


def draw(found: dict[str, Any]) -> bytes:
    """PNG: by timestep the CSNR as a share of its peak, and the accuracy of the best block and of the restoration."""
    figure = Figure(figsize=(13, 6.5), dpi=130, layout="constrained")
    axes_22 = figure.subplots(2, 2, sharex=True)
    for (ratios, accuracies), name in zip(axes_22.T, INPUTS, strict=True):
        ends: dict[Any, list[plots.End]] = {ratios: [], accuracies: []}
        for classes, colour in ((name, LOOK[name]) for name in found["csnr"]):
            values = np.array(found["csnr"][classes][name])
            ratios.plot(found["timesteps"], values / values.max(), "o-", color=colour, lw=2, ms=4)
            ends[ratios].append(plots.End(found["timesteps"][-1], values[-1] / values.max(), classes, colour))
            cells = found["accuracy"][classes][name]
            block = max(cells, key=lambda b: max(val for val, _ in cells[b]))
            for shown, style in ((block, "o-"), (RESTORED, "o:")):
                test = 100 * np.array(cells[shown])[:, 1]
                accuracies.plot(found["timesteps"], test, style, color=colour, lw=2, ms=4)
                ends[accuracies].append(plots.End(found["timesteps"][-1], test[-1], f"{classes}, {shown}", colour))
        ratios.set_title(f"{name} images", fontsize=10)
        ratios.set_ylabel("CSNR, share of its peak")
        accuracies.set_ylabel("accuracy of a probe (%)")
        accuracies.set_xlabel("timestep, share of the schedule")
        for axes, its_ends in ends.items():
            axes.set_xscale("log")
            plots.tidy(axes)
            plots.label_ends(axes, its_ends)
    return plots.png(figure)


def table(found: dict[str, Any]) -> Table:
    """Where accuracy and CSNR peak."""
    columns = (
        "images",
        "block",
        "best at",
        "test accuracy",
        "one peak",
        "CSNR best at",
        "one peak",
        "rank correlation",
    )
    shown = Table("classes", *columns)
    shares = found["timesteps"]
    for classes in found["csnr"]:
        rows = {"best on val": best(found, classes)[:2]}
        rows |= {f"{found['features block']}, {name}": (name, found["features block"]) for name in INPUTS}
        rows |= {f"{RESTORED}, {name}": (name, RESTORED) for name in INPUTS}
        for what, (name, block) in rows.items():
            cells = np.array(found["accuracy"][classes][name][block])
            ratios, place = found["csnr"][classes][name], int(cells[:, 0].argmax())
            shown.add_row(
                classes,
                name,
                f"{block} ({what})" if what.startswith("best") else block,
                f"{shares[place]:.2f}",
                f"{100 * cells[place, 1]:.1f} %",
                "yes" if is_unimodal(cells[:, 0]) else "no",
                f"{shares[int(np.argmax(ratios))]:.2f}",
                "yes" if is_unimodal(ratios) else "no",
                f"{spearmanr(cells[:, 0], ratios).statistic:.2f}" if np.ptp(cells[:, 0]) else "",
            )
    return shown


def main(config: Config) -> None:
    """Measures, writes log and picture, prints the table.

    Raises:
        OSError, ValueError: the images or the backbone cannot be loaded.
    """
    backbone = load_backbone(config.backbone)
    encoder = Encoder(backbone, ImageGeometry(size=backbone.image_size), GENERIC_CAPTION)
    found = measure(Reader(encoder, [load_images(config.dataset, split) for split in SPLITS], config))
    write_atomically(config.log, (json.dumps(found, indent=1) + "\n").encode())
    write_atomically(config.output, draw(found))
    Console(width=160).print(table(found))


def _places(names: Sequence[str]) -> np.ndarray:
    """Each name's place among the sorted ones, int64 [N]."""
    return np.unique(names, return_inverse=True)[1]


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
