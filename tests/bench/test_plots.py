"""Charts come from the JSON alone, whatever machine wrote it and however many of its rows have no number."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread
from matplotlib.text import Text

from bench import plots
from bench.lib import charts, roofline
from bench.lib.chips import CHIPS

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
    names = ("attention_speedup", "attention_throughput", "attention_error", "roofline")
    charts = [tmp_path / f"{name}.png" for name in names]
    assert done.stdout == "".join(f"wrote {chart}\n" for chart in charts)
    for chart in charts:
        assert_chart(chart)
    assert len(list(tmp_path.iterdir())) == 5


def test_speedup_is_the_baselines_time_over_ones_own():
    speedup, throughput = charts.CHARTS[1:3]
    rows = [row for row in gpu_rows() if row["mode"] == "forward"]
    assert plots._baseline(speedup, rows) == "sdpa"
    curves = plots._curves(speedup, rows, "sdpa")
    assert curves["sdpa"] == ([1024, 4096, 16384], [1.0, 1.0, 1.0])
    assert curves["triton"] == ([1024, 4096, 16384], pytest.approx([1.2, 1.2, 1.2]))
    assert curves["eager"] == ([1024, 4096], pytest.approx([0.1, 0.1]))
    assert plots._curves(throughput, rows, None)["sdpa-cudnn"] == ([1024, 4096, 16384], [260.0, 260.0, 260.0])


def test_a_row_without_a_time_is_named_with_its_reason():
    backward = [row for row in gpu_rows() if row["mode"] == "backward"]
    notes = plots._notes(charts.CHARTS[1], backward)
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


def test_names_stay_on_the_page_and_figures_clear_of_each_other():
    """The names of lines at the right were cut off; figures of narrow bars lay over each other and the spreads."""
    rows = [attention_row(name, "forward", T, 1.0, 100.0) for name in ("sdpa", "transformers-sdpa") for T in (64, 128)]
    names = ("ours", "tiktoken", "tokenizers")
    bars = [
        {"tokenizer": name, "text": text, "mb_per_s": 10.25 + i, "mode": "encode", "state": "cold", "threads": 1}
        | {"median_ms": 1.0, "p20_ms": 0.9, "p80_ms": 1.2}
        for i, name in enumerate(names)
        for text in ("english", "code", "chinese", "mixed", "letters")
    ]
    (tokenizers,) = (chart for chart in charts.CHARTS if chart.file == "tokenizer_throughput.png")
    for chart, of_chart, count in ((charts.CHARTS[1], rows, 2), (tokenizers, bars, 15)):
        figure = plots.draw_figure(chart, {}, of_chart)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        (axis,), renderer = figure.axes, canvas.get_renderer()
        # without the arrows to them
        boxes = [Text.get_window_extent(text, renderer) for text in axis.texts if text.get_text()]
        assert len(boxes) == count
        assert all(box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_memory_and_host_time_are_drawn_where_they_were_measured():
    memory, host = (chart for chart in charts.CHARTS if chart.if_measured)
    rows = gpu_rows()
    assert memory.rows_of(rows) == [] == host.rows_of(rows)
    rows = [row | {"peak_memory_mb": 24.0, "host_us": 50.0} for row in rows]
    assert memory.rows_of(rows) == rows == host.rows_of(rows)
    assert "B T = " not in plots._subtitle(memory, {}, rows, ("mode",))
    assert "B T = 16384" in plots._subtitle(memory, {}, [row | {"B": 16384 // row["T"]} for row in rows], ("mode",))


def test_a_backend_keeps_its_colour():
    assert plots.colours_of(["triton", "mine"])["triton"] == plots.colours_of(["sdpa", "triton"])["triton"]
    colours = plots.colours_of(["sdpa", "triton", "mine", "yours"])
    assert len(set(colours.values())) == 4


def test_an_svg_holds_its_words_and_is_the_same_each_time(tmp_path):
    written = []
    for _ in range(2):
        paths = plots.draw(write(tmp_path / "x.json", gpu_rows()), svg=True)
        svgs = [path for path in paths if path.suffix == ".svg"]
        assert len(svgs) == len(paths) / 2
        written.append([path.read_bytes() for path in svgs])
    assert written[0] == written[1]
    assert b">triton</text>" in written[0][0]
    assert b">roof</text>" in written[0][1]


def test_the_roof_is_the_chips_peak_or_what_its_memory_lets_through():
    chip = CHIPS["sm_90"]
    assert roofline.chip_of({"device": "NVIDIA H100 80GB HBM3"}) is chip
    assert roofline.chip_of({"device": "AMD EPYC"}) is roofline.chip_of({}) is None
    assert roofline.peak(chip, "bfloat16") == pytest.approx(989.4, rel=1e-3)  # the datasheet's
    assert roofline.peak(chip, "float32") == pytest.approx(61.8, rel=1e-2)
    assert roofline.roof(chip, "float16", 10.0) == pytest.approx(33.5)
    rows = [row for row in gpu_rows() if row["mode"] == "forward" and row["backend"] == "sdpa"]
    for row in rows:
        row["scenario"] = "lengths"
    # Forward, causal, fp16: 2 T^2 D operations for 8 T D bytes of q, k, v, o, and 4 T of lse.
    assert roofline.curve(chip, rows)[1024] == pytest.approx(3.35 * 2 * 1024 * 64 / (8 * 64 + 4))
    assert roofline.curve(chip, rows)[16384] == pytest.approx(989.4, rel=1e-3)


def test_flops_and_bytes_of_a_row_are_those_of_the_benches():
    case = {"B": 2, "H": 3, "T": 128, "D": 64, "causal": True, "dtype": "float16", "scenario": "lengths"}
    from bench.lib import attention_cases

    for mode in ("forward", "backward"):
        of_bench = attention_cases.flops(mode, attention_cases.Case(**case))
        assert roofline.work({**case, "mode": mode})[1] == of_bench
    pointwise = {"op": "bias_gelu", "mode": "backward", "dtype": "bfloat16", "M": 4, "N": 8, "gb_per_s": 2.0}
    assert roofline.work({**pointwise, "median_ms": 3.0}) == ("bias_gelu", 21 * 32, 6e6)
    assert roofline.work({**pointwise, "status": "out of memory"}) is None
    assert roofline.work({"mode": "decoding"}) is None


def test_a_point_for_each_kernel_and_the_fastest_other(tmp_path):
    rows = [{**row, "scenario": "lengths"} for row in gpu_rows()]
    other = {"op": "layer_norm", "mode": "forward", "dtype": "bfloat16", "M": 64, "N": 768, "status": "ok"}
    rows += [
        {**other, "provider": name, "gb_per_s": g, "median_ms": 1.0} for name, g in (("triton", 9.0), ("liger", 8.0))
    ]
    points = roofline.points({"device": "NVIDIA H100 80GB HBM3"}, rows)
    assert [point[0] for point in points].count("layer_norm") == 2
    forward = [point for point in points if point[:3] == ("attention", "forward", "the best other")]
    assert len(forward) == 3  # of sdpa and sdpa-cudnn the latter, at each length
    assert roofline.points({"device": "AMD EPYC"}, rows) == []
    visit = tmp_path / "results.json"
    visit.write_text(
        json.dumps({"environment": {"device": "NVIDIA H100 80GB HBM3"}, "results": {"a/b.json": {"rows": rows}}})
    )
    assert plots.draw(visit) == [tmp_path / "roofline.png"]
    assert_chart(tmp_path / "roofline.png")


def test_names_at_the_right_do_not_overlap():
    """On a logarithmic axis, too."""
    from matplotlib.figure import Figure

    for scale in ("linear", "log"):
        axis = Figure().subplots()
        axis.set_yscale(scale)
        axis.set_ylim(0.1, 10)
        curves = {f"s{i}": ([1, 2], [1.0, 1.0 + i / 1000]) for i in range(8)}
        plots._label_ends(axis, curves, dict.fromkeys(curves, "black"))
        heights = sorted(text.xyann[1] for text in axis.texts)
        assert min(b - a for a, b in itertools.pairwise(heights)) >= 0.0619
        assert heights[-1] <= 1.0


def test_bars_for_names(tmp_path):
    chart = charts.Chart(
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
