"""The table and the plot of a grid: methods by shots, mean and standard deviation over seeds."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.table import Table
from rich.text import Text

from fewshot_diti import plots

OURS = {"fewshot-diti": plots.BLUE, "diti": plots.SKY}  # the classifier as it ships, and class tokens alone
PUBLISHED_SHOTS = (1, 2, 4, 8, 16)
PUBLISHED = {  # accuracy in %, FGVC-Aircraft: Yue et al., CVPR 2024
    "zero-shot SD 2.0": (24.3,) * 5,
    "zero-shot OpenCLIP ViT-H": (42.3,) * 5,
    "Tip-Adapter, OpenCLIP ViT-H": (48.4, 53.9, 57.0, 62.0, 67.4),
    "DiTi, SD 2.0": (48.5, 55.8, 64.2, 74.2, 79.9),
}
PUBLISHED_SOURCE = "Yue et al., CVPR 2024"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method's accuracy in %.

    Attributes:
        name: of the method.
        accuracy: by shots, one number per seed.
        seeds: how many there should be.
        source: of published numbers, "" for measured ones.
        supervision: what the method has beyond the shots of the others, "" where they compete on equal terms.
    """

    name: str
    accuracy: Mapping[int, Sequence[float]]
    seeds: int = 1
    source: str = ""
    supervision: str = ""

    @property
    def title(self) -> str:
        """The name, with what sets the row apart."""
        apart = f"published, {self.source}" if self.source else self.supervision
        return f"{self.name} ({apart})" if apart else self.name

    @property
    def competes(self) -> bool:
        """Whether it is measured, on equal terms with the others."""
        return not self.source and not self.supervision

    def mean(self, num_shots: int) -> float:
        """Over seeds; NaN where there is no run."""
        values = self.accuracy.get(num_shots, ())
        return float(np.mean(values)) if len(values) else float("nan")

    def average(self, shots: Sequence[int]) -> float:
        """Of the means of these shots; NaN where one is missing."""
        return float(np.mean([self.mean(k) for k in shots]))


def published_rows(shots: Sequence[int]) -> list[Row]:
    """What the paper reports on FGVC-Aircraft, at these shots."""
    return [
        Row(
            name=name,
            accuracy={k: (v,) for k, v in zip(PUBLISHED_SHOTS, values, strict=True) if k in shots},
            source=PUBLISHED_SOURCE,
        )
        for name, values in PUBLISHED.items()
    ]


def _whole(row: Row, shots: Sequence[int]) -> bool:
    """Whether the row competes at these shots: on equal terms, and with all seeds."""
    return row.competes and all(len(row.accuracy.get(k, ())) == row.seeds for k in shots)


def _cells(row: Row, shots: Sequence[int]) -> list[str]:
    cells = []
    for k in shots:
        values = row.accuracy.get(k, ())
        spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
        lacking = f" ({len(values)} of {row.seeds} seeds)" if len(values) < row.seeds else ""
        cells.append(f"{np.mean(values):.1f}{spread}{lacking}" if len(values) else "")
    average = row.average(shots)
    return [*cells, "" if np.isnan(average) else f"{average:.1f}"]


def _marked(rows: Sequence[Row], shots: Sequence[int], bold: Callable[[str], Any]) -> list[list[Any]]:
    """Lines of the table, the best number of each column as `bold` makes it."""
    columns = [*((k,) for k in shots), tuple(shots)]  # the last: their average
    best = [max((row.average(c) for row in rows if _whole(row, c)), default=float("nan")) for c in columns]
    lines = []
    for row in rows:
        cells = [
            bold(cell) if _whole(row, column) and row.average(column) == top else cell
            for cell, column, top in zip(_cells(row, shots), columns, best, strict=True)
        ]
        lines.append([row.title, *cells])
    return lines


def _head(shots: Sequence[int]) -> list[str]:
    return ["method", *(f"{k} shot" if k == 1 else f"{k} shots" for k in shots)]


def rich_table(rows: Sequence[Row], shots: Sequence[int], what: str = "accuracy in %") -> Table:
    """For the screen."""
    caption = f"{what}: mean ± standard deviation over seeds; best in bold"
    if any(row.supervision for row in rows):
        caption += " among rows without labels of sibling classes"
    return rich_lines([*_head(shots), "average"], _marked(rows, shots, lambda cell: Text(cell, style="bold")), caption)


def markdown(rows: Sequence[Row], shots: Sequence[int]) -> str:
    """For a page."""
    return markdown_lines([*_head(shots), "average"], _marked(rows, shots, "**{}**".format))


