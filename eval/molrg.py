"""Why a middle noise level separates classes best: denoisers of a mixture of low-rank Gaussians.

    python -m eval.molrg --output docs/molrg.png

Where the best denoiser is known, networks can be compared with it: one network for all noise levels, as diffusion
trains it, a network for each level, and networks that were trained on few images. Drawn is the class signal-to-noise
ratio of what they make of clean images (see fewshot_diti.representation.molrg); printed are the networks' excess errors
over the best denoiser's, and how many samples of the networks trained on few images are copies of these.

Shapes in names: N images, n dimensions, S noise levels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fewshot_diti import plots
from fewshot_diti.files import write_atomically
from fewshot_diti.progress import Progress
from fewshot_diti.representation.molrg import LowRankMixture, csnr, is_unimodal, memorising_denoiser

Images = Callable[[int], Tensor]  # so many images to learn from, [N, n]
TWO_NEAREST = 1 / 3  # a sample is a copy where the nearest image is nearer than this share of the second nearest


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is trained.

    Attributes:
        dims: of each class's subspace, of three classes.
        levels: noise levels, from 0.02 to 10.
        steps: of each network for one level; the one for all levels gets as many as all of these together.
        batch_size: images per step.
        few: numbers of images that networks for all levels are trained on.
        images: that the ratio and errors are measured on.
        samples: made by each network that was trained on few images.
        log: gets the figures.
    """

    dims: int = 10
    delta: float = 0.2
    levels: int = 12
    steps: int = 3_000
    batch_size: int = 256
    few: tuple[int, ...] = (32, 256, 4_096)
    images: int = 20_000
    samples: int = 500
    seed: int = 0
    output: Path = Path("docs/molrg.png")
    log: Path = Path("docs/logs/molrg.json")

    @property
    def mixture(self) -> LowRankMixture:
        return LowRankMixture(dims=self.dims, delta=self.delta, seed=self.seed)

    @property
    def sigmas(self) -> list[float]:
        levels: list[float] = np.geomspace(0.02, 10, self.levels).tolist()
        return levels


class Denoiser(nn.Module):
    """Three linear layers that read a noised image and the logarithm of its level, with the scales of Karras et al.
    (EDM, table 1) for images of standard deviation `spread`. With SiLU for ReLU they stay linear for 8,000 steps."""

    def __init__(self, n: int, spread: float, width: int = 256) -> None:
        super().__init__()
        self.spread = spread
        self.layers = nn.Sequential(
            nn.Linear(n + 1, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, n)
        )

    def forward(self, x_Nn: Tensor, sigma_N: Tensor) -> Tensor:
        whole = (self.spread**2 + sigma_N[:, None] ** 2).sqrt()
        found: Tensor = self.layers(torch.cat([x_Nn / whole, sigma_N.log()[:, None] / 4], 1))
        return (self.spread / whole) ** 2 * x_Nn + self.out_scale(sigma_N) * found

    def out_scale(self, sigma_N: Tensor) -> Tensor:
        """What the layers' output is multiplied by, [N, 1]; the loss is divided by its square."""
        sigma = sigma_N[:, None]
        return sigma * self.spread / (self.spread**2 + sigma**2).sqrt()

    @torch.no_grad()
    def denoise(self, x_Nn: np.ndarray, sigma: float) -> np.ndarray:
        """As `LowRankMixture.denoise`."""
        x = torch.from_numpy(x_Nn).float()
        found: np.ndarray = self(x, torch.full((len(x),), float(sigma))).double().numpy()
        return found


