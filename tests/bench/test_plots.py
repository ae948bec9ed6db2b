"""Charts come from the JSON alone, whatever machine wrote it and however many of its rows have no number."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread

from bench import plots

ROOT = Path(plots.__file__).parents[1]


def gpu_rows():
    """What a sweep on a GPU could have written, with each status that a row can have."""
    rows = []
    for mode in ("forward", "backward"):
        for name, tflops in (("eager", 20.0), ("sdpa", 200.0), ("sdpa-cudnn", 260.0), ("triton", 240.0)):
            for T in (1024, 4096, 16384):
                status = "ok"
                if name == "eager" and T == 16384:
                    status = "out of memory"
                if name == "triton" and T == 4096 and mode == "backward":
                    status = "failed: error of dq is 1.0e-02, allowed 2.0e-03"
                if name == "sdpa-cudnn" and mode == "backward":
                    status = "not supported: SDPA has no such kernel for this request"
                rows.append(attention_row(name, mode, T, 2.0 * T / tflops, tflops, status))
    return rows


def attention_row(name, mode, T, ms, tflops, status="ok", **changes):
    if status != "ok":
        ms = tflops = None
    shape = {"backend": name, "mode": mode, "dtype": "float16", "B": 1, "H": 12, "T": T, "D": 64, "causal": True}
    times = {"median_ms": ms, "p20_ms": ms, "p80_ms": ms, "tflops": tflops, "peak_memory_mb": None, "error": 1e-3}
    return shape | times | {"lane": "gpu", "status": status} | changes


def write(path, rows, **environment):
    path.write_text(json.dumps({"environment": {"device": "NVIDIA H100 80GB HBM3", **environment}, "rows": rows}))
    return path


def assert_chart(path):
    """A PNG of a sensible size that is neither blank nor of one colour."""
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(path)
    height, width, _ = pixels.shape
    assert 600 <= width <= 4000
    assert 400 <= height <= 4000
    assert len({tuple(pixel) for pixel in pixels[::7, ::7].reshape(-1, pixels.shape[2]).round(2).tolist()}) > 5


def test_the_command_draws_a_file_from_elsewhere_and_needs_no_torch(tmp_path):
    file = write(tmp_path / "from_a_friend.json", gpu_rows(), commit="160bbfe012", dirty=True)
    script = (
        f"import sys, runpy; sys.argv = ['plots.py', {str(file)!r}]; runpy.run_path('bench/plots.py', "
        "run_name='__main__'); assert not {'torch', 'triton'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    charts = [tmp_path / "attention_speedup.png", tmp_path / "attention_throughput.png"]
    assert done.stdout == "".join(f"wrote {chart}\n" for chart in charts)
    for chart in charts:
        assert_chart(chart)
    assert len(list(tmp_path.iterdir())) == 3


def test_speedup_is_the_baselines_time_over_ones_own():
    speedup, throughput = plots.CHARTS[1:3]
    rows = [row for row in gpu_rows() if row["mode"] == "forward"]
    assert plots._baseline(speedup, rows) == "sdpa"
    curves = plots._curves(speedup, rows, "sdpa")
    assert curves["sdpa"] == ([1024, 4096, 16384], [1.0, 1.0, 1.0])
    assert curves["triton"] == ([1024, 4096, 16384], pytest.approx([1.2, 1.2, 1.2]))
    assert curves["eager"] == ([1024, 4096], pytest.approx([0.1, 0.1]))
    assert plots._curves(throughput, rows, None)["sdpa-cudnn"] == ([1024, 4096, 16384], [260.0, 260.0, 260.0])


def test_a_row_without_a_time_is_named_with_its_reason():
    backward = [row for row in gpu_rows() if row["mode"] == "backward"]
    notes = plots._notes(plots.CHARTS[1], backward)
    assert "eager at 16k (out of memory)" in notes
    assert "triton at 4k (failed its correctness gate)" in notes
    assert "sdpa-cudnn at 1k, 4k, 16k (not supported: SDPA has no such kernel for this request)" in notes.replace(
        "\n", " "
    )


def test_nothing_measured_still_draws(tmp_path):
    rows = [attention_row("triton", "forward", 64, None, None, "not timed: no GPU", lane="interpret")]
    for path in plots.draw(write(tmp_path / "x.json", rows)):
        assert_chart(path)


def test_dtypes_get_panels_of_their_own(tmp_path):
    rows = gpu_rows() + [row | {"dtype": "bfloat16"} for row in gpu_rows()]
    one, two = (imread(plots.draw(write(tmp_path / "x.json", r))[0]).shape for r in (gpu_rows(), rows))
    assert two[0] > 1.5 * one[0]
    assert two[1] == one[1]


def test_a_backend_keeps_its_colour():
    assert plots.colours_of(["triton", "mine"])["triton"] == plots.colours_of(["sdpa", "triton"])["triton"]
    colours = plots.colours_of(["sdpa", "triton", "mine", "yours"])
    assert len(set(colours.values())) == 4


def test_bars_for_names(tmp_path):
    chart = plots.Chart(
        "t.png", "Encoding", "mb_per_s", "MB/s", x="text", x_label="", series="tokenizer", facets=(), kind="bars"
    )
    rows = [{"tokenizer": t, "text": x, "mb_per_s": 3.0} for t in ("ours", "theirs") for x in ("English", "code")]
    assert_chart(plots.draw_chart(chart, {"device": "a CPU"}, rows, tmp_path / "t.png"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read as JSON"),
        ("{", "cannot be read as JSON"),
        ("[1]", "an object with `environment` and `rows` is required"),
        ('{"environment": {}, "rows": [{"speed": 1}]}', "the fields of no chart"),
        ('{"environment": {}, "rows": []}', "the fields of no chart"),
    ],
    ids=["missing", "truncated", "not a bench's", "other fields", "no rows"],
)
def test_a_file_that_cannot_be_drawn_is_one_line(tmp_path, capsys, text, message):
    file = tmp_path / "x.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SystemExit) as exit:
        plots.main([str(file)])
    assert exit.value.code == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
