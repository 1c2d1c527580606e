"""What runs say beside their accuracy: how far to trust their probabilities, and coarser levels than the classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fewshot_diti import plots
from fewshot_diti.evaluation import table
from fewshot_diti.evaluation.grid import Grid, Run
from fewshot_diti.evaluation.hierarchy import level_titles
from fewshot_diti.evaluation.methods import supervision
from fewshot_diti.evaluation.reliability import BINS, Predictions
from fewshot_diti.evaluation.shift import Table

Records = Mapping[Run, Mapping[str, Any]]
_COLOURS = (plots.BLUE, plots.GREEN, plots.ORANGE, plots.VERMILION, plots.SKY)  # of the classes, then of levels


def accuracy_rows(grid: Grid, records: Records, level: str = "") -> list[table.Row]:
    """Accuracy of each method, of the classes or at a level above them."""
    config, apart = grid.config, supervision(grid.config.backbone)
    return [
        table.Row(
            name=method,
            accuracy={k: _accuracy(records, method, k, level) for k in config.shots},
            seeds=len(config.seeds),
            supervision=apart.get(method, ""),
        )
        for method in config.methods
    ]


def levels_picture(grid: Grid, records: Records, method: str) -> bytes:
    """PNG of one method's accuracy over shots: of the classes, and at each level."""
    titles = level_titles(grid.test.class_names, grid.levels)
    found = {
        title: {k: _accuracy(records, method, k, level) for k in grid.config.shots} for level, title in titles.items()
    }
    return draw_levels(found, grid.config.shots, method)


def draw_levels(accuracy: Mapping[str, Mapping[int, list[float]]], shots: Sequence[int], method: str) -> bytes:
    """As `levels_picture`, of accuracies in % by the title of a level and the number of shots, a value a draw."""
    rows = [table.Row(name=name, accuracy=of_level) for name, of_level in accuracy.items()]
    colours = dict(zip(accuracy, _COLOURS, strict=False))
    return table.plot(rows, shots, colours, ylabel=f"accuracy of {method} (%)")


def calibration(grid: Grid, records: Records) -> Table | None:
    """Calibration error, Brier score and log-loss by method and shots; None where no run has them."""
    config, cells = grid.config, {}
    for method in config.methods:
        for k in config.shots:
            found = [record for record in _runs(records, method, k) if "log_loss" in record]
            if found:
                names = ("calibration_error", "brier", "log_loss")
                error, brier, nats = (np.mean([record[name] for record in found]) for name in names)
                cells[method, k] = f"{100 * error:.1f}, {brier:.3f}, {nats:.3f}"
    caption = (
        f"expected calibration error in points ({BINS} bins of equal mass), Brier score (0 to 2), log-loss in nats: "
        "means over seeds; small is good, and with few test images some points of the first are chance"
    )
    lines = table.lines_by_shots(config.methods, config.shots, cells, supervision(config.backbone))
    return (caption, *lines) if cells else None


def predictions(grid: Grid, records: Records, methods: Sequence[str]) -> dict[int, dict[str, Predictions]]:
    """The predictions of all seeds by shots and method, where runs have them."""
    found: dict[int, dict[str, Predictions]] = {}
    for k in grid.config.shots:
        for method in methods:
            if (of_runs := Predictions.of_records(_runs(records, method, k))) is not None:
                found.setdefault(k, {})[method] = of_runs
    return found


def _accuracy(records: Records, method: str, num_shots: int, level: str) -> list[float]:
    """In % by seed; a record of before there were levels has none at a level."""
    runs = _runs(records, method, num_shots)
    found = [record.get("levels", {}).get(level) if level else record for record in runs]
    return [100 * x["accuracy"] for x in found if x is not None]


def _runs(records: Records, method: str, num_shots: int) -> list[Mapping[str, Any]]:
    return [record for run, record in records.items() if (run.method, run.num_shots) == (method, num_shots)]
