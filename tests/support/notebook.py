"""Runs a notebook's code cells in one namespace, without Jupyter.

`python tests/support/notebook.py NOTEBOOK.ipynb` runs it and keeps what each cell prints as its output.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any


def run(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Execute the code cells in order: the names they leave behind, and what each printed. A cell's error is raised."""
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for number, cell in enumerate(code_cells(json.loads(path.read_text()))):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile("".join(cell["source"]), f"{path}, code cell {number}", "exec"), names)
        printed.append(out.getvalue())
    return names, printed


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """Cells that hold code, in order."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def write_outputs(path: Path) -> None:
    """Run a notebook and write what its cells print into it."""
    notebook, printed = json.loads(path.read_text()), run(path)[1]
    for number, (cell, text) in enumerate(zip(code_cells(notebook), printed)):
        stream = {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}
        cell["outputs"], cell["execution_count"] = [stream] if text else [], number + 1
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    write_outputs(Path(sys.argv[1]))
