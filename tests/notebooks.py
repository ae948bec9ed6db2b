"""Runs notebooks: `python tests/notebooks.py [NAME ...]` runs those of notebooks/ and stores what they print and draw.

Stored are outputs alone: no times, no paths of this machine. A cell with the tag NOT_KEPT, which measures, keeps none.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

from optional import nbclient, nbformat

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NOT_KEPT = "not-kept"
KINDS = ("image/png", "text/plain")  # that are stored


def execute(path, directory):
    """The notebook after a run in a fresh kernel of this Python, started in `directory`."""
    notebook = nbformat.read(path, as_version=4)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(directory), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)  # a notebook that needs it sets it
    environment.pop("GPT2_CHECKPOINT", None)
    resources = {"metadata": {"path": str(directory)}}
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=300, resources=resources).execute(env=environment)
    return notebook


def outputs(notebook, kind):
    """The outputs of one MIME type, or what was printed for "text"."""
    found = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    if kind == "text":
        return "".join(output.text for output in found if output.output_type == "stream" and output.name == "stdout")
    return [output.data[kind] for output in found if kind in output.get("data", {})]


def words(notebook):
    """What was printed, and is kept, without numbers: the same on every machine."""
    return re.sub(r"[-+]?\d[\d.,]*(e[-+]?\d+)?", " ", outputs(stripped(notebook), "text")).split()


def stripped(notebook):
    """The notebook as it is stored."""
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = {"tags": tags} if tags else {}
        for output in cell.get("outputs", ()):
            output.get("metadata", {}).clear()
            if "data" in output:
                output.data = {kind: output.data[kind] for kind in KINDS if kind in output.data}
        if cell.cell_type == "code":
            kept = [] if NOT_KEPT in tags else cell.outputs
            cell.outputs = [output for output in kept if output.get("name") != "stderr"]
    return notebook


def main(names):
    for path in NOTEBOOKS:
        if not names or path.stem in names:
            with tempfile.TemporaryDirectory() as directory:
                nbformat.write(stripped(execute(path, directory)), path)
            print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
