"""Which timesteps separate the true class from the other classes? Curves from the errors that `eval.fewshot` left.

    python -m eval.gaps --shift livery --shots 1 2 4 --output_dir results

Misleading test images are those whose airline the shots of another class show and the shots of their own class do not.
For these the plot shows how far such classes are from the true class, and how far the others. Takes the flags of
`python -m eval.fewshot` that choose runs; draws whose class tokens have not been scored yet are left out. Writes one
plot per number of shots beside the tables, and prints the accuracy at small, all and large t with the same number of
trials.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from fewshot_diti import plots
from fewshot_diti.data import shown_attribute
from fewshot_diti.evaluation.config import GridConfig
from fewshot_diti.evaluation.grid import Grid
from fewshot_diti.evaluation.kept_errors import DitiErrors
from fewshot_diti.evaluation.methods import LARGE_T, SMALL_T
from fewshot_diti.evaluation.task import Task
from fewshot_diti.files import write_atomically
from fewshot_diti.reports import bootstrap_interval
from fewshot_diti.timesteps import relative, weighted_mean


@dataclass(frozen=True, kw_only=True, eq=False)
class Gaps:
    """Of N test images at S trials.

    A gap is the error of wrong classes minus the error of the true class, in standard deviations over the classes.

    Attributes:
        timesteps: [S].
        right: bool [N, S], whether the trial alone gives the true class.
        sharing: [N, S], mean gap to the classes whose shots show the image's value of the attribute, mostly one.
        other: [N, S], mean gap to the classes whose shots do not.
        strongest: [N, S], gap to the one of these with the smallest mean error relative to what is usual at each t.
        misleading: bool [N], images that have a value which the shots of another class show and those of their own do
            not, and both kinds of wrong classes; for other images the gaps mean nothing.
        groups: the image's value of the attribute.
    """

    timesteps: np.ndarray
    right: np.ndarray
    sharing: np.ndarray
    other: np.ndarray
    strongest: np.ndarray
    misleading: np.ndarray
    groups: tuple[str, ...]


def measure(errors: DitiErrors, task: Task, column: str) -> Gaps:
    """The gaps of one draw.

    Raises:
        ValueError: the images have no such column.
    """
    shown_NC = shown_attribute(task.shots, task.test, column)
    error_NCS, labels = errors.test.double().numpy(), task.test.labels
    rows = np.arange(len(labels))
    relative_NC = (error_NCS / error_NCS.mean((0, 1))).mean(2)
    wrong_NC = labels[:, None] != np.arange(shown_NC.shape[1])

    sharing_NC, other_NC = wrong_NC & shown_NC, wrong_NC & ~shown_NC
    gap_NCS = (error_NCS - error_NCS[rows, labels][:, None]) / error_NCS.std(1)[:, None]

    def mean_gap(rivals_NC: np.ndarray) -> np.ndarray:
        found: np.ndarray = (gap_NCS * rivals_NC[:, :, None]).sum(1) / np.maximum(rivals_NC.sum(1), 1)[:, None]
        return found

    return Gaps(
        timesteps=errors.timesteps.numpy(),
        right=error_NCS.argmin(1) == labels[:, None],
        sharing=mean_gap(sharing_NC),
        other=mean_gap(other_NC),
        strongest=gap_NCS[rows, np.where(other_NC, relative_NC, np.inf).argmin(1)],
        misleading=~shown_NC[rows, labels] & sharing_NC.any(1) & other_NC.any(1),
        groups=task.test.attributes[column],
    )


def join(parts: Sequence[Gaps]) -> Gaps:
    """Several draws at the same timesteps as one."""
    names = ("right", "sharing", "other", "strongest", "misleading")
    return Gaps(
        timesteps=parts[0].timesteps,
        groups=tuple(g for p in parts for g in p.groups),
        **{name: np.concatenate([getattr(p, name) for p in parts]) for name in names},
    )


def equal_trials(
    errors: DitiErrors, labels_N: np.ndarray, windows: Mapping[str, tuple[int, int]], *, draws: int = 100
) -> dict[str, float]:
    """Accuracy, 0 to 1, of each window (lo, hi) with as many trials as the one with the fewest has.

    A mean over `draws` random choices of trials inside the window, so that windows compare by the quality of their
    trials and not by their number. Weights: `relative`, from the shots.

    Raises:
        ValueError: a window holds no trial.
    """
    times = errors.timesteps
    inside = {name: ((times >= lo) & (times < hi)).nonzero().flatten() for name, (lo, hi) in windows.items()}
    count = min(len(places) for places in inside.values())
    if not count:
        raise ValueError(f"A window of {dict(windows)} holds none of the trials at t = {times.tolist()}; widen it.")
    weights_T = relative(errors.held_out, times, int(times.max()) + 1)
    rng = np.random.default_rng(0)
    found = {}
    for name, places in inside.items():
        right = 0.0
        for _ in range(draws):
            some = places[torch.from_numpy(rng.choice(len(places), count, replace=False))]
            scores = weighted_mean(errors.test[:, :, some], weights_T[times[some]])
            right += float(np.mean(scores.argmin(1).numpy() == labels_N)) / draws
        found[name] = right
    return found


def plot(gaps: Gaps, title: str) -> bytes:
    """PNG: of misleading images, the gaps; and accuracy of each timestep alone, of these and of all images.

    Bands are 95 % intervals, bootstrap over liveries.
    """
    figure = Figure(figsize=(12, 4), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    misleading, every = gaps.misleading, np.ones(len(gaps.misleading), dtype=bool)
    left_ends, right_ends = [], []
    if misleading.any():
        left_ends = [
            _curve(left, gaps, gaps.sharing, misleading, plots.VERMILION, "classes whose shots\nshow the livery"),
            _curve(left, gaps, gaps.other, misleading, plots.BLUE, "other wrong classes,\nmean"),
            _curve(left, gaps, gaps.strongest, misleading, plots.GREY, "other wrong classes,\nthe strongest"),
        ]
        label = f"{misleading.sum()} misleading\nimages"
        right_ends = [_curve(right, gaps, 100.0 * gaps.right, misleading, plots.VERMILION, label)]
    left.axhline(0, color=plots.BLACK, lw=0.8)
    left.set_title(f"{misleading.sum()} misleading images", fontsize=10)
    left.set_ylabel("error of wrong classes minus the true class's\n(standard deviations over classes)")
    right_ends.append(_curve(right, gaps, 100.0 * gaps.right, every, plots.BLACK, f"all {len(every)} images"))
    right.set_title("accuracy by trials at one timestep alone", fontsize=10)
    right.set_ylabel("accuracy (%)")
    for axes in (left, right):
        axes.set_xlabel("timestep t")
        plots.tidy(axes)
    figure.suptitle(title)
    plots.label_ends(left, left_ends, lines=2)
    plots.label_ends(right, right_ends, lines=2)
    return plots.png(figure)


def _curve(axes: Axes, gaps: Gaps, values_NS: np.ndarray, mask: np.ndarray, colour: str, label: str) -> plots.End:
    """Draws a mean over images with its band; the end of the line, for its label."""
    groups = [g for g, m in zip(gaps.groups, mask, strict=True) if m]
    intervals = np.array([bootstrap_interval(column, groups) for column in values_NS[mask].T])
    means = values_NS[mask].mean(0)
    axes.plot(gaps.timesteps, means, color=colour, lw=2)
    axes.fill_between(gaps.timesteps, intervals[:, 0], intervals[:, 1], color=colour, alpha=0.12, lw=0)
    return plots.End(float(gaps.timesteps[-1]), float(means[-1]), label, colour)


def main(config: GridConfig) -> None:
    """Writes the plots and prints the table."""
    grid = Grid(config)
    big_t = grid.bench.backbone.num_train_timesteps
    windows = {
        f"t below {round(SMALL_T * big_t)}": (0, round(SMALL_T * big_t)),
        "all t": (0, big_t),
        f"t from {round(LARGE_T * big_t)}": (round(LARGE_T * big_t), big_t),
    }
    equal: dict[int, list[dict[str, float]]] = {}
    for num_shots in config.shots:
        parts = []
        for seed in config.seeds:
            task = grid.task(num_shots, seed)
            try:
                errors = grid.bench.diti(task)
                parts.append(measure(errors, task, config.column))
                equal.setdefault(num_shots, []).append(equal_trials(errors, task.test.labels, windows))
            except FileNotFoundError as error:
                print(f"{error} Run python -m eval.fewshot first.")
        if parts:
            path = config.folder / f"gaps-{num_shots}.png"
            title = f"{num_shots} shot{'s' if num_shots > 1 else ''}, {len(parts)} seed{'s' if len(parts) > 1 else ''}"
            write_atomically(path, plot(join(parts), title))
            print(f"wrote {path}")
    table = Table(
        "trials",
        *(f"{k} shot" if k == 1 else f"{k} shots" for k in equal),
        title="accuracy in %, the same number of trials in each row",
    )
    for name in windows:
        table.add_row(name, *(f"{100 * np.mean([found[name] for found in each]):.1f}" for each in equal.values()))
    Console().print(table)


if __name__ == "__main__":
    try:
        main(tyro.cli(GridConfig))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
