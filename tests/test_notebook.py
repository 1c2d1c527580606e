"""The notebook runs from its first cell to its last, and is committed with the outputs of a whole training."""

from __future__ import annotations

import copy
import os
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs nbformat, of the extra docs")

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"


@pytest.fixture(scope="module")
def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_the_committed_notebook_is_valid_small_and_was_run_in_order(notebook: Any) -> None:
    nbformat.validate(notebook)
    assert NOTEBOOK.stat().st_size < 600_000
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3


def test_the_committed_outputs_tell_variants_apart(notebook: Any) -> None:
    right, asked = re.search(r"(\d+) of (\d+) right", code_cells(notebook)[3].outputs[0].text).groups()  # type: ignore[union-attr]
    assert int(right) > 0.4 * int(asked)  # chance: 0.25


def test_the_notebook_runs(notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nbclient", reason="needs nbclient and ipykernel, of the extra docs")
    startup = tmp_path / "profile_default" / "startup" / "quick.py"
    startup.parent.mkdir(parents=True)
    startup.write_text("import pages, pytest\npages.train_in_seconds(pytest.MonkeyPatch())\n")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(NOTEBOOK.parents[1]), str(Path(__file__).parent))))
    executed = runpy.run_path(str(NOTEBOOK.with_name("run_notebook.py")))["executed"]
    before = [[output.output_type for output in cell.outputs] for cell in code_cells(notebook)]
    after = code_cells(executed(copy.deepcopy(notebook), tmp_path))
    assert [[output.output_type for output in cell.outputs] for cell in after] == before
