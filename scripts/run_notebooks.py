"""Execute the tutorials, and store their outputs: python scripts/run_notebooks.py [NAME …].

Each notebook runs in an empty folder of its own, on the CPU, so that it needs no file and leaves
none. The site and GitHub show the stored outputs. The tests execute the notebooks again.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "tutorials"


def executed(path: Path, folder: Path) -> NotebookNode:
    """The notebook with its outputs, run in a folder; raises the first error of a cell."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "JUPYTER_PLATFORM_DIRS": "1"})
    return notebook


def without_traces(notebook: NotebookNode) -> NotebookNode:
    """Leave out versions, identifiers, and bars of progress, which are empty at the end."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = NotebookNode(kernelspec=kernel, language_info={"name": "python"})
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = NotebookNode()
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("data", {}).get("text/html") != ""]
    return notebook


def main(names: list[str]) -> None:
    for path in sorted(FOLDER.glob("*.ipynb")):
        if names and path.stem not in names:
            continue
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            notebook = without_traces(executed(path, Path(folder)))
        text = nbformat.writes(notebook, indent=1, ensure_ascii=False)
        path.write_text(text.rstrip() + "\n", encoding="utf-8")
        size = path.stat().st_size / 1000
        print(f"{path.name}: {time.perf_counter() - began:.0f} s, {size:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
