"""The tab Results: what `fewshot-diti eval` left in a folder."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fewshot_diti import plots
from fewshot_diti.app import markup
from fewshot_diti.app.events import QUICK, Context
from fewshot_diti.evaluation import table
from fewshot_diti.evaluation.methods import METHODS, supervision
from fewshot_diti.progress import counted
from fewshot_diti.reports import drawn_name

HOW_TO = (
    "There are no results yet. `fewshot-diti eval --quick --output_dir results` makes a first table of the bundled "
    "images; then start the page with `fewshot-diti app --results results`."
)
_RUN = re.compile(r"(\d+)-(\d+)\.json")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run.

    Attributes:
        record: as `eval` wrote it.
    """

    method: str
    num_shots: int
    seed: int
    record: dict[str, Any]


def read_results(folder: Path) -> dict[str, list[Cell]]:
    """The runs of each table in the folder, by the table's place in it: data set, backbone and shift.

    Failed runs, and files that are none, are left out.

    Raises:
        ValueError: no such folder, or no run in it.
    """
    found: dict[str, list[Cell]] = {}
    for path in sorted(folder.rglob("*.json")):
        if (match := _RUN.fullmatch(path.name)) and (record := _read(path)) is not None:
            place = path.parent.parent.relative_to(folder) if path.parent != folder else Path()
            cell = Cell(method=path.parent.name, num_shots=int(match[1]), seed=int(match[2]), record=record)
            found.setdefault(" / ".join(place.parts) or folder.resolve().name, []).append(cell)
    if not found:
        raise ValueError(f"{folder} holds no results; `fewshot-diti eval --output_dir {folder}` makes some.")
    return found


def methods_of(cells: Sequence[Cell]) -> list[str]:
    """In the order of `eval`, unknown ones last."""
    known = list(METHODS)
    names = {cell.method for cell in cells}
    return sorted(names, key=lambda name: (known.index(name) if name in known else len(known), name))


def shots_of(cells: Sequence[Cell]) -> list[int]:
    """Numbers of shots that there are runs of."""
    return sorted({cell.num_shots for cell in cells})


def rows_of(cells: Sequence[Cell], methods: Sequence[str], shots: Sequence[int]) -> list[table.Row]:
    """Rows of the table for these methods and numbers of shots."""
    apart = supervision(cells[0].record.get("made_by", {}).get("backbone", "")) if cells else {}
    seeds = len({cell.seed for cell in cells})
    return [
        table.Row(
            name=method,
            accuracy={
                k: [100 * c.record["accuracy"] for c in cells if (c.method, c.num_shots) == (method, k)] for k in shots
            },
            seeds=seeds,
            supervision=apart.get(method, ""),
        )
        for method in methods
    ]


def by_class(cells: Sequence[Cell], methods: Sequence[str], num_shots: int) -> bytes:
    """PNG of the accuracy on each class at one number of shots, mean over seeds; a dot for each method."""
    means: dict[str, dict[str, float]] = {}
    for method in methods:
        of = [c.record["accuracy_by_class"] for c in cells if (c.method, c.num_shots) == (method, num_shots)]
        if of:
            means[method] = {name: 100 * float(np.mean([shares[name] for shares in of])) for name in of[0]}
    classes = sorted({name for shares in means.values() for name in shares})
    colours = table.highlighted(rows_of(cells, methods, [num_shots]), [num_shots])
    figure = Figure(figsize=(8.5, max(3.0, 0.32 * len(classes) + 1.2)), dpi=130, layout="constrained")
    axes = figure.subplots()
    for method, shares in means.items():
        colour = colours.get(method)
        style: dict[str, Any] = {"color": colour, "s": 42, "zorder": 3} if colour else {"color": plots.PALE, "s": 22}
        places = [classes.index(name) for name in shares]
        axes.scatter(list(shares.values()), places, label=method if colour else None, **style)
    axes.set(yticks=range(len(classes)), yticklabels=[drawn_name(name) for name in classes], xlim=(-3, 103))
    axes.set_xlabel(f"accuracy (%) with {counted(num_shots, 'shot')} per class, mean over seeds")
    axes.invert_yaxis()
    plots.tidy(axes)
    axes.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=4)
    return plots.png(figure)


_SHOWN = {"accuracy", "accuracy_by_class"}


def _read(path: Path) -> dict[str, Any] | None:
    """The record of a run that did not fail."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record if record["status"] == "ok" and record.keys() >= _SHOWN else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def show(cells: Sequence[Cell], methods: Sequence[str], shots: Sequence[int]) -> tuple[str, str]:
    """The table as Markdown, and the plots as HTML, for these methods and numbers of shots."""
    methods = [name for name in methods_of(cells) if name in methods]
    shots = [k for k in shots_of(cells) if k in shots]
    if not methods or not shots:
        return "", markup.note("Choose a method and a number of shots.")
    rows = rows_of(cells, methods, shots)
    pictures = (
        markup.picture(table.plot(rows, shots, table.highlighted(rows, shots)), "accuracy by shots"),
        markup.picture(by_class(cells, methods, shots[-1]), "accuracy by class"),
    )
    return table.markdown(rows, shots), f'<div class="plots">{"".join(pictures)}</div>'


def build(context: Context, folder: Path | None) -> None:
    """The tab.

    Args:
        folder: of results, where there is one.
    """
    import gradio as gr

    gr.Markdown(
        "How accurate the methods of a few-shot table are: mean ± standard deviation over draws of the shots, in %, "
        "best in bold among those without labels of sibling classes."
    )
    if folder is None:
        gr.Markdown(HOW_TO)
        return
    results = read_results(folder)
    first = max(results, key=lambda name: len(results[name]))

    def choose(name: str) -> tuple[Any, ...]:
        cells = results[name]
        methods, shots = methods_of(cells), shots_of(cells)
        boxes = (gr.CheckboxGroup(values, value=values) for values in (methods, shots))
        return *boxes, *show(cells, methods, shots)

    cells = results[first]
    all_methods, all_shots = methods_of(cells), shots_of(cells)
    of = gr.Dropdown(list(results), value=first, label="Data set / backbone / shift", visible=len(results) > 1)
    with gr.Row():
        methods = gr.CheckboxGroup(all_methods, value=all_methods, label="Methods", scale=3, elem_id="methods")
        shots = gr.CheckboxGroup(all_shots, value=all_shots, label="Shots per class", elem_id="shots")
    lines, pictures = show(cells, all_methods, all_shots)
    shown = [gr.Markdown(lines, elem_id="results-table"), gr.HTML(pictures, elem_id="results-plots")]
    of.input(context.answering(choose), of, [methods, shots, *shown], **QUICK)
    gr.on(
        [methods.input, shots.input],
        context.answering(lambda name, *chosen: show(results[name], *chosen)),
        [of, methods, shots],
        shown,
        trigger_mode="always_last",
        **QUICK,
    )
