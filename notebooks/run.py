"""Run notebooks from top to bottom, in a fresh kernel each, and keep their outputs.

    python notebooks/run.py [NOTEBOOK.ipynb ...]

All of them when none is named; needs requirements-dev.txt. What is written is the same from any
machine but for rounding: no time stamps, no kernel's name, no paths. Pictures are kept with a
palette of 128 colours, which makes them a third of the size."""

from __future__ import annotations

import base64
import io
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).resolve().parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def run(notebook: nbformat.NotebookNode, folder: Path = FOLDER) -> float:
    """Execute the cells in order in a new kernel started in the folder, in place; the seconds it
    took. Raises nbclient.exceptions.CellExecutionError on the first cell that raises."""
    start = time.perf_counter()
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    return time.perf_counter() - start


def smaller(png: str) -> str:
    """A picture, base64 of PNG, with a palette of 128 colours."""
    picture, kept = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), io.BytesIO()
    picture.quantize(128, dither=Image.Dither.NONE).save(kept, "PNG", optimize=True)
    return base64.b64encode(kept.getvalue()).decode()


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Leave out what depends on when and where the notebook was run; make its pictures smaller."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for number, cell in enumerate(notebook.cells, 1):
        cell.id, cell.metadata = f"cell-{number:02}", nbformat.from_dict({})
        printed = [output for output in cell.get("outputs", []) if output.get("name") == "stdout"]
        if printed:  # comes in pieces, by chance
            printed[0].text = "".join(output.text for output in printed)
            cell.outputs = [
                output
                for output in cell.outputs
                if output is printed[0] or output.get("name") != "stdout"
            ]
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = smaller(output.data["image/png"])


def main(names: list[str]) -> None:
    """Run and rewrite each."""
    for path in sorted(map(Path, names)) or sorted(FOLDER.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        seconds = run(notebook)
        tidy(notebook)
        nbformat.write(notebook, path)
        print(
            f"{path.name:35} {seconds:5.1f} s  {len(notebook.cells):2} cells  "
            f"{path.stat().st_size / 1024:4.0f} KiB"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
