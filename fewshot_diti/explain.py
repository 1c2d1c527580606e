"""Why an image got its label: the shots that are most like it, what each source of evidence gives, where on the image
and at which timesteps the class tokens differ.

Shapes in names: C classes, S trials, T timesteps, h, w latent height and width, n shots, D values of a feature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure, SubFigure
from PIL import Image
from torch import Tensor

from fewshot_diti import plots
from fewshot_diti.config import Label, PredictionConfig
from fewshot_diti.data.images import as_picture
from fewshot_diti.decider import Decider
from fewshot_diti.discriminant import directions
from fewshot_diti.encoding import PreparedImage
from fewshot_diti.reports import drawn_name
from fewshot_diti.trials import even_grid
from fewshot_diti.witnesses import FittedWitness
from fewshot_diti.witnesses.features import UnetWitness

TIMES, REPEATS = 16, 4  # timesteps of the curve, and trials at each
NEIGHBOURS = 3  # shots shown of each class


@dataclass(frozen=True, kw_only=True, eq=False)
class Neighbour:
    """A shot that is like the image.

    Attributes:
        label: its class.
        place: its position among the shots of the class, in the order of `fit`.
        similarity: cosine of the U-Net's features of shot and image, around the mean of all shots; -1 to 1.
        picture: the shot, in the size in which the bank keeps it; None where it keeps no pixels.
    """

    label: Label
    place: int
    similarity: float
    picture: Image.Image | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Explanation:
    """Why an image got its label rather than that of the rival, the second most probable class.

    Attributes:
        picture: the image as the backbone sees it.
        label: the most probable class.
        rival: the next.
        probabilities: of the most probable classes.
        sources: probabilities of these classes by each source of evidence alone: class tokens, and each witness.
        neighbours: of each of these classes its most similar shots; none in a bank without the witness "features".
        evidence: float32 [height, width] in pixels of `picture`: the rival's error minus the label's at each latent
            position, weighted mean over the trials, enlarged. Above 0 it speaks for the label.
        timesteps: [T].
        differences: the rival's error minus the label's at each timestep, in % of the mean of both.
        standard_errors: of the differences, over `REPEATS` trials.
    """

    picture: Image.Image
    label: Label
    rival: Label
    probabilities: dict[Label, float]
    sources: dict[str, dict[Label, float]]
    neighbours: dict[Label, tuple[Neighbour, ...]]
    evidence: np.ndarray
    timesteps: tuple[int, ...]
    differences: np.ndarray
    standard_errors: np.ndarray

    def figure(self) -> bytes:
        """One PNG: the image and its probabilities, the nearest shots, the map, and the curve."""
        return _figure(self)

    def map(self) -> bytes:
        """PNG of where on the image the evidence sits."""
        figure = Figure(figsize=(6, 3.4), dpi=110, layout="constrained")
        part: Any = figure.subfigures()
        _map(part, part.subplots(), self)
        return plots.png(figure)

    def curve(self) -> bytes:
        """PNG of the timesteps at which the first two classes differ."""
        figure = Figure(figsize=(6, 3.4), dpi=110, layout="constrained")
        _curve(figure.subplots(), self)
        return plots.png(figure)


def explain(decider: Decider, image: PreparedImage, prediction: PredictionConfig, top: int = 3) -> Explanation:
    """Explains one image by a bank of two classes or more; costs 2 (S + 64) evaluations beside those of a decision.

    Args:
        top: classes that are named.

    Raises:
        ValueError: fewer than two classes, or `top` below 2.
    """
    labels = decider.bank.labels
    if len(labels) < 2 or top < 2:
        raise ValueError(f"An explanation compares classes: {len(labels)} in the bank, top={top}; two are needed.")
    [decision] = decider.decide([image], prediction)
    temperature = decider.temperature(prediction)
    probabilities_C = (-decision.scores / temperature).softmax(0)
    order = sorted(range(len(labels)), key=lambda c: (c != decision.position, decision.scores[c].item()))[:top]
    sources = {name: log_p[0].exp() for name, log_p in decider.evidence([image], prediction).items()}
    with decider.encoder.backbone.lock:
        latents = decider.reader.latents([image])
        features = next((x for x in decider.witnesses if isinstance(x.witness, UnetWitness)), None)
        read = None if features is None else decider.reader.read(features, [image])
        first, second = order[:2]
        evidence_hw = _evidence(decider, image, latents[0], (first, second), prediction.batch_size)
        times, gaps_TR = _gaps(decider, image, latents[0], (first, second), prediction.batch_size)
    height, width = image.pixels_CHW.shape[1:]
    enlarged = F.interpolate(evidence_hw[None, None], (height, width), mode="bilinear", align_corners=False)[0, 0]
    neighbours: dict[Label, tuple[Neighbour, ...]] = {}
    if features is not None and read is not None:
        neighbours = _neighbours(features, read, [labels[c] for c in order], _pixels(decider.witnesses))
    return Explanation(
        picture=as_picture(image.pixels_CHW),
        label=labels[first],
        rival=labels[second],
        probabilities={labels[c]: float(probabilities_C[c]) for c in order},
        sources={name: {labels[c]: float(p_C[c]) for c in order} for name, p_C in sources.items()},
        neighbours=neighbours,
        evidence=enlarged.numpy(),
        timesteps=times,
        differences=gaps_TR.mean(1).numpy(),
        standard_errors=(gaps_TR.std(1) / REPEATS**0.5).numpy(),
    )


def _evidence(
    decider: Decider, image: PreparedImage, latents: Tensor, pair: tuple[int, int], batch_size: int
) -> Tensor:
    """The second class's error minus the first's at each position [h, w], weighted mean over the bank's trials."""
    times = decider.calibration.timesteps
    maps_2Shw = decider.scorer(batch_size).error_maps(latents, image.id, pair, range(len(times)), times)
    weights_S = torch.tensor(decider.calibration.weights)
    return ((maps_2Shw[1] - maps_2Shw[0]) * weights_S[:, None, None]).mean(0)


