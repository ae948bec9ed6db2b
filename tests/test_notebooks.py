"""Every notebook runs from top to bottom on this machine, and is stored with what it prints and draws."""

import pytest
from optional import nbformat

from notebooks import NOTEBOOKS, ROOT, execute, outputs, words

LARGEST = 300_000  # bytes of a notebook: it is read on the web, and kept in git

# What each prints where it is right, and how many figures it draws.
EXPECTED = {
    "01_attention": (
        [
            *(f"{backend:7} agrees with the three lines above" for backend in ("eager", "sdpa", "triton")),
            "m_i = 5.0, alpha = 0.1353, l_i = 1.2034",
            "tiles: {'full': 12, 'masked': 8, 'skipped': 12}",
            "triton  largest errors of dq, dk, dv:",
            "not timed: no GPU",
        ],
        3,  # the tiles, the two charts of the sweep
    ),
    "02_backward": (
        [
            *(f"{name} is autograd's" for name in ("dq", "dk", "dv")),
            *(f"tiles of {blocks} agree" for blocks in ("(4, 4)", "(5, 3)", "(12, 12)")),
            "triton  largest errors of dq, dk, dv:",
            "two runs have the same bits: True",
        ],
        1,
    ),
    "03_decode": (
        [
            "the same tokens: True - read without a cache: 990 - with one: 59",
            "generate() says them, too: True",
            "in a longer buffer, has the same bits: True",
        ],
        1,
    ),
    "04_gpt2": (["row 1 alone says the same: True", "layers whose MLP was seen: [0, 1, 2, 3, 4, 5]"], 2),
    "05_training": (["right: 15", "a head looks 15 tokens back: True - in the first layer: True"], 1),
    "06_race": (
        [
            "reverse: global-memory race: reads",
            "of scratch_ptr, which warp",
            *(f"seed {seed}: right True" for seed in (None, 1, 2, 3)),
            "double: out-of-bounds 4-byte access",
            "the tensor is as it was: True",
        ],
        1,
    ),
}
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@every_notebook
def test_is_stored_as_it_ran(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert {output.output_type for cell in code for output in cell.outputs} <= {
        "stream",
        "display_data",
        "execute_result",
    }
    text = path.read_text(encoding="utf-8")
    assert len(text) <= LARGEST
    assert [place for place in ("/tmp/", "/home/", str(ROOT)) if place in text] == []


@every_notebook
def test_runs_and_says_what_is_stored(path, tmp_path):
    said, figures = EXPECTED[path.stem]
    notebook = execute(path, tmp_path)
    assert not path.stem.startswith("01") or (tmp_path / "out" / "attention_sweep_quick.json").exists()
    printed = outputs(notebook, "text")
    for sentence in said:
        assert sentence in printed
    assert len(outputs(notebook, "image/png")) == figures
    assert words(notebook) == words(nbformat.read(path, as_version=4))  # `make notebooks` stores it anew
