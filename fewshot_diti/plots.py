"""What all pictures of figures share: colours that most people can tell apart, labels at the ends of lines, PNG."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.isotonic import isotonic_regression

# Okabe and Ito, 2008: distinguished by people with any kind of colour vision
BLUE, SKY, GREEN, ORANGE, VERMILION = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00"
BLACK, GREY, PALE = "#222222", "#777777", "#C4C4C4"


class End(NamedTuple):
    """Where a line ends, in the units of the axes, and its label."""

    x: float
    y: float
    text: str
    colour: str
    bold: bool = False


def label_ends(axes: Axes, ends: Sequence[End], *, fontsize: float = 8.5, lines: int = 1) -> None:
    """Writes labels right of the axes, each as near to its line's end as leaves room for the others.

    Call it last: it reads the limits and the height of the axes. `lines` of text are in the longest label.
    """
    figure: Any = axes.figure
    figure.draw_without_rendering()
    to_share = axes.transData + axes.transAxes.inverted()
    ends = sorted(ends, key=lambda end: to_share.transform((end.x, end.y))[1])
    at = np.array([to_share.transform((end.x, end.y))[1] for end in ends])
    room = (0.3 + lines) * fontsize * figure.dpi / 72 / axes.bbox.height * np.arange(len(ends))
    places = isotonic_regression(at - room) + room  # the nearest places that are a line of text apart
    for end, place in zip(ends, places, strict=True):
        axes.annotate(
            end.text,
            (end.x, end.y),
            (1.03, place),
            textcoords="axes fraction",
            fontsize=fontsize,
            color=end.colour,
            weight="bold" if end.bold else "normal",
            verticalalignment="center",
            arrowprops={"arrowstyle": "-", "color": end.colour, "lw": 0.6, "alpha": 0.6, "shrinkA": 1, "shrinkB": 2},
            annotation_clip=False,
        )


def tidy(axes: Axes) -> None:
    """A pale grid, and no frame but at the left and below."""
    axes.grid(color=PALE, alpha=0.5, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def png(figure: Figure) -> bytes:
    """The picture as PNG. Signs that the font lacks, such as Chinese ones, are boxes."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # one for each sign and size of text
        FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
