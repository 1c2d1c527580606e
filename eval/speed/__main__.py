"""What scoring and training cost, compared with the published procedure, in one run on one machine.

    python -m eval.speed --backbone pocket --dataset bundled --output_dir results/speed

Trains class tokens, scores every test image under every class on every trial once (`errors.safetensors`), and decides
on these errors as a race would; decides some of the images by the published schedule; then times whole pipelines from
files to labels, the stacked U-Net against the plain one, and joint training against one class after another. Sections
that are in `speed.json` already are not run again: remove the file to start anew. `--full_size` adds Stable Diffusion
2.0's U-Net with random weights, `--compile default` a U-Net that torch compiled.
"""

from __future__ import annotations

import json
from time import perf_counter
from typing import Any

import tyro
from matplotlib.figure import Figure

from eval.speed.measurement import Measurement, SpeedConfig
from eval.speed.sections import SECTIONS
from fewshot_diti import plots
from fewshot_diti.files import write_atomically


def ratios(done: dict[str, Any]) -> dict[str, float]:
    """Ratios to the published procedure or the plain U-Net; below 1 (above, for images per second) is faster."""
    found: dict[str, float] = {}
    if "elimination" in done:
        e = done["elimination"]
        found["evaluations"] = e["all"]["evaluations"] / e["evaluations_published"]
    if "pipeline" in done:
        found["images_per_second"] = done["pipeline"]["ratio"]
    if "overhead" in done:
        found |= {f"stacked_overhead_{n}": done["overhead"][f"classes_{n}"] for n in (12, 100)}
    if "training" in done:
        found["training_time_per_class"] = done["training"]["ratio"]
    return found


def plot(done: dict[str, Any]) -> bytes:
    """PNG: evaluations against agreement as confidence varies, and evaluations as classes grow."""
    figure = Figure(figsize=(11, 4), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    curve = done["elimination"]["by_confidence"]
    x, agreed = [v["evaluations"] for v in curve.values()], [100 * v["agreement"] for v in curve.values()]
    clear = [float("nan") if v["agreement_on_clear"] is None else v["agreement_on_clear"] for v in curve.values()]
    left.plot(x, [100 * share for share in clear], "s--", color=plots.GREY, markersize=4)
    left.plot(x, agreed, "o-", color=plots.BLUE)
    for confidence, v in curve.items():
        place = v["evaluations"], 100 * v["agreement"]
        left.annotate(confidence, place, (0, -12), textcoords="offset points", fontsize=8, horizontalalignment="center")
    left.set_ylim(min(98.5, min(agreed) - 1), 100.3)
    left.set(xlabel="evaluations per image (numbers: confidence)", ylabel="same label as by all trials (%)")
    ends = []
    for (strength, g), colour in zip(done["growth"].items(), (plots.BLUE, plots.VERMILION, plots.GREEN), strict=False):
        counts, raced = [int(k) for k in g], [v["evaluations"] for v in g.values()]
        right.loglog(counts, raced, "o-", color=colour)
        ends.append(plots.End(counts[-1], raced[-1], f"race, copies perturbed by {strength}", colour))
    every = [v["evaluations_exhaustive"] for v in g.values()]
    right.loglog(counts, every, "o:", color=plots.GREY)
    ends.append(plots.End(counts[-1], every[-1], "every class, every trial", plots.GREY))
    right.set(xlabel="classes", ylabel="evaluations per image")
    for axes in (left, right):
        plots.tidy(axes)
    plots.label_ends(right, ends)
    plots.label_ends(
        left,
        [
            plots.End(x[-1], agreed[-1], "all images", plots.BLUE),
            plots.End(x[-1], 100 * clear[-1], "images with a clear label", plots.GREY),
        ],
    )
    return plots.png(figure)


def main(config: SpeedConfig) -> None:
    """Runs the sections that are missing; writes speed.json after each, and the plot at the end."""
    path = config.output_dir / "speed.json"
    m = Measurement(config)
    done: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"made_by": m.made_by}
    if done["made_by"] != m.made_by:
        raise SystemExit(f"error: {path} holds a run with {done['made_by']}; pass another --output_dir.")
    for name, section in SECTIONS.items():
        asked = {"full_size": config.full_size, "compiled": config.compile is not None}
        if name in done or not asked.get(name, True):
            continue
        start = perf_counter()
        done[name] = section(m)
        done["ratios"] = ratios(done)
        write_atomically(path, (json.dumps(done, indent=1) + "\n").encode())
        print(f"{name} ({perf_counter() - start:.0f} s): {json.dumps(done[name])}", flush=True)
    write_atomically(config.output_dir / "speed.png", plot(done))
    print(f"ratios: {json.dumps(done['ratios'], indent=1)}\nwrote {path} and speed.png")


if __name__ == "__main__":
    main(tyro.cli(SpeedConfig))
