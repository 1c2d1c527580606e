"""The order of modules that docs/architecture.md promises."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PACKAGE = ROOT / "fewshot_diti"


def rows_of_modules() -> dict[str, int]:
    """Row of the page's table of modules in which each module or sub-package stands."""
    table = PAGE[PAGE.index("## Modules") :].split("\n\n")[2]
    cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    return {name.rstrip("/"): row for row, cell in enumerate(cells) for name in re.findall(r"`([\w/]+)`", cell)}


def imported(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports when it is loaded."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        # what is imported for type checkers alone, or inside a function, is indented
        if (
            isinstance(node, ast.ImportFrom)
            and node.col_offset == 0
            and (node.module or "").startswith("fewshot_diti.")
        ):
            yield node.module.split(".")[1]  # type: ignore[union-attr]


def test_every_module_stands_in_the_table_once() -> None:
    there = {
        p.stem if p.is_file() else p.name
        for p in PACKAGE.iterdir()
        if p.suffix == ".py" or (p / "__init__.py").is_file()
    }
    assert set(rows_of_modules()) == there - {"__init__", "__main__"}


def test_no_module_imports_from_a_row_below_its_own() -> None:
    rows = rows_of_modules()
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in PACKAGE.rglob("*.py")
        if (own := rows.get(path.relative_to(PACKAGE).parts[0].removesuffix(".py"))) is not None
        for name in imported(path)
        if rows[name] > own
    ]
    assert not wrong


def test_the_walk_of_one_image_names_at_most_eight_modules_that_are_there() -> None:
    walk = PAGE[PAGE.index("## One image") : PAGE.index("Training comes before")]
    steps = re.findall(r"^\| \d \| `([\w/.]+)`", walk, re.MULTILINE)
    assert 0 < len(steps) <= 8
    assert all((PACKAGE / step).is_file() for step in steps)
