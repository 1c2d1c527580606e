"""Results as tables, pictures and intervals; printing and saving are the caller's."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from rich import box
from rich.table import Table
from scipy.stats import binomtest

from fewshot_diti import plots


@dataclass(frozen=True, kw_only=True, eq=False)
class MethodResult:
    """How one method did on N test images.

    Attributes:
        name: of the method.
        correct: bool [N].
        seconds: that it took, training included.
    """

    name: str
    correct: np.ndarray
    seconds: float


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95 % interval of a share, `correct` of `total`, both ends in 0..1 (Wilson, 1927)."""
    interval = binomtest(correct, total).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap_interval(
    values: np.ndarray, groups: Sequence[str], *, seed: int = 0, resamples: int = 2000
) -> tuple[float, float]:
    """95 % interval (low, high) of the mean of values [N], by resampling whole groups (percentile bootstrap).

    Images of one group (liveries, as a rule) are right or wrong together, so intervals over images would be too narrow.
    An image of the group "" is one by itself.

    Raises:
        ValueError: no values, or not one group a value.
    """
    if not len(values) or len(values) != len(groups):
        raise ValueError(f"{len(values)} values and {len(groups)} groups; pass at least one value, each with a group.")
    names, index = np.unique(single_groups(groups), return_inverse=True)
    sums, counts = np.bincount(index, weights=values), np.bincount(index)
    shares = np.full(len(names), 1 / len(names))
    times_RG = np.random.default_rng(seed).multinomial(len(names), shares, size=resamples)
    low, high = np.quantile((times_RG @ sums) / (times_RG @ counts), (0.025, 0.975))
    return float(low), float(high)


def single_groups(groups: Sequence[str]) -> list[str]:
    """The groups, with one of its own for each image whose group is ""."""
    return [group or f"\0{i}" for i, group in enumerate(groups)]


def accuracy_table(
    results: Sequence[MethodResult], subsets: Mapping[str, np.ndarray], groups: Sequence[str], grouped_by: str
) -> Table:
    """Accuracy in % of each method on each subset of the N test images, with bootstrap intervals over groups.

    Args:
        subsets: title -> bool [N]; a column each, with its number of images.
        groups: of each image, such as its livery.
        grouped_by: what the groups are, in the plural.
    """
    table = Table(
        caption=f"accuracy in %; brackets: 95 % interval, bootstrap over {grouped_by}",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("method", no_wrap=True)
    for title, mask in subsets.items():
        table.add_column(f"{title}\n{int(mask.sum())} images", justify="right", no_wrap=True)
    table.add_column("seconds", justify="right", vertical="bottom")
    for result in results:
        cells = []
        for mask in subsets.values():
            if not mask.any():
                cells.append("no images")
                continue
            low, high = bootstrap_interval(result.correct[mask], np.asarray(groups)[mask].tolist())
            cells.append(f"{100 * result.correct[mask].mean():.1f} [{100 * low:.0f}, {100 * high:.0f}]")
        table.add_row(result.name, *cells, f"{result.seconds:.0f}")
    return table


_PLACES = ("first", "second", "third")


def prediction_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """The top classes and the margin of each image, from records with path, probabilities (best first) and margin.

    The folder that all images share stands above, once.
    """
    folder = _shared_folder([record["path"] for record in records])
    title = f"images in {printable(folder)}" if folder else None
    table = Table(
        title=title,
        title_justify="left",
        caption="margin: second smallest score minus smallest",
        caption_justify="left",
    )
    table.add_column("image", overflow="fold")
    for place in range(max((len(record["probabilities"]) for record in records), default=0)):
        table.add_column(_PLACES[place] if place < len(_PLACES) else f"{place + 1}th")
    table.add_column("margin", justify="right")
    for record in records:
        top = [f"{printable(label)} {100 * p:.1f} %" for label, p in record["probabilities"].items()]
        shown = os.path.relpath(record["path"], folder) if folder else record["path"]
        table.add_row(printable(shown), *top, f"{record['margin']:.2e}")
    return table


def printable_lines(text: str) -> str:
    """As `printable`, with its line breaks."""
    return "\n".join(map(printable, text.split("\n")))


def printable(text: str) -> str:
    """A text with names or paths as any terminal takes it, without escape sequences and bytes that are no UTF-8."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def drawn_name(label: object) -> str:
    """A label as a picture takes it: on one line, not too long, no mathematics."""
    text = printable(str(label)).replace("$", r"\$")
    return text if len(text) <= 40 else f"{text[:39]}\u2026"


def _shared_folder(paths: Sequence[str]) -> str:
    """The longest folder that all paths begin with, "" where there is none."""
    try:
        return os.path.commonpath([os.path.dirname(path) for path in paths])
    except ValueError:  # no paths, or absolute ones beside relative ones
        return ""


def predictions_picture(
    images: Sequence[Image.Image],
    labels: Sequence[str],
    predicted: Sequence[str],
    probabilities: Sequence[float],
    *,
    columns: int = 4,
) -> bytes:
    """PNG grid of images, each under its class and the predicted class with its probability (0..1).

    What is right has a blue frame and a tick, what is wrong an orange one and a cross: colour is never the only sign.
    """
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(2.9 * columns, 2.1 * rows), dpi=110, layout="constrained")
    figure.suptitle("true class; below it the predicted class and its probability", fontsize=11, color=plots.GREY)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[len(images) :]:
        axis.set_axis_off()
    for axis, image, label, guess, p in zip(axes, images, labels, predicted, probabilities, strict=False):
        right = label == guess
        colour = plots.BLUE if right else plots.VERMILION
        axis.imshow(np.asarray(image))
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set(color=colour, linewidth=3)
        axis.set_title(label, fontsize=12, pad=22)
        axis.text(
            0.5,
            1.04,
            f"{'✓' if right else '✗'} {guess}, {100 * p:.0f} %",
            transform=axis.transAxes,
            horizontalalignment="center",
            verticalalignment="bottom",
            fontsize=12,
            weight="normal" if right else "bold",
            color=colour,
        )
    return plots.png(figure)
