"""What noise destroys at which timestep: an image noised and restored, and what a probe still reads from restorations.

    python -m eval.noise --output docs/noise.png

Each bundled image is noised to timestep t and restored in one step by the frozen backbone with the generic prompt.
Logistic regression on an ImageNet network's features then tells the variant apart, on airlines that it was not fitted
on, and the airline, on variants that it was not fitted on. It is fitted anew on the restorations of each timestep, so
that it loses what the restorations lack and not what looks unusual.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.preprocessing import normalize
from torch import Tensor

from fewshot_diti import plots
from fewshot_diti.backbone import Backbone
from fewshot_diti.baselines.imagenet import ImageNetwork
from fewshot_diti.data import ImageGeometry
from fewshot_diti.data.sources import load_bundled
from fewshot_diti.encoding import Encoder, PreparedImage
from fewshot_diti.files import write_atomically
from fewshot_diti.progress import Progress
from fewshot_diti.reports import bootstrap_interval
from fewshot_diti.trials import trial_noise

Figures: TypeAlias = dict[str, list[dict[str, float]]]  # of each probe, by timestep


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What is drawn and measured.

    Attributes:
        timesteps: at which images are noised.
        example: position of the pictured image in the test split.
        least: images that an airline has of each of two variants or more, to be told apart.
        every: of the images of other airlines, every so many-th is taken.
        log: gets the figures of the curve.
    """

    backbone: str = "pocket"
    timesteps: tuple[int, ...] = (100, 300, 500, 700, 900)
    example: int = 122
    least: int = 4
    every: int = 4
    seed: int = 0
    output: Path = Path("docs/noise.png")
    log: Path = Path("docs/logs/noise.json")


