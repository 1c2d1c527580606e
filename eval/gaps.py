"""Which time-steps tell the true class from its rivals? Curves from the errors that `eval.fewshot` left.

    python -m eval.gaps --shift livery --shots 1 2 4 --output_dir results

Of test images whose airline the shots of another class show and those of their own do not: how far such rivals are, and
how far the others. Takes the flags of `python -m eval.fewshot` that choose runs; draws whose class tokens have not been
scored yet are left out. Writes one plot a number of shots beside the tables, and prints what small, all and large t
tell at the same number of trials.
"""

from __future__ import annotations

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from fewshot_diti.evaluation.config import GridConfig
from fewshot_diti.evaluation.gaps import equal_trials, join, measure, plot
from fewshot_diti.evaluation.grid import Grid
from fewshot_diti.evaluation.methods import LARGE_T, SMALL_T
from fewshot_diti.files import write_atomically


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
