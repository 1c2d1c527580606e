"""Loss curves of the pre-training logs as one picture.

python -m eval.curves --output docs/pocket-curves.png
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fewshot_diti import plots
from fewshot_diti.files import write_atomically


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Logs to draw, one JSON object per line.

    Attributes:
        unet: of runs that started from one another, in their order.
    """

    vae: Path = Path("docs/logs/pocket-vae.jsonl")
    unet: tuple[Path, ...] = tuple(Path(f"docs/logs/pocket-sd-{run}.jsonl") for run in (1, 2, 3, 4, 5))
    output: Path = Path("docs/pocket-curves.png")


def read(*logs: Path) -> list[dict[str, float]]:
    """All records; the steps of a log continue from the last step of the log before."""
    records: list[dict[str, float]] = []
    for log in logs:
        done = max((r["step"] for r in records), default=0)
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        records += [r | {"step": r["step"] + done} for r in lines]
    return records


def series(records: list[dict[str, float]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of one figure; of a step logged twice (a resumed run) the later one."""
    by_step = {r["step"]: r[key] for r in records if key in r}
    return sorted(by_step), [by_step[s] for s in sorted(by_step)]


def draw(config: Curves) -> None:
    """Autoencoder: loss and PSNR on held-out variants; U-Net: training loss, and held-out errors by timestep."""
    vae, unet = read(config.vae), read(*config.unet)
    figure = Figure(figsize=(10, 7), dpi=120, layout="constrained")
    (loss, psnr), (unet_loss, errors) = figure.subplots(2, 2)
    loss.plot(*series(vae, "loss"), color=plots.BLUE)
    loss.set(title="autoencoder: training loss", xlabel="step", yscale="log")
    psnr.plot(*series(vae, "psnr_held_out"), color=plots.BLUE, marker="o", markersize=4)
    psnr.set(title="autoencoder: PSNR on held-out variants (dB)", xlabel="step")
    # without the loss of a head, where a run had one
    restoration = [r | {"loss": r.get("restoration", r["loss"])} for r in unet if "loss" in r]
    unet_loss.plot(*series(restoration, "loss"), color=plots.BLUE)
    unet_loss.set(title="U-Net: training loss", xlabel="step")
    keys = list(dict.fromkeys(k for record in unet for k in record if k.startswith("held_out_error")))
    ends = []
    for i, key in enumerate(keys):
        steps, values = series(unet, key)
        colour = to_hex(colormaps["viridis"](0.9 * i / max(1, len(keys) - 1)))
        errors.plot(steps, values, color=colour)
        ends.append(plots.End(steps[-1], values[-1], f"t = {key.rsplit('_', 1)[1]}", colour))
    errors.set(title="U-Net: error on held-out variants", xlabel="step", yscale="log")
    for axes in (loss, psnr, unet_loss, errors):
        axes.title.set_fontsize(10)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        plots.tidy(axes)
    plots.label_ends(errors, ends)
    write_atomically(config.output, plots.png(figure))


if __name__ == "__main__":
    draw(tyro.cli(Curves))