def trained(images: Images, sigmas: Sequence[float], steps: int, config: Config) -> Denoiser:
    """A network that restores such images from noise of these levels, drawn evenly."""
    torch.manual_seed(config.seed)
    first = images(1_000)
    network = Denoiser(first.shape[1], float(first.std()))
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    levels = torch.tensor(sigmas, dtype=torch.float32)
    for _ in range(steps):
        x_0 = images(config.batch_size)
        sigma = levels[torch.randint(len(levels), (len(x_0),))]
        restored = network(x_0 + sigma[:, None] * torch.randn_like(x_0), sigma)
        loss = ((restored - x_0) / network.out_scale(sigma)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network


@torch.no_grad()
def sampled(network: Denoiser, n: int, samples: int, sigmas: Sequence[float]) -> np.ndarray:
    """Samples [N, n] by Euler steps down the levels (Karras et al., EDM, algorithm 1 without its second order)."""
    x = sigmas[0] * torch.randn(samples, n)
    for sigma, next_sigma in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        found = network(x, torch.full((samples,), float(sigma)))
        x = found + next_sigma / sigma * (x - found)
    return x.double().numpy()


def copied(samples_Nn: np.ndarray, images_Mn: np.ndarray) -> float:
    """Share of samples whose nearest image is nearer than a third of the second nearest."""
    distances = np.sort(np.linalg.norm(samples_Nn[:, None] - images_Mn, axis=2), axis=1)
    return float((distances[:, 0] < TWO_NEAREST * distances[:, 1]).mean())


def measure(config: Config) -> dict[str, Any]:
    """CSNR of each denoiser by level, errors over the best denoiser's, and shares of copies."""
    mixture, sigmas = config.mixture, config.sigmas
    rng = np.random.default_rng(config.seed)
    x_0, labels = mixture.draw(config.images, rng)
    noised = [x_0 + sigma * rng.normal(size=x_0.shape) for sigma in sigmas]
    n = x_0.shape[1]

    def fresh(count: int) -> Tensor:
        return torch.from_numpy(mixture.draw(count, rng)[0]).float()

    denoisers: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
        "best denoiser": lambda x, s: mixture.denoise(x, sigmas[s])
    }
    copies: dict[str, float] = {}
    with Progress(config.levels + 1 + len(config.few), "networks", "network") as bar:
        each = []
        for sigma in sigmas:
            each.append(trained(fresh, [sigma], config.steps, config))
            bar.update()
        denoisers["a network per level"] = lambda x, s: each[s].denoise(x, sigmas[s])
        whole = trained(fresh, sigmas, config.steps * config.levels, config)
        denoisers["one network for all levels"] = lambda x, s: whole.denoise(x, sigmas[s])
        bar.update()
        for count in config.few:
            few = mixture.draw(count, rng)[0]
            known = torch.from_numpy(few).float()

            def again(size: int, known: Tensor = known) -> Tensor:
                return known[torch.randint(len(known), (size,))]

            network = trained(again, sigmas, config.steps * config.levels, config)
            name = f"one network, {count:,} images"
            denoisers[name] = lambda x, s, network=network: network.denoise(x, sigmas[s])  # type: ignore[misc]
            copies[name] = copied(sampled(network, n, config.samples, np.geomspace(10, 0.02, 60).tolist()), few)
            if count == min(config.few):
                denoisers[f"these {count} images and no others"] = (
                    lambda x, s, few=few: memorising_denoiser(x, few, sigmas[s])  # type: ignore[misc]
                )
            bar.update()

    found: dict[str, Any] = {"sigmas": sigmas, "copies": copies, "csnr": {}, "excess": {}}
    found["csnr"]["closed form"] = [mixture.closed_form(sigma) for sigma in sigmas]
    best = [mixture.denoise(x, sigma) for x, sigma in zip(noised, sigmas, strict=True)]
    for name, denoise in denoisers.items():
        found["csnr"][name] = [csnr(denoise(x_0, s), labels, mixture.subspaces_Knd) for s in range(config.levels)]
        found["excess"][name] = [
            float(((denoise(x, s) - best[s]) ** 2).sum() / ((best[s] - x_0) ** 2).sum()) for s, x in enumerate(noised)
        ]
    return found


def draw(found: dict[str, Any]) -> bytes:
    """PNG: the ratios by level, of networks with all the images that they want, and with few."""
    figure = Figure(figsize=(13, 4.2), dpi=130, layout="constrained")
    wanted, few = figure.subplots(1, 2, sharey=True)
    colours = dict(zip(found["csnr"], (plots.GREY, plots.BLACK, plots.GREEN, plots.BLUE), strict=False))
    scarce = [name for name in found["csnr"] if "images" in name]
    colours |= dict(zip(scarce, (plots.VERMILION, plots.PALE, plots.ORANGE, plots.SKY), strict=False))
    ends: dict[Any, list[plots.End]] = {wanted: [], few: []}
    for name, values in found["csnr"].items():
        for axes in ends:
            if name == "best denoiser" or (axes is few) == (name in scarce):
                axes.plot(found["sigmas"], values, "--" if name == "closed form" else "-", color=colours[name], lw=2)
                ends[axes].append(plots.End(found["sigmas"][-1], values[-1], name, colours[name]))
    wanted.set_title("networks that saw new images in every step", fontsize=10)
    few.set_title("networks that saw few images again and again", fontsize=10)
    wanted.set_ylabel("energy inside the class's subspace / outside")
    for axes, its_ends in ends.items():
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("noise level sigma of the denoiser, which reads clean images")
        plots.tidy(axes)
        plots.label_ends(axes, its_ends)
    return plots.png(figure)


def table(found: dict[str, Any]) -> Table:
    """The peak of each curve, and errors above the best denoiser's."""
    shown = Table("denoiser", "peak", "at sigma", "one peak", "excess error, small sigma", "middle", "large", "copies")
    sigmas = np.array(found["sigmas"])
    thirds = np.array_split(np.arange(len(sigmas)), 3)
    for name, values in found["csnr"].items():
        place = int(np.argmax(values))
        excess = found["excess"].get(name)
        means = ["" if excess is None else f"{100 * np.mean(np.array(excess)[part]):.1f} %" for part in thirds]
        copies = f"{100 * found['copies'][name]:.0f} %" if name in found["copies"] else ""
        one = "yes" if is_unimodal(values) else "no"
        shown.add_row(name, f"{values[place]:.0f}", f"{sigmas[place]:.2f}", one, *means, copies)
    return shown


def main(config: Config) -> None:
    """Trains, writes log and picture, prints the table."""
    found = measure(config)
    write_atomically(config.log, (json.dumps(found, indent=1) + "\n").encode())
    write_atomically(config.output, draw(found))
    Console(width=160).print(table(found))


if __name__ == "__main__":
    main(tyro.cli(Config))