def _gaps(
    decider: Decider, image: PreparedImage, latents: Tensor, pair: tuple[int, int], batch_size: int
) -> tuple[tuple[int, ...], Tensor]:
    """Timesteps, and the same difference of the whole errors at each [T, repeats], in % of their mean; of trials that
    no score has."""
    grid = even_grid(TIMES, *decider.scoring.timesteps).repeat_interleave(REPEATS)
    first = len(decider.calibration.timesteps)
    trials = range(first, first + len(grid))
    errors_2S = decider.scorer(batch_size).errors(latents, image.id, pair, trials, grid.tolist()).double()
    gaps_S = 200 * (errors_2S[1] - errors_2S[0]) / errors_2S.sum(0)
    return tuple(grid[::REPEATS].tolist()), gaps_S.view(TIMES, REPEATS)


def _neighbours(
    fitted: FittedWitness, read_1D: Tensor, labels: Sequence[Label], pixels: dict[Label, Tensor]
) -> dict[Label, tuple[Neighbour, ...]]:
    """The most similar shots of each class, the most similar first."""
    shots = {label: views[:, 0].float() for label, views in fitted.shots.items()}
    mean_D = torch.cat(list(shots.values())).mean(0)
    own_1D = directions(read_1D, mean_D)
    found = {}
    for label in labels:
        cosines_n = (directions(shots[label], mean_D) @ own_1D.T)[:, 0]
        places = (-cosines_n).argsort(kind="stable")[:NEIGHBOURS].tolist()
        kept = pixels.get(label)
        found[label] = tuple(
            Neighbour(
                label=label,
                place=place,
                similarity=float(cosines_n[place]),
                picture=None if kept is None else as_picture(kept[place]),
            )
            for place in places
        )
    return found


def _pixels(witnesses: Sequence[FittedWitness]) -> dict[Label, Tensor]:
    """The shots' pixels uint8 [n, 3, height, width], where a witness keeps them."""
    for fitted in witnesses:
        if all(views.dtype == torch.uint8 for views in fitted.shots.values()):
            return {label: views[:, 0] for label, views in fitted.shots.items()}
    return {}


