"""Every notebook runs from top to bottom on this machine, and is stored without what it printed."""

import os
from pathlib import Path

import pytest
from optional import nbclient, nbformat

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def execute(path, directory):
    """The notebook after a run in a fresh kernel of this Python, started in `directory`."""
    notebook = nbformat.read(path, as_version=4)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(directory), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)  # a notebook that needs it sets it
    resources = {"metadata": {"path": str(directory)}}
    nbclient.NotebookClient(notebook, kernel_name="python3", timeout=300, resources=resources).execute(env=environment)
    return notebook


def outputs(notebook, kind):
    """The outputs of one MIME type, or what was printed for "text"."""
    found = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    if kind == "text":
        return "".join(output.text for output in found if output.output_type == "stream" and output.name == "stdout")
    return [output.data[kind] for output in found if kind in output.get("data", {})]


@every_notebook
def test_is_stored_without_outputs(path):
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_attention_runs_from_the_formula_to_the_charts(tmp_path):
    notebook = execute(ROOT / "notebooks" / "01_attention.ipynb", tmp_path)
    printed = outputs(notebook, "text")
    for backend in ("eager", "sdpa", "triton"):
        assert f"{backend:7} agrees with the three lines above" in printed
    assert "m_i = 5.0, alpha = 0.1353, l_i = 1.2034" in printed
    assert "tiles: {'full': 12, 'masked': 8, 'skipped': 12}" in printed
    assert "triton  largest errors of dq, dk, dv:" in printed
    assert "not timed: no GPU" in printed
    assert len(outputs(notebook, "image/png")) == 3  # the tiles, the two charts of the sweep
    assert (tmp_path / "out" / "attention_sweep_quick.json").exists()