def lines_by_shots(
    names: Sequence[str], shots: Sequence[int], cells: Mapping[tuple[str, int], str], supervision: Mapping[str, str]
) -> tuple[list[str], list[list[str]]]:
    """Head and lines of a table of cells by (name, shots); a missing one stays empty. `supervision`: as of `Row`."""
    titles = {name: Row(name=name, accuracy={}, supervision=supervision.get(name, "")).title for name in names}
    return _head(shots), [[titles[name], *(cells.get((name, k), "") for k in shots)] for name in names]


def rich_lines(head: Sequence[str], lines: Sequence[Sequence[str | Text]], caption: str) -> Table:
    """Lines of text as a table for the screen."""
    table = Table(caption=caption, caption_justify="left", box=box.SIMPLE_HEAD)
    for i, title in enumerate(head):
        table.add_column(title, justify="right" if i else "left", no_wrap=not i)
    for line in lines:
        table.add_row(*line)
    return table


def markdown_lines(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """The same for a page."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "".join("| " + " | ".join(line) + " |\n" for line in (head, rule, *lines))


def latex(rows: Sequence[Row], shots: Sequence[int]) -> str:
    """For a paper; needs the package booktabs."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join(cells).replace("±", r"$\pm$").replace("%", r"\%").replace("_", r"\_") + r" \\" + "\n"

    columns = "l" + "r" * (len(shots) + 1)
    body = "".join(line(cells) for cells in _marked(rows, shots, r"\textbf{{{}}}".format))
    begin, end = f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n", "\\bottomrule\n\\end{tabular}\n"
    return f"{begin}{line([*_head(shots), 'average'])}\\midrule\n{body}{end}"


def comma_separated(rows: Sequence[Row], shots: Sequence[int]) -> str:
    """One line per method and number of shots: mean, standard deviation, seeds, source, extra supervision."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["method", "shots", "mean", "standard_deviation", "seeds", "source", "supervision"])
    for row in rows:
        for k in shots:
            values = row.accuracy.get(k, ())
            if len(values):
                deviation = f"{np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
                writer.writerow(
                    [row.name, k, f"{np.mean(values):.3f}", deviation, len(values), row.source, row.supervision]
                )
    return buffer.getvalue()


def highlighted(rows: Sequence[Row], shots: Sequence[int]) -> dict[str, str]:
    """The colours of a few rows, by name: the classifier as it ships, class tokens alone, and the best baselines."""
    names = {row.name for row in rows}
    colours = {name: colour for name, colour in OURS.items() if name in names}
    others = [row for row in rows if row.competes and not row.name.startswith(("diti", "fewshot-diti"))]
    known = [row for row in others if not np.isnan(row.average(shots))]
    best = sorted(known, key=lambda row: -row.average(shots))
    return colours | {row.name: c for row, c in zip(best, (plots.VERMILION, plots.ORANGE), strict=False)}


def plot(
    rows: Sequence[Row], shots: Sequence[int], colours: Mapping[str, str], *, ylabel: str = "accuracy (%)"
) -> bytes:
    """PNG of accuracy over shots, the rows that have `colours` in these and the others in grey, each named at its right
    end.

    Bands of the rows in colour are one standard deviation over seeds; dotted is what does not compete.
    """
    figure = Figure(figsize=(8.5, max(4.5, 0.24 * len(rows) + 1)), dpi=130, layout="constrained")
    axes = figure.subplots()
    ends = []
    for row in rows:
        known = [k for k in shots if len(row.accuracy.get(k, ()))]
        if not known:
            continue
        means, colour = np.array([row.mean(k) for k in known]), colours.get(row.name)
        style: dict[str, Any] = {"lw": 2.4, "zorder": 3} if colour else {"lw": 1.1, "zorder": 2}
        line = "-" if row.competes else ":"
        axes.plot(known, means, line, marker="o", markersize=3.5, color=colour or plots.PALE, **style)
        if colour:
            spread = np.array([np.std(row.accuracy[k], ddof=1) if len(row.accuracy[k]) > 1 else 0.0 for k in known])
            axes.fill_between(known, means - spread, means + spread, color=colour, alpha=0.15, lw=0)
        title = f"{row.title}  {means[-1]:.1f}"
        ends.append(plots.End(known[-1], means[-1], title, colour or plots.GREY, bold=bool(colour)))
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(shots), [str(k) for k in shots])
    axes.set(xlabel="shots per class", ylabel=ylabel)
    plots.tidy(axes)
    plots.label_ends(axes, ends)
    return plots.png(figure)
