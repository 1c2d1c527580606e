"""Curves over the timesteps: how much of the backbone's error do learned features save?

    python -m eval.denoising runs/representation-pdae/representation runs/representation-diti/representation --data DIR

`DIR` holds the pocket's pre-training images; measured are the four variants that nothing was trained on. For each
representation a JSON file holds, by variant and timestep, the denoising error e with its features and that of the
backbone alone; of DiTi also with each stage of its features zeroed. Files that are there are kept. The plot shows the
backbone's loss as PDAE weights it, the posterior-mean gap, and the share of the error that the features save,
1 - e_z / e_theta.

Shapes in names: N images, D width of the feature, S timesteps, V variants.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

from eval.counterfactuals import stage_bands
from fewshot_diti import plots
from fewshot_diti.bank_files import bank_fingerprint, to_json
from fewshot_diti.files import write_atomically
from fewshot_diti.progress import Progress
from fewshot_diti.representation import Representation
from fewshot_diti.representation.estimator import frozen_pass
from fewshot_diti.representation.methods import to_dict
from fewshot_diti.representation.objectives import denoising_error, posterior_mean_gap
from fewshot_diti.representation.sampling import exchanged
from fewshot_diti.timesteps import pdae_weights
from recipes.pocket.representation import PocketImages

BACKBONE = "backbone"
COLOURS = (plots.BLUE, plots.VERMILION, plots.GREEN, plots.ORANGE)


@dataclass(frozen=True, kw_only=True)
class Config(PocketImages):
    """What is measured.

    Attributes:
        representations: folders.
        output_dir: gets a JSON file for each, and the plot.
        images: of each variant.
        timesteps: how many, closer to each other at small t.
    """

    representations: Annotated[tuple[Path, ...], tyro.conf.Positional]
    output_dir: Path = Path("results/representation")
    images: int = 32
    timesteps: int = 20
    seed: int = 0


def grid(count: int, num_timesteps: int) -> list[int]:
    """Timesteps at the squares of evenly spaced numbers: half of them lie in the lower quarter."""
    return [int(num_timesteps * ((k + 0.5) / count) ** 2) for k in range(count)]


def errors(
    representation: Representation, means: Tensor, x_0: Tensor, noise: Tensor, timesteps: Sequence[int]
) -> dict[str, np.ndarray]:
    """Denoising error [N, S]: of the backbone, with the features, and of DiTi with each stage of them set to zero.

    Args:
        means, x_0: the VAE's means, and the samples of its posterior that get the noise.
    """
    z = representation.encode(means)
    features = {"features": z}
    if representation.method.subsets(representation.backbone) is not None:
        bands = stage_bands(representation).items()
        features |= {f"without {name}": exchanged(z, torch.zeros_like(z), band) for name, band in bands}
    found: dict[str, list[np.ndarray]] = {}
    backbone = representation.backbone
    x_0, noise = x_0.to(backbone.device), noise.to(backbone.device)
    for t in timesteps:
        times = torch.full((len(x_0),), t, device=backbone.device)
        frozen = frozen_pass(backbone, backbone.add_noise(x_0, noise, times), times, representation.text_1LW)
        predicted = {name: representation.predict_from(frozen, times, z) for name, z in features.items()}
        for name, each in ({BACKBONE: frozen.noise_Bchw} | predicted).items():
            found.setdefault(name, []).append(denoising_error(each, noise).cpu().numpy())
    return {name: np.stack(columns, 1) for name, columns in found.items()}


def measure(representation: Representation, config: Config) -> dict[str, Any]:
    """What the JSON file holds: `errors` averaged over the images of each variant."""
    backbone = representation.backbone
    unseen = config.load_held_out(backbone.image_size)
    latents = config.encode(backbone, unseen, "held-out")
    timesteps = grid(config.timesteps, backbone.num_train_timesteps)
    curves: dict[str, dict[str, list[float]]] = {}
    names = sorted(set(unseen.variants))
    with Progress(len(names), "errors", "variant") as bar:
        for name in names:
            of_variant = torch.tensor([i for i, v in enumerate(unseen.variants) if v == name])
            rows = of_variant[:: -(-len(of_variant) // config.images)]
            g = torch.Generator().manual_seed(config.seed)
            means, x_0 = latents.draw(rows, g)
            noise = torch.randn(x_0.shape, generator=g)
            found = errors(representation, means, x_0, noise, timesteps)
            curves[name] = {what: values.mean(0).tolist() for what, values in found.items()}
            bar.update()
    abar_T = backbone.alphas_cumprod
    return {
        "method": to_dict(representation.method),
        "history": representation.history,
        "timesteps": timesteps,
        "loss_weights": pdae_weights(abar_T)[timesteps].tolist(),
        "gap_weights": posterior_mean_gap(torch.ones_like(abar_T), abar_T)[timesteps].tolist(),
        "errors": curves,
    }


def mean_curves(record: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Errors [V, S] by what the U-Net was given."""
    of_variants = list(record["errors"].values())
    return {what: np.array([curves[what] for curves in of_variants]) for what in of_variants[0]}


