"""Pieces of the page as HTML. All texts are escaped here, whoever wrote them."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

from PIL import Image

from fewshot_diti.config import Label
from fewshot_diti.reports import printable

LONGEST = 60  # letters of a class name that are shown; the whole name is the tooltip


def text(value: object) -> str:
    """Any text on the page, on one line."""
    return escape(printable(str(value)))


def name(label: Label) -> str:
    """A class name, cut where it is long."""
    whole = printable(str(label))
    shown = whole if len(whole) <= LONGEST else f"{whole[: LONGEST - 1]}\u2026"
    return f'<span title="{escape(whole)}">{escape(shown)}</span>'


def picture(image: Image.Image | bytes, title: str = "") -> str:
    """A picture, or the bytes of a PNG, inside the page."""
    return f'<img src="{address(image)}" alt="{escape(title)}" title="{escape(title)}">'


def address(image: Image.Image | bytes) -> str:
    """An address of a picture, or of the bytes of a PNG, that needs no request."""
    if not isinstance(image, bytes):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        image = buffer.getvalue()
    return f"data:image/png;base64,{base64.b64encode(image).decode()}"


def bars(probabilities: Mapping[Label, float]) -> str:
    """A bar for each class, as long as its probability (0 to 1)."""
    rows = "".join(
        f'<div class="bar"><div class="bar-name">{name(label)}</div>'
        f'<div class="bar-line"><div style="width: {100 * p:.1f}%"></div></div>'
        f'<div class="bar-share">{100 * p:.1f} %</div></div>'
        for label, p in probabilities.items()
    )
    return f'<div class="bars">{rows}</div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    first = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="plain"><thead><tr>{first}</tr></thead><tbody>{body}</tbody></table>'


def note(sentence: str) -> str:
    """A sentence where there is nothing else to show yet."""
    return f'<p class="note">{text(sentence)}</p>'
