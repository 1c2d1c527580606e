"""Loss curves of the pre-training logs as one picture.

python -m eval.curves --output docs/pocket-curves.png
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import tyro

matplotlib.use("Agg")
from matplotlib import pyplot as plt


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Logs to draw, one JSON object a line.

    Attributes:
        unet: of runs that started from one another, in their order.
    """

    vae: Path = Path("docs/logs/pocket-vae.jsonl")
    unet: tuple[Path, ...] = tuple(Path(f"docs/logs/pocket-sd-{run}.jsonl") for run in (1, 2, 3))
    output: Path = Path("docs/pocket-curves.png")


def read(*logs: Path) -> list[dict[str, float]]:
    """All records; the steps of a log count on from the last of the log before."""
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
    """Autoencoder: loss and PSNR on held-out variants; U-Net: training loss, and held-out errors by time-step."""
    vae, unet = read(config.vae), read(*config.unet)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    left.plot(*series(vae, "loss"), color="tab:blue")
    left.set(title="autoencoder", xlabel="step", ylabel="loss", yscale="log")
    psnr = left.twinx()
    psnr.plot(*series(vae, "psnr_held_out"), color="tab:orange", marker="o")
    psnr.set_ylabel("PSNR on held-out variants (dB)", color="tab:orange")
    middle.plot(*series(unet, "loss"))
    middle.set(title="U-Net", xlabel="step", ylabel="training loss (half of t below 400)")
    for key in dict.fromkeys(k for record in unet for k in record if k.startswith("held_out_error")):
        steps, values = series(unet, key)
        right.plot(steps, values, marker=".", label=f"t = {key.rsplit('_', 1)[1]}")
    right.set(title="error on held-out variants", xlabel="step", yscale="log")
    right.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    config.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(config.output, dpi=120)


if __name__ == "__main__":
    draw(tyro.cli(Curves))