def saved(curves: Mapping[str, np.ndarray], what: str = "features") -> np.ndarray:
    """Share of the backbone's error that is saved, [V, S]."""
    share: np.ndarray = 1 - curves[what] / curves[BACKBONE]
    return share


def plot(records: Mapping[str, Mapping[str, Any]]) -> bytes:
    """PNG: loss and gap of the backbone and with features, and the share saved; bands span the variants."""
    figure = Figure(figsize=(14, 4), dpi=130, layout="constrained")
    loss, gap, share = figure.subplots(1, 3)
    ends: dict[Axes, list[plots.End]] = {loss: [], gap: [], share: []}
    first = next(iter(records.values()))
    lines = [("backbone alone", first, BACKBONE, plots.BLACK)]
    lines += [(name, r, "features", c) for (name, r), c in zip(records.items(), COLOURS, strict=False)]
    for name, record, what, colour in lines:
        times, curves = np.array(record["timesteps"]), mean_curves(record)
        values = {
            axes: np.array(record[key]) * curves[what] for axes, key in ((loss, "loss_weights"), (gap, "gap_weights"))
        }
        if what != BACKBONE:
            values[share] = 100 * saved(curves)
        for axes, values_VS in values.items():
            ends[axes].append(_curve(axes, times, values_VS, name, colour))
    loss.set_title("error as PDAE weights it", fontsize=10)
    gap.set_title("posterior-mean gap", fontsize=10)
    gap.set_yscale("log")
    share.set_title("error of the backbone that the features save (%)", fontsize=10)
    share.axhline(0, color=plots.BLACK, lw=0.8)
    for axes, its_ends in ends.items():
        axes.set_xlabel("timestep t")
        plots.tidy(axes)
        plots.label_ends(axes, its_ends)
    return plots.png(figure)


def _curve(axes: Axes, times: np.ndarray, values_VS: np.ndarray, label: str, colour: str) -> plots.End:
    """Draws the mean over variants with the span of the variants; the end of the line, for its label."""
    mean = values_VS.mean(0)
    axes.plot(times, mean, color=colour, lw=2)
    axes.fill_between(times, values_VS.min(0), values_VS.max(0), color=colour, alpha=0.12, lw=0)
    return plots.End(float(times[-1]), float(mean[-1]), label, colour)


def table(records: Mapping[str, Mapping[str, Any]]) -> Table:
    """Share of the backbone's error that is saved, by timestep."""
    shown = Table(
        "features",
        *(f"{t}" for t in next(iter(records.values()))["timesteps"][::3]),
        title="share of the backbone's error saved, in %",
    )
    for name, record in records.items():
        curves = mean_curves(record)
        for what in list(curves)[1:]:
            label = name if what == "features" else f"{name} {what}"
            shown.add_row(label, *(f"{100 * x:.1f}" for x in saved(curves, what).mean(0)[::3]))
    return shown


def main(config: Config) -> None:
    """Measures what is not there yet, writes the plot and prints the table.

    Raises:
        OSError, ValueError: a representation or the images cannot be loaded.
    """
    records: dict[str, dict[str, Any]] = {}
    for folder in config.representations:
        settings = f"{config.images}x{config.timesteps}-{config.seed}"
        path = config.output_dir / f"curves-{bank_fingerprint(folder)}-{settings}.json"
        if not path.is_file():
            write_atomically(path, to_json(measure(Representation.from_pretrained(folder), config)))
        records[folder.parent.name.removeprefix("representation-")] = json.loads(path.read_text())
    picture = config.output_dir / "curves.png"
    write_atomically(picture, plot(records))
    Console().print(table(records))
    print(f"wrote {picture}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
