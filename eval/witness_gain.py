"""What class tokens and each witness add to the decision, and the images that would be wrong without them.

    python -m eval.witness_gain --dtype float32 --output_dir results --picture witnesses.png

Takes the flags of `python -m eval.fewshot` that choose draws. Reads the classifiers and predictions that its row
`fewshot-diti` left, and trains those that are missing; the evidence is kept beside them. Leaving one out takes its
weight times its log-probabilities off the score; the race is not run again, so class tokens keep the trials that they
had, and classes that were dropped early keep coarse scores.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from fewshot_diti import plots
from fewshot_diti.evaluation.config import GridConfig
from fewshot_diti.evaluation.grid import Grid
from fewshot_diti.evaluation.kept_errors import save_errors
from fewshot_diti.evaluation.predicting import classify
from fewshot_diti.evaluation.shipped import shipped_file, trained_classifier
from fewshot_diti.evaluation.task import Task
from fewshot_diti.files import write_atomically
from fewshot_diti.kept_tensors import kept_tensors
from fewshot_diti.presets import recommended
from fewshot_diti.progress import Progress
from fewshot_diti.reports import bootstrap_interval

TOKENS = "class tokens"
PICTURED = 4  # images for each source


@dataclass(frozen=True, kw_only=True)
class Config:
    """Which draws, and where the picture goes.

    Attributes:
        grid: of the table.
        picture: PNG of images that are right only because of one source, of the first draw.
    """

    grid: tyro.conf.OmitArgPrefixes[GridConfig] = field(default_factory=GridConfig)
    picture: Path | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """Log-probabilities of each source on the N test images of a draw.

    Attributes:
        logits: by source, weight times log-probability [N, C], in nats of the class tokens; their sum decides.
        labels: true classes [N].
        parts: masks [N]: all, matched, shifted, misleading.
        groups: of the images.
    """

    logits: dict[str, np.ndarray]
    labels: np.ndarray
    parts: dict[str, np.ndarray]
    groups: tuple[str, ...]

    def predicted(self, without: str | None = None, alone: str | None = None) -> np.ndarray:
        """Predicted classes [N], of all sources, of all but one, or of one."""
        asked = [x for name, x in self.logits.items() if name != without and alone in (None, name)]
        found: np.ndarray = np.sum(asked, axis=0).argmax(1)
        return found

    def correct(self, without: str | None = None, alone: str | None = None) -> np.ndarray:
        """Whether these are the true ones, bool [N]."""
        right: np.ndarray = self.predicted(without, alone) == self.labels
        return right


def read_evidence(grid: Grid, task: Task) -> Evidence:
    """The evidence of a draw, from disk or from its classifier."""
    path, made_by = shipped_file(grid.bench, task)
    path = path.with_name(path.name.replace("shipped", "evidence"))
    kept = kept_tensors(path, made_by)
    if kept is None:
        classifier, folder = trained_classifier(grid.bench, task)
        records = classify(classifier, task.test, folder)
        decider, encoder = classifier.decider(), classifier.encoder_
        calibration = classifier.calibration_
        weights = dict(zip([x.name for x in decider.witnesses], calibration.witness_weights, strict=True))
        rows: dict[str, list[torch.Tensor]] = {name: [] for name in (TOKENS, *weights)}
        with Progress(len(records), "evidence", "image") as bar:
            for row, record in enumerate(records):
                image = encoder.prepare(task.test.decode(row))
                scores = torch.tensor(record["scores"], dtype=torch.float64)[None]
                for witness in decider.witnesses:
                    weighted = weights[witness.name] * decider.reader.log_probabilities(witness, [image])
                    rows[witness.name].append(weighted / calibration.token_temperature)
                    scores = scores + weighted
                rows[TOKENS].append(-scores / calibration.token_temperature)
                bar.update()
        order = [classifier.classes_.tolist().index(name) for name in task.class_names]
        kept = {name: torch.cat(parts)[:, order].float().contiguous() for name, parts in rows.items()}
        save_errors(path, kept, made_by)
    shown_NC = grid.shown(task)
    kinds = {} if shown_NC is None else grid.kinds(shown_NC)
    return Evidence(
        logits={name: kept[name].double().numpy() for name in (TOKENS, *(x for x in kept if x != TOKENS))},
        labels=task.test.labels,
        parts={"all": np.ones(len(task.test), dtype=bool), **kinds},
        groups=tuple(task.test.attributes.get(grid.config.column, ("",) * len(task.test))),
    )


def table(num_shots: int, draws: list[Evidence], column: str) -> Table:
    """Accuracy on each part of all sources and of each alone, and how much is lost without each."""
    sources = list(draws[0].logits)
    found = Table(
        title=f"{num_shots} shots, {len(draws)} draws: accuracy in %; without a source, the difference in points "
        f"[95 % interval, bootstrap over {column}]",
        title_justify="left",
    )
    found.add_column("sources")
    for part in draws[0].parts:
        found.add_column(f"{part}\n{sum(int(draw.parts[part].sum()) for draw in draws)} images", justify="right")

    def cells(values_of: list[np.ndarray], *, percent: bool) -> list[str]:
        row = []
        for part in draws[0].parts:
            values = np.concatenate([x[draw.parts[part]] for x, draw in zip(values_of, draws, strict=True)])
            groups = [g for draw in draws for g, m in zip(draw.groups, draw.parts[part], strict=True) if m]
            if not len(values):
                row.append("no images")
                continue
            low, high = bootstrap_interval(values, groups)
            row.append(
                f"{100 * values.mean():.1f} [{100 * low:.0f}, {100 * high:.0f}]"
                if percent
                else f"{100 * values.mean():+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
            )
        return row

    found.add_row("all", *cells([draw.correct().astype(float) for draw in draws], percent=True))
    for name in sources:
        alone = [draw.correct(alone=name).astype(float) for draw in draws]
        found.add_row(f"{name} alone", *cells(alone, percent=True))
    for name in sources:
        lost = [draw.correct(without=name).astype(float) - draw.correct() for draw in draws]
        found.add_row(f"without {name}", *cells(lost, percent=False))
    return found


def picture(task: Task, evidence: Evidence) -> bytes:
    """PNG: a row for each source with the first images that are right with it and wrong without it."""
    sources = list(evidence.logits)
    figure = Figure(figsize=(3.1 * PICTURED + 2.4, 2.05 * len(sources) + 0.6), dpi=110, layout="constrained")
    figure.suptitle(
        f"Right only because of one source: under its class, that of the others without it ({task.num_shots} shots of "
        "each class)",
        fontsize=12,
    )
    rows = figure.subplots(len(sources), PICTURED, squeeze=False)
    right = evidence.correct()
    for axes_row, name in zip(rows, sources, strict=True):
        without = evidence.predicted(without=name)
        saved = np.flatnonzero(right & (without != evidence.labels))
        spoiled = int((~right & (without == evidence.labels)).sum())
        for axes, row in zip(axes_row, saved, strict=False):
            _draw(axes, task, int(row), task.class_names[without[row]])
        for axes in axes_row[len(saved) :]:
            axes.set_axis_off()
        axes_row[0].text(
            -0.06,
            0.5,
            f"{name}\n\n{len(saved)} saved,\n{spoiled} spoiled\nof {len(right)}",
            transform=axes_row[0].transAxes,
            horizontalalignment="right",
            verticalalignment="center",
            fontsize=11,
        )
    return plots.png(figure)


def _draw(axes: Axes, task: Task, row: int, otherwise: str) -> None:
    axes.imshow(np.asarray(task.test.image(row)))
    axes.set(xticks=[], yticks=[])
    axes.set_title(task.class_names[task.test.labels[row]], fontsize=11)
    axes.set_xlabel(f"✗ {otherwise}", fontsize=11, color=plots.VERMILION)


def main(config: Config) -> None:
    """Prints a table for each number of shots, and draws the picture."""
    grid, first = Grid(config.grid), True
    if not any(recommended(k, grid.bench.backbone.kind).scoring.witness_weights for k in config.grid.shots):
        raise ValueError(f"By default no witness counts on a backbone like {config.grid.backbone}; name another.")
    for num_shots in config.grid.shots:
        draws = []
        for seed in config.grid.seeds:
            task = grid.task(num_shots, seed)
            draws.append(read_evidence(grid, task))
            if first and config.picture is not None:
                write_atomically(config.picture, picture(task, draws[-1]))
                print(f"wrote {config.picture}")
            first = False
        Console(width=160).print(table(num_shots, draws, config.grid.column))


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