def _figure(x: Explanation) -> bytes:
    shown = {label: found for label, found in x.neighbours.items() if any(n.picture is not None for n in found)}
    heights = [2.5, 1.05 * len(shown), 3.0] if shown else [2.5, 3.0]
    figure = Figure(figsize=(12, sum(heights)), dpi=110, layout="constrained")
    parts: Any = figure.subfigures(len(heights), 1, height_ratios=heights)
    image, bars = parts[0].subplots(1, 2)
    _image(image, x)
    _bars(bars, x)
    if shown:
        _shots(parts[1], shown)
    where, when = parts[-1].subplots(1, 2)
    _map(parts[-1], where, x)
    _curve(when, x)
    return plots.png(figure)


def _shots(part: SubFigure, shown: dict[Label, tuple[Neighbour, ...]]) -> None:
    """A row for each class with its most similar shots."""
    rows = part.subplots(len(shown), 1 + NEIGHBOURS, squeeze=False)
    for axes in rows.flat:
        axes.set_axis_off()
    for (label, found), (text, *pictures) in zip(shown.items(), rows, strict=True):
        text.text(1, 0.5, f"nearest shots of\n{drawn_name(label)}", ha="right", va="center", transform=text.transAxes)
        for neighbour, axes in zip(found, pictures, strict=False):
            if neighbour.picture is not None:
                axes.imshow(np.asarray(neighbour.picture))
            axes.set_title(f"similarity {neighbour.similarity:.2f}", fontsize=9, color=plots.GREY, pad=2)


def _image(axes: Axes, x: Explanation) -> None:
    axes.imshow(np.asarray(x.picture))
    axes.set(xticks=[], yticks=[])
    probability = f"{100 * x.probabilities[x.label]:.0f} %"
    title = f"{drawn_name(x.label)}, {probability}; rival {drawn_name(x.rival)}"
    axes.set_title(title, loc="left", fontsize=12, weight="bold")


def _bars(axes: Axes, x: Explanation) -> None:
    """Probabilities of the classes, together and by each source."""
    rows = {"together": x.probabilities, **x.sources}
    colours = (plots.BLUE, plots.VERMILION, plots.ORANGE, plots.GREEN, plots.SKY)
    height = 0.8 / len(x.probabilities)
    for c, label in enumerate(x.probabilities):
        places = np.arange(len(rows)) + (c - (len(x.probabilities) - 1) / 2) * height
        values = [100 * probabilities[label] for probabilities in rows.values()]
        colour = colours[c] if c < len(colours) else plots.GREY
        axes.barh(places, values, height * 0.9, color=colour, label=drawn_name(label))
    axes.set(yticks=np.arange(len(rows)), yticklabels=list(rows), xlim=(0, 100), xlabel="probability, %")
    axes.invert_yaxis()
    axes.set_title("Each source by itself", loc="left", fontsize=11)
    columns = min(3, len(x.probabilities))
    axes.legend(frameon=False, fontsize=9, ncols=columns, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0)
    plots.tidy(axes)


def _map(part: SubFigure, axes: Axes, x: Explanation) -> None:
    """The signed map over the image in grey."""
    axes.imshow(np.asarray(x.picture.convert("L")), cmap="gray", alpha=0.6)
    most = max(float(np.abs(x.evidence).max()), 1e-12)
    shown = axes.imshow(x.evidence, cmap="RdBu", norm=TwoSlopeNorm(0, -most, most), alpha=0.65)
    axes.set(xticks=[], yticks=[])
    axes.set_title("Class tokens: where the evidence sits", loc="left", fontsize=11)
    bar = part.colorbar(shown, ax=axes, location="bottom", fraction=0.05, pad=0.02, ticks=[-most, 0, most])
    bar.ax.set_xticklabels([f"for {drawn_name(x.rival)}", "0", f"for {drawn_name(x.label)}"], fontsize=9)


def _curve(axes: Axes, x: Explanation) -> None:
    """The difference of the errors over t, with its standard error."""
    axes.axhline(0, color=plots.GREY, lw=0.8)
    axes.errorbar(x.timesteps, x.differences, x.standard_errors, fmt="o-", color=plots.BLUE, ms=4, capsize=2)
    axes.set(
        xlabel="timestep t (noise grows to the right)",
        ylabel=f"difference of errors, %\n(above 0: for {drawn_name(x.label)})",
    )
    axes.set_title("Class tokens: at which timesteps (\u00b1 standard error)", loc="left", fontsize=11)
    plots.tidy(axes)
