"""The effect of an attribute that test images share with the shots: on matched, shifted and misleading images.

Of the test images that have a value of the attribute, such as an airline, those are *matched* whose value the shots of
their own class show, and the others *shifted*; *misleading* are the shifted ones whose value the shots of another class
show.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fewshot_diti.evaluation import table
from fewshot_diti.evaluation.grid import Grid, Run
from fewshot_diti.evaluation.methods import supervision
from fewshot_diti.evaluation.metrics import FEWEST_GROUPS, accuracy_with_interval, drop_from_matched_to_shifted

Table = tuple[str, list[str], list[list[str]]]  # caption, head, lines


@dataclass(frozen=True, kw_only=True, eq=False)
class _Images:
    """Test images of all seeds of a method and number of shots that have a value of the attribute: [N] each.

    `misclassified`: whether the shots of the predicted class show the image's value.
    """

    correct: np.ndarray
    matched: np.ndarray
    misleading: np.ndarray
    misclassified: np.ndarray
    labels: np.ndarray
    groups: np.ndarray


def tables(grid: Grid, records: Mapping[Run, dict[str, Any]]) -> list[Table]:
    """What the runs say of the three kinds of images; nothing where no image has a value of the attribute."""
    config = grid.config
    draws = {(run.num_shots, run.seed) for run in records}
    shown = {draw: shown_NC for draw in draws if (shown_NC := grid.shown(grid.task(*draw))) is not None}
    cells = [(method, k) for method in config.methods for k in config.shots]
    images = {cell: x for cell in cells if (x := _images(grid, records, shown, *cell)) is not None}
    over = f"[95 % interval, bootstrap over {config.column}; none where fewer than {FEWEST_GROUPS} occur]"
    how = f"accuracy in % {over}, images of all seeds"
    mixed = [str(k) for k in config.shots if config.shifted and not grid.of_one_value(k)]
    if mixed:
        how += f"; {', '.join(mixed)} shots are drawn as usual: some class has too few images of any {config.column}"
    parts: dict[str, Callable[[_Images], str]] = {
        f"matched test images, which share their {config.column} with the shots of their class: {how}": _on_matched,
        f"shifted test images, which do not: {how}": _on_shifted,
        f"misleading test images, which share their {config.column} with shots of another class alone: how many in % "
        f"are predicted as a class whose shots show it {over}": _misclassified,
        "drop of accuracy from matched to shifted in points [95 % interval, bootstrap over classes], mean over the "
        "classes that have both": _drop,
    }
    found = []
    for caption, cell in parts.items():
        texts = {key: cell(of_cell) for key, of_cell in images.items()}
        if any(texts.values()):
            found.append(
                (caption, *table.lines_by_shots(config.methods, config.shots, texts, supervision(config.backbone)))
            )
    return found


def markdown(parts: Sequence[Table]) -> str:
    """The tables for a page."""
    return "\n".join(f"{caption}:\n\n{table.markdown_lines(head, lines)}" for caption, head, lines in parts)


def _images(
    grid: Grid,
    records: Mapping[Run, dict[str, Any]],
    shown: Mapping[tuple[int, int], np.ndarray],
    method: str,
    num_shots: int,
) -> _Images | None:
    test, parts = grid.test, []
    for run, record in records.items():
        shown_NC = shown.get((run.num_shots, run.seed))
        if shown_NC is None or (run.method, run.num_shots) != (method, num_shots):
            continue
        kinds = grid.kinds(shown_NC)
        known = kinds["matched"] | kinds["shifted"]
        predicted = np.array([test.class_names.index(p["label"]) for p in record["predictions"]])
        columns = {
            "correct": predicted == test.labels,
            "matched": kinds["matched"],
            "misleading": kinds["misleading"],
            "misclassified": shown_NC[np.arange(len(predicted)), predicted],
            "labels": test.labels,
            "groups": np.array(test.attributes[grid.config.column]),
        }
        parts.append({name: column[known] for name, column in columns.items()})
    return _Images(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]}) if parts else None


def _on_matched(images: _Images) -> str:
    return _share(images.correct, images.matched, images.groups)


def _on_shifted(images: _Images) -> str:
    return _share(images.correct, ~images.matched, images.groups)


def _misclassified(images: _Images) -> str:
    return _share(images.misclassified, images.misleading, images.groups)


def _share(holds: np.ndarray, kind: np.ndarray, groups: np.ndarray) -> str:
    if not kind.any():
        return ""
    figures = accuracy_with_interval(holds[kind], groups[kind].tolist())
    share, (low, high) = f"{100 * figures['accuracy']:.1f}", figures["interval"]
    # an image that occurs once per seed is no new one, so that an interval over images would be too narrow
    return f"{share} [{100 * low:.0f}, {100 * high:.0f}]" if figures["interval_over"] == "groups" else share


def _drop(images: _Images) -> str:
    drop = drop_from_matched_to_shifted(images.correct, images.matched, images.labels)
    if drop is None:
        return ""
    return "{:.1f} [{:.0f}, {:.0f}]".format(*(100 * x for x in (drop.matched - drop.shifted, drop.low, drop.high)))
