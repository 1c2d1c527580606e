"""`fewshot-diti eval`: a few-shot table with error bars, of class tokens beside what a user would try instead."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from fewshot_diti.distributed import process_state
from fewshot_diti.evaluation import reliability, shift, summary, table
from fewshot_diti.evaluation.comparison import compare
from fewshot_diti.evaluation.config import GridConfig
from fewshot_diti.evaluation.grid import Grid, Run
from fewshot_diti.evaluation.methods import METHODS, SHIPPED, supervision
from fewshot_diti.files import write_atomically
from fewshot_diti.progress import counted

# half of the bundled test images
QUICK: dict[str, Any] = {"shots": (1, 2), "seeds": (1,), "max_test_images": 10, "trials": 3, "training_share": 0.25}


@dataclass(frozen=True, kw_only=True)
class EvalConfig(GridConfig):
    """Few-shot accuracy of class tokens and of baselines, over shots and seeds; runs that are there are not run again.

    Attributes:
        quick: 1 and 2 shots, one seed, ten test images per class, 3 trials and a quarter of the training steps
            (but for the network in the row `fewshot-diti`), whatever the flags say.
        dry_run: prints what would run, and how long it would take, and runs nothing.
        against: the method that all others are compared with, image by image; by default `fewshot-diti`, else
            `diti`, else the first of the methods.
        quiet: prints nothing but errors and warnings.

    Raises:
        ValueError: as `GridConfig`, or `against` is none of the methods.
    """

    quick: bool = False
    dry_run: bool = False
    against: str = ""
    quiet: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in QUICK if self.quick and getattr(self, name) != getattr(EvalConfig, name)]
        if given:
            raise ValueError(f"--quick sets {', '.join(QUICK)} itself; leave out {', '.join(given)}, or --quick.")
        if self.against and self.against not in self.methods:
            raise ValueError(f"against={self.against!r}; pass one of the methods {', '.join(self.methods)}.")

    @property
    def reference(self) -> str:
        """The method that all others are compared with."""
        ours = next((name for name in (SHIPPED, "diti") if name in self.methods), self.methods[0])
        return self.against or ours


def evaluate(config: EvalConfig, console: Console) -> int:
    """Runs what is missing, prints the tables and writes them; returns 1 where a run failed.

    Raises:
        OSError, ValueError: the data or a model cannot be loaded.
    """
    if config.quick:
        config = replace(config, quick=False, **QUICK)
    grid = Grid(config)
    if config.dry_run:
        console.out(plan(grid))
        return 0
    failed = grid.run_missing()
    if process_state().is_main_process and any(grid.record(run) for run in grid.runs()):
        report(grid, config.reference, console)
    for run in failed:
        console.out(f"failed: {run.path}: {json.loads(run.path.read_text(encoding='utf-8'))['error']}")
    process_state().wait_for_everyone()  # the launcher stops all processes when one ends with 1
    return 1 if failed else 0


def plan(grid: Grid) -> str:
    """What would run, with an estimate of time: of class tokens from one measured batch, of runs from those of the same
    method that are there."""
    done = {run: record for run in grid.runs() if (record := grid.record(run)) is not None}
    lines, total, unknown, missing = [], 0.0, 0, grid.missing()
    needed = dict.fromkeys((run.num_shots, run.seed) for run in missing if METHODS[run.method].reads == "class tokens")
    draws = [draw for draw in needed if not grid.prepared(*draw)]
    evaluation = grid.bench.evaluation_seconds() if draws else 0.0
    for num_shots, seed in draws:
        seconds = evaluation * grid.bench.evaluations(num_shots, len(grid.test.class_names), len(grid.test))
        total += seconds
        lines.append(f"class tokens at {counted(num_shots, 'shot')} per class, seed {seed}  about {seconds:.0f} s")
    for run in missing:
        near = [other for other in done if other.method == run.method]
        if not near:
            unknown += 1
            lines.append(f"{run.path}  time unknown")
            continue
        record = done[min(near, key=lambda other: abs(other.num_shots - run.num_shots))]
        seconds = record["seconds"]
        if METHODS[run.method].reads == "classifier":  # it is trained, and decides, before the run
            seconds += record["training_seconds"] + record["seconds_per_image"] * len(grid.test)
        total += seconds
        lines.append(f"{run.path}  about {seconds:.0f} s")
    lines.append(f"{len(missing)} runs to do, {len(done)} done; about {total / 60:.0f} minutes, {unknown} unknown.")
    return "\n".join(lines)


def report(grid: Grid, against: str, console: Console) -> None:
    """Prints accuracy and comparisons, and writes table.{csv,md,tex}, accuracy.png, calibration.md, reliability.png,
    comparisons.{md,json}; where images have the attribute, shift.md; where classes have levels, levels.{md,png}."""
    config, folder = grid.config, grid.config.folder
    records = {run: record for run in grid.runs() if (record := grid.record(run)) is not None}
    rows = summary.accuracy_rows(grid, records)
    whole = not config.shifted and config.max_test_images is None
    if whole and config.dataset.startswith("fgvc:") and len(grid.test.class_names) == 100:
        rows = table.published_rows(config.shots) + rows
    console.print(table.rich_table(rows, config.shots))
    for name, text in (
        ("table.md", table.markdown(rows, config.shots)),
        ("table.tex", table.latex(rows, config.shots)),
        ("table.csv", table.comma_separated(rows, config.shots)),
    ):
        write_atomically(folder / name, text.encode())
    colours = table.highlighted(rows, config.shots)
    write_atomically(folder / "accuracy.png", table.plot(rows, config.shots, colours))
    _report_levels(grid, records, against, console)
    if (calibration := summary.calibration(grid, records)) is not None:
        _report_lines([calibration], folder / "calibration.md", console)
        if pictured := summary.predictions(grid, records, list(colours)):
            write_atomically(folder / "reliability.png", reliability.picture(pictured, colours))
    if parts := shift.tables(grid, records):
        _report_lines(parts, folder / "shift.md", console)
    comparisons = _comparisons(grid, against, records)
    if comparisons:
        cells = _comparison_cells(comparisons)
        head, lines = table.lines_by_shots(list(comparisons), config.shots, cells, supervision(config.backbone))
        head[0] = "against"
        caption = (
            f"accuracy of {against} minus the method's, in points, with its 95 % interval; then the largest p-value of "
            "McNemar's exact test over seeds; images are taken as independent"
        )
        _report_lines([(caption, head, lines)], folder / "comparisons.md", console)
        write_atomically(folder / "comparisons.json", (json.dumps(comparisons, indent=1) + "\n").encode())
    console.out(f"Tables, plots and runs: {folder}")


def _report_levels(grid: Grid, records: summary.Records, method: str, console: Console) -> None:
    config, texts = grid.config, []
    for level, groups in grid.levels.items():
        rows = summary.accuracy_rows(grid, records, level)
        what = f"accuracy in % at the level {level} ({len(set(groups))} groups of {len(groups)} classes)"
        console.print(table.rich_table(rows, config.shots, what))
        texts.append(f"{what}, by the sum of its classes' probabilities:\n\n{table.markdown(rows, config.shots)}")
    if texts:
        write_atomically(config.folder / "levels.md", "\n".join(texts).encode())
    if texts and any(run.method == method for run in records):
        write_atomically(config.folder / "levels.png", summary.levels_picture(grid, records, method))


def _report_lines(parts: Sequence[shift.Table], path: Path, console: Console) -> None:
    for caption, head, lines in parts:
        console.print(table.rich_lines(head, lines, caption))
    write_atomically(path, shift.markdown(parts).encode())


def _comparisons(grid: Grid, against: str, records: dict[Run, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By method and shots: `against` compared with it, on the seeds that both have."""
    config = grid.config
    truth = grid.test.label_names

    def correct(method: str, k: int) -> dict[int, np.ndarray]:
        return {
            run.seed: np.array([p["label"] == name for p, name in zip(record["predictions"], truth, strict=True)])
            for run, record in records.items()
            if (run.method, run.num_shots) == (method, k)
        }

    found: dict[str, dict[str, Any]] = {}
    for method in config.methods:
        for k in config.shots if method != against else ():
            ours, theirs = correct(against, k), correct(method, k)
            seeds = sorted(ours.keys() & theirs.keys())
            if seeds:
                comparison = compare([ours[s] for s in seeds], [theirs[s] for s in seeds])
                found.setdefault(method, {})[str(k)] = asdict(comparison) | {"seeds": seeds}
    return found


def _comparison_cells(comparisons: dict[str, dict[str, Any]]) -> dict[tuple[str, int], str]:
    """The cells of the table of comparisons for each method and number of shots."""
    cells = {}
    for method, by_shots in comparisons.items():
        for k, comparison in by_shots.items():
            difference, low, high = (100 * comparison[key] for key in ("difference", "low", "high"))
            p = max(comparison["p_values"])
            shown = f"{p:.2f}" if p >= 0.01 else f"{p:.0e}"
            cells[method, int(k)] = f"{difference:+.1f} [{low:+.0f}, {high:+.0f}], {shown}"
    return cells
