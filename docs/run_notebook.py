"""Runs the notebook, keeps its outputs but for progress bars, and writes it back: `python docs/run_notebook.py`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent / "notebook.ipynb"


def executed(notebook: Any, folder: str | Path) -> Any:
    """The notebook with the outputs of a run in a folder, without what went to the standard error output."""
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(executed(nbformat.read(NOTEBOOK, as_version=4), folder), NOTEBOOK)
