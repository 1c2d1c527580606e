"""Which time-steps tell the true class from its rivals? Curves from the errors that `eval.fewshot` left.

    python -m eval.gaps --shift livery --shots 1 2 4 --output_dir results

Takes the flags of `python -m eval.fewshot` that choose runs; draws whose class tokens have not been scored yet are left
out. Writes one plot a number of shots beside the tables.
"""

from __future__ import annotations

import tyro

from fewshot_diti.evaluation.gaps import join, measure, plot
from fewshot_diti.evaluation.grid import Grid, GridConfig
from fewshot_diti.files import write_atomically


def main(config: GridConfig) -> None:
    """Writes the plots."""
    grid = Grid(config)
    for num_shots in config.shots:
        parts = []
        for seed in config.seeds:
            task = grid.task(num_shots, seed)
            try:
                parts.append(measure(grid.bench.diti(task), task, config.column))
            except FileNotFoundError as error:
                print(f"{error} Run python -m eval.fewshot first.")
        if parts:
            path = config.folder / f"gaps-{num_shots}.png"
            title = f"{num_shots} shot{'s' if num_shots > 1 else ''}, {len(parts)} seed{'s' if len(parts) > 1 else ''}"
            write_atomically(path, plot(join(parts), title))
            print(f"wrote {path}")


if __name__ == "__main__":
    main(tyro.cli(GridConfig))