@torch.no_grad()
def restored(encoder: Encoder, latents_Bchw: Tensor, noise_Bchw: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """The noised latents and the one-step estimate of x_0 from them (Ho et al., DDPM, eq. 15), [B, c, h, w] each."""
    backbone, times = encoder.backbone, torch.full((len(latents_Bchw),), t)
    noisy = backbone.add_noise(latents_Bchw, noise_Bchw, times)
    text = backbone.encode_text(backbone.tokenize([encoder.generic_prompt])).expand(len(noisy), -1, -1)
    inputs = noisy.to(backbone.device, backbone.dtype), times.to(backbone.device)
    found = backbone.unet(*inputs, text).sample.float().cpu()
    signal, sigma = (float(x) ** 0.5 for x in (backbone.alphas_cumprod[t], 1 - backbone.alphas_cumprod[t]))
    if backbone.prediction_type == "epsilon":
        return noisy, (noisy - sigma * found) / signal
    return noisy, signal * noisy - sigma * found


def right(features_ND: np.ndarray, truth: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Whether each image is told apart by a probe that was fitted on other groups, bool [N]."""
    probe = LogisticRegression(C=10.0, max_iter=1000)
    found = cross_val_predict(probe, normalize(features_ND), truth, groups=groups, cv=GroupKFold(4))
    return found == truth


def main(config: Noise) -> None:
    """Measures, prints the figures, and draws them below the pictures."""
    backbone = Backbone.from_pretrained(config.backbone)
    encoder = Encoder(backbone, ImageGeometry(size=backbone.image_size), "a photo of an aircraft")
    figures = measure(encoder, config)
    write_atomically(config.log, (json.dumps(figures, indent=1) + "\n").encode())
    example = encoder.prepare(load_bundled("test").names[config.example])
    write_atomically(config.output, draw(encoder, example, config, figures))


def measure(encoder: Encoder, config: Noise) -> Figures:
    """The accuracy of both probes at each timestep, 0 to 1, with 95 % intervals; t = 0 is the latent without noise."""
    splits = [load_bundled(split) for split in ("train", "test")]
    airlines, variants, names = (
        np.array([value for split in splits for value in column(split)])
        for column in (lambda x: x.attributes["airline"], lambda x: x.label_names, lambda x: x.names)
    )
    counts = Counter(zip(airlines.tolist(), variants.tolist(), strict=True))
    enough = Counter(airline for (airline, _), count in counts.items() if airline and count >= config.least)
    shared = np.array(
        [enough[a] >= 2 and counts[a, v] >= config.least for a, v in zip(airlines, variants, strict=True)]
    )
    used = shared | (np.arange(len(names)) % config.every == 0)
    airlines, variants, names, shared = airlines[used], variants[used], names[used], shared[used]
    tasks = {
        "variant": (np.arange(len(variants)), variants, airlines),
        "airline": (np.flatnonzero(shared), airlines, variants),
    }
    for what, (rows, truth, _) in tasks.items():
        most = Counter(truth[rows]).most_common(1)[0][1]
        print(f"{what}: {len(set(truth[rows]))} classes, {len(rows)} images, {100 * most / len(rows):.1f} % of one")
    network = ImageNetwork(size=(128, 256))
    prepared = [encoder.prepare(name) for name in names.tolist()]
    latents = encoder.latents(prepared)
    figures: Figures = {what: [] for what in tasks}
    with Progress((1 + len(config.timesteps)) * len(latents), "restorations", "image") as bar:
        for place, t in enumerate((0, *config.timesteps)):
            parts = []
            for some in torch.arange(len(latents)).split(32):
                ids = [prepared[i].id for i in some.tolist()]
                noise = torch.cat([trial_noise(config.seed, x, [place], tuple(latents.shape[1:])) for x in ids])
                seen = restored(encoder, latents[some], noise, t)[1] if t else latents[some]
                parts.append(network.features(encoder.backbone.decode_latents(seen)))
                bar.update(len(some))
            features_ND = np.concatenate(parts)
            for what, (rows, truth, groups) in tasks.items():
                correct = right(features_ND[rows], truth[rows], groups[rows])
                low, high = bootstrap_interval(correct, groups[rows].tolist())
                figures[what].append({"t": t, "accuracy": float(correct.mean()), "low": low, "high": high})
                print(f"t = {t}: {what} {100 * correct.mean():.1f} % [{100 * low:.0f}, {100 * high:.0f}]")
    return figures


def draw(encoder: Encoder, example: PreparedImage, config: Noise, figures: Figures) -> bytes:
    """Pictures above, the curve below, as PNG."""
    latents = encoder.latents([example])
    noise = trial_noise(config.seed, example.id, [0], tuple(latents.shape[1:]))
    pairs = {f"t = {t}": restored(encoder, latents, noise, t) for t in config.timesteps}
    columns = {"the image": (latents, latents)} | pairs
    figure = Figure(figsize=(10, 5.6), dpi=120, layout="constrained")
    places: list[Any] = [[f"{row} {title}" for title in columns] for row in ("noised", "restored")]
    grid = figure.subplot_mosaic([*places, ["curve"] * len(columns)], height_ratios=(1, 1, 4))
    for title, pair in columns.items():
        for row, seen in zip(("noised", "restored"), pair, strict=True):
            show(grid[f"{row} {title}"], encoder.backbone.decode_latents(seen)[0])
        grid[f"noised {title}"].set_title(title, fontsize=9)
    for row in ("noised", "restored"):
        grid[f"{row} the image"].set_ylabel(row, fontsize=9)
    curve(grid["curve"], figures)
    return plots.png(figure)


def show(axes: Axes, image: Image.Image) -> None:
    """An image without ticks."""
    axes.imshow(image)
    axes.set(xticks=[], yticks=[])


def curve(axes: Axes, figures: Figures) -> None:
    """Accuracy of the probes over t, with 95 % intervals."""
    ends = []
    for (what, points), colour in zip(figures.items(), (plots.BLUE, plots.VERMILION), strict=True):
        t, middle, low, high = (np.array([p[key] for p in points]) for key in ("t", "accuracy", "low", "high"))
        axes.plot(t, 100 * middle, color=colour, marker="o", markersize=4)
        axes.fill_between(t, 100 * low, 100 * high, color=colour, alpha=0.15, lw=0)
        new = "airlines" if what == "variant" else "variants"
        ends.append(plots.End(t[-1], 100 * middle[-1], f"the {what},\non new {new}", colour))
    axes.set(xlabel="timestep t to which the image was noised", ylabel="accuracy of a probe on restorations, %")
    axes.set_ylim(bottom=0)
    plots.tidy(axes)
    plots.label_ends(axes, ends, lines=2)


if __name__ == "__main__":
    main(tyro.cli(Noise))
