"""Charts from the JSON that a bench wrote, and from nothing else:

    python bench/plots.py out/attention_sweep.json

draws, beside the file, each chart of CHARTS whose fields the file's rows have. A thin bar through a value goes from its
20th to its 80th percentile; where they are far apart the chart says so. It needs json, numpy and matplotlib, so
that results from another machine plot the same anywhere. A new bench adds its charts to CHARTS.
"""

import argparse
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap

import numpy as np

OK = "ok"
SPREAD = 1.5  # p80 / p20 beyond it: something else used the machine


@dataclass(frozen=True)
class Chart:
    """One PNG. The fields of `facets` that vary over the rows split it into panels, the others go into the subtitle.

    x, y, series: fields of a row. kind: "lines" for numbers x, "bars" for names x.
    relative_to: names of series; y becomes (y of the first of them that was measured) / y, a speed-up if y is a time.
    powers: the x axis is logarithmic to base 2, with a tick at each x.
    mode: draws only the rows of this mode; None for all.
    what: draws only the rows of this `what`; None for all.
    scenario: draws only the rows of this scenario; a row that names none is of "lengths", as in older files.
    """

    file: str
    title: str
    y: str
    y_label: str
    x: str = "T"
    x_label: str = "sequence length T"
    series: str = "backend"
    facets: tuple[str, ...] = ("mode", "dtype")
    relative_to: tuple[str, ...] = ()
    kind: str = "lines"
    powers: bool = True
    mode: str | None = None
    scenario: str | None = None
    what: str | None = None

    def rows_of(self, rows):
        """The rows that this chart draws, or none if one of them lacks a field."""
        mine = [row for row in rows if self.mode is None or row.get("mode") == self.mode]
        mine = [row for row in mine if self.scenario is None or row.get("scenario", "lengths") == self.scenario]
        mine = [row for row in mine if self.what is None or row.get("what") == self.what]
        return mine if all({self.x, self.y, self.series, *self.facets} <= row.keys() for row in mine) else []


_ATTENTION = ("mode", "dtype", "H", "D", "causal")
CHARTS = (
    Chart(
        file="attention_packed.png",
        title="Attention as the model calls it, [B, T, 3C] to [B, T, C]: speed-up over {baseline}",
        y="median_ms",
        y_label="time of {baseline} / time",
        facets=_ATTENTION,
        relative_to=("sdpa", "eager"),
        scenario="packed",
    ),
    Chart(
        file="attention_speedup.png",
        title="Attention: speed-up over {baseline}",
        y="median_ms",
        y_label="time of {baseline} / time",
        facets=_ATTENTION,
        relative_to=("sdpa", "eager"),
        scenario="lengths",
    ),
    Chart(
        file="attention_throughput.png",
        title="Attention: throughput",
        y="tflops",
        y_label="TFLOP/s",
        facets=_ATTENTION,
        scenario="lengths",
    ),
    Chart(
        file="attention_padding.png",
        title="Attention: time with padding",
        y="median_ms",
        y_label="ms",
        x="valid",
        x_label="share of the keys that is valid",
        facets=(*_ATTENTION, "T", "padding"),
        powers=False,
        scenario="padding",
    ),
    Chart(
        file="attention_dropout.png",
        title="Attention with dropout: speed-up over {baseline}",
        y="median_ms",
        y_label="time of {baseline} / time",
        facets=(*_ATTENTION, "dropout_p"),
        relative_to=("sdpa", "eager"),
        scenario="dropout",
    ),
    Chart(
        file="attention_decode.png",
        title="Attention, decoding: bytes of the cache over time",
        y="gb_per_s",
        y_label="GB/s",
        x="T_k",
        x_label="keys in the cache",
        facets=(*_ATTENTION, "T"),
        scenario="decode",
    ),
    Chart(
        file="attention_head_dims.png",
        title="Attention: throughput over head dims",
        y="tflops",
        y_label="TFLOP/s",
        x="D",
        x_label="head dim D",
        facets=("mode", "dtype", "T", "causal"),
        scenario="head-dims",
    ),
    Chart(
        file="pointwise_bandwidth.png",
        title="LayerNorm, GELU, cross-entropy: share of a copy's bandwidth",
        y="of_copy",
        y_label="bandwidth / bandwidth of a copy",
        x="N",
        x_label="row width N",
        series="provider",
        facets=("op", "mode", "dtype"),
        powers=False,
    ),
    Chart(
        file="host_overhead.png",
        title="Host time of a model's step, nothing launched",
        y="host_us",
        y_label="us",
        x="layers",
        x_label="layers",
        series="provider",
        facets=("mode",),
        powers=False,
        what="model",
    ),
    Chart(
        file="tokenizer_throughput.png",
        title="Tokenizers: throughput",
        y="mb_per_s",
        y_label="MB/s",
        x="text",
        x_label="text",
        series="tokenizer",
        facets=("mode", "state", "threads"),
        kind="bars",
    ),
    Chart(
        file="model_inference.png",
        title="GPT-2: time of a forward pass",
        y="median_ms",
        y_label="time of a forward pass (ms)",
        x="B",
        x_label="batch size B",
        facets=("size", "dtype", "T"),
        mode="inference",
    ),
    Chart(
        file="transformers_speedup.png",
        title="GPT-2: speed-up over {baseline}",
        y="median_ms",
        y_label="time of {baseline} / time",
        x="case",
        x_label="",
        facets=("size", "dtype"),
        relative_to=("transformers-sdpa",),
        kind="bars",
    ),
)

# Okabe and Ito's palette, which colour-blind readers can tell apart. A name keeps its colour in every chart.
COLOURS = {
    "triton": "#D55E00",
    "eager": "#555555",
    "sdpa": "#0072B2",
    "sdpa-flash": "#56B4E9",
    "sdpa-cudnn": "#009E73",
    "sdpa-efficient": "#CC79A7",
    "sdpa-math": "#E69F00",
    "flex": "#F0E442",
    "flash_attention_2": "#000000",
    "torch": "#0072B2",
    "compiled": "#56B4E9",
    "liger": "#009E73",
}
SPARE_COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#000000")
MARKERS = "osD^vPX*"
INK, FAINT = "#222222", "#777777"
STYLE = {"fontsize": 9, "color": INK}


def draw(path):
    """Draws the charts of the JSON file at `path` beside it; returns their paths. ValueError if none fits."""
    path = Path(path)
    environment, rows = load(path)
    drawn = [(chart, mine) for chart in CHARTS if (mine := chart.rows_of(rows))]
    if not drawn:
        raise ValueError(f"{path}: its rows have the fields of no chart in plots.CHARTS")
    # A quick run's charts must not take the place of a full sweep's either.
    quick = "_quick" if path.stem.endswith("_quick") else ""
    files = [path.with_name(f"{Path(chart.file).stem}{quick}.png") for chart, _ in drawn]
    return [draw_chart(chart, environment, mine, file) for (chart, mine), file in zip(drawn, files)]


def load(path):
    """(environment, rows) of a bench's file. ValueError if it is not one."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(data, dict) or not isinstance(data.get("rows"), list) or "environment" not in data:
        raise ValueError(f"{path}: an object with `environment` and `rows` is required")
    return data["environment"], data["rows"]


def draw_chart(chart, environment, rows, path):
    """Draws one chart as a PNG at `path`; returns the path."""
    from matplotlib.figure import Figure  # a second to import, which benches with --no-charts do without

    baseline = _baseline(chart, rows)
    varying = [field for field in chart.facets if len({row[field] for row in rows}) > 1]
    panels = {}
    for row in rows:
        panels.setdefault(tuple(row[field] for field in varying), []).append(row)
    panels = {key: values for key, values in panels.items() if _curves(chart, values, baseline)} or {(): rows}

    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    width, height = 5.6 * columns + 0.75, 4.35 * lines + 0.75
    figure = Figure(figsize=(width, height), dpi=160, facecolor="white")
    title, subtitle = (
        chart.title.format(baseline=baseline or "the baseline"),
        _subtitle(chart, environment, rows, varying),
    )
    figure.text(0.25 / width, 1 - 0.3 / height, title, fontsize=13, color=INK, weight="bold")
    figure.text(0.25 / width, 1 - 0.42 / height, subtitle, fontsize=8.5, color=FAINT, va="top", linespacing=1.5)
    # Room for the header above, the notes below, the names of the lines at the right: all in inches.
    figure.subplots_adjust(0.8 / width, 1.0 / height, 1 - 1.15 / width, 1 - 1.2 / height, wspace=0.42, hspace=0.55)
    colours = colours_of([row[chart.series] for row in rows])
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, (key, values) in zip(axes, panels.items()):
        _draw_panel(axis, chart, values, baseline, colours)
        axis.set_title(", ".join(_word(f, v) for f, v in zip(varying, key)), loc="left", fontsize=10, color=INK)
    for axis in axes[len(panels) :]:
        axis.remove()

    from bench.lib.files import write_file  # found by a copy that is not installed, too: see the last lines

    image = io.BytesIO()
    figure.savefig(image, format="png")
    return write_file(path, image.getvalue())


def colours_of(names):
    """{name: colour}: those of COLOURS, and spare ones, in order of appearance, for names that have none there."""
    names = list(dict.fromkeys(names))
    taken = {COLOURS[name] for name in names if name in COLOURS}
    spare = iter([colour for colour in SPARE_COLOURS if colour not in taken] + list(SPARE_COLOURS) * len(names))
    return {name: COLOURS.get(name) or next(spare) for name in names}


def _measured(chart, row):
    return row.get("status", OK) == OK and row[chart.y] is not None


def _baseline(chart, rows):
    """The first name of relative_to that was measured, or None if the chart has no baseline or none was."""
    present = {row[chart.series] for row in rows if _measured(chart, row)}
    return next((name for name in chart.relative_to if name in present), None)


def _curves(chart, rows, baseline):
    """{series: (x values, y values)} of what was measured, y relative to the baseline where the chart says so."""
    base = {row[chart.x]: row[chart.y] for row in rows if row[chart.series] == baseline and _measured(chart, row)}
    curves = {}
    for row in rows:
        if not _measured(chart, row) or (chart.relative_to and row[chart.x] not in base):
            continue
        xs, ys = curves.setdefault(row[chart.series], ([], []))
        xs.append(row[chart.x])
        ys.append(base[row[chart.x]] / row[chart.y] if chart.relative_to else row[chart.y])
    return curves


def spread(row):
    """p80 / p20 of a row, or None."""
    return row["p80_ms"] / row["p20_ms"] if row.get("p20_ms") and row.get("p80_ms") else None


def _draw_spreads(axis, chart, rows, curves, colours):
    """A bar from the 20th to the 80th percentile through each value of lines."""
    for row in rows:
        xs, ys = curves.get(row[chart.series], ((), ()))
        if row[chart.x] in xs and spread(row) and _measured(chart, row):
            y = ys[xs.index(row[chart.x])]
            is_time = chart.y == "median_ms" and not chart.relative_to
            ratios = [row[p] / row["median_ms"] for p in ("p20_ms", "p80_ms")]
            ends = [y * ratio if is_time else y / ratio for ratio in ratios]
            axis.vlines(row[chart.x], min(ends), max(ends), color=colours[row[chart.series]], linewidth=1, alpha=0.7)


def _draw_panel(axis, chart, rows, baseline, colours):
    curves = _curves(chart, rows, baseline)
    if not curves:
        axis.text(0.5, 0.5, "nothing was measured", transform=axis.transAxes, ha="center", color=FAINT)
        axis.set(xticks=[], yticks=[])
    if chart.kind == "bars":
        curves.pop(baseline, None)  # the line at 1
    (_draw_bars if chart.kind == "bars" else _draw_lines)(axis, chart, curves, colours, rows)
    if baseline is not None:
        axis.axhline(1.0, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axis.set_ylim(bottom=0)
    axis.set_xlabel(chart.x_label, **STYLE)
    axis.annotate(
        _notes(chart, rows), (0, 0), (0, -40), "axes fraction", "offset points", va="top", fontsize=7.5, color=FAINT
    )
    axis.set_ylabel(chart.y_label.format(baseline=baseline or "the baseline"), **STYLE)
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#bbbbbb")
    axis.tick_params(labelsize=8.5, colors=INK, length=3, labelleft=True)
    axis.tick_params("x", labelsize=7.5 if chart.kind == "bars" else 8.5)


def _draw_lines(axis, chart, curves, colours, rows):
    names = list(colours)
    ticks = sorted({x for xs, _ in curves.values() for x in xs})
    for name, (xs, ys) in curves.items():
        at = dict(zip(xs, ys))
        heights = [at.get(x, np.nan) for x in ticks]  # a gap where nothing was measured
        marker = MARKERS[names.index(name) % len(MARKERS)]
        axis.plot(ticks, heights, color=colours[name], marker=marker, markersize=4.5, linewidth=1.8, zorder=3)
    if chart.powers and ticks:
        axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [_size(x) for x in ticks])
    axis.minorticks_off()
    top = max((max(ys) for _, ys in curves.values()), default=0.0)
    top = max(top, 1.0) if chart.relative_to else top
    axis.set_ylim(0, 1.08 * top or 1.0)
    _draw_spreads(axis, chart, rows, curves, colours)
    _label_ends(axis, curves, colours)


def _label_ends(axis, curves, colours):
    """Names each line at the right, the names pushed apart where the ends are close."""
    ends = sorted((ys[int(np.argmax(xs))], max(xs), name) for name, (xs, ys) in curves.items())
    top = axis.get_ylim()[1]
    gap = 0.062 * top
    heights = [y for y, _, _ in ends]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    for i in reversed(range(len(heights))):  # what was pushed beyond the top comes down again
        heights[i] = min(heights[i], top - (len(heights) - 1 - i) * gap)
    for height, (y, x, name) in zip(heights, ends):
        leader = {"arrowstyle": "-", "color": colours[name], "linewidth": 0.6, "alpha": 0.6, "shrinkA": 1, "shrinkB": 4}
        axis.annotate(
            name,
            (x, y),
            (1.03, height),
            textcoords=axis.get_yaxis_transform(),
            color=colours[name],
            fontsize=9,
            va="center",
            weight="bold",
            arrowprops=leader,
        )


def _draw_bars(axis, chart, curves, colours, rows):
    groups = list(dict.fromkeys(x for xs, _ in curves.values() for x in xs))
    thickness = 0.8 / max(len(curves), 1)
    for i, (name, (xs, ys)) in enumerate(curves.items()):
        places = [groups.index(x) + (i - (len(curves) - 1) / 2) * thickness for x in xs]
        bars = axis.bar(places, ys, 0.92 * thickness, color=colours[name], label=name, zorder=3)
        for x, y, place in zip(xs, ys, places):
            row = next(r for r in rows if (r[chart.series], r[chart.x]) == (name, x) and _measured(chart, r))
            if spread(row):
                ends = [y * row["median_ms"] / row[p] for p in ("p80_ms", "p20_ms")]
                axis.vlines(place, *ends, color=INK, linewidth=1, zorder=4)
        axis.bar_label(bars, [f"{y:.3g}" for y in ys], fontsize=7.5, color=INK, padding=2)
    axis.set_xticks(range(len(groups)), [group.replace(" ", "\n") for group in groups])
    axis.margins(y=0.12)
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8.5, labelcolor=INK)


def _subtitle(chart, environment, rows, varying):
    """Device and what is the same in all rows; versions, commit and day."""
    same = [_word(field, rows[0][field]) for field in chart.facets if field not in varying]
    versions = [f"{name} {environment[name]}" for name in ("torch", "triton") if environment.get(name)]
    commit, day = environment.get("commit"), (environment.get("date") or "")[:10]
    if commit:
        versions.append(f"commit {commit[:9]}{' + changes' if environment.get('dirty') else ''}")
    device = environment.get("device")
    if device and device == environment.get("cpu") and environment.get("threads"):
        device += f", {environment['threads']} threads"
    lines = [device, ", ".join(same)], [*versions, day]
    return "\n".join("  ·  ".join(filter(None, words)) for words in lines)


def _notes(chart, rows):
    """What is not in the panel, and why: `eager at 8k, 16k (out of memory)`."""
    missing = {}
    for row in rows:
        if not _measured(chart, row):
            reason = row["status"] if row.get("status", OK) != OK else "not measured"
            reason = "failed its correctness gate" if reason.startswith("failed") else reason
            reason = "stopped with an error" if reason.startswith("error") else reason
            missing.setdefault(reason, {}).setdefault(row[chart.series], {})[row[chart.x]] = None
    notes = []
    for reason, names in missing.items():
        where = [f"{name} at {', '.join(_size(x) for x in xs)}" for name, xs in names.items()]
        notes += wrap(f"{'; '.join(where)} ({reason})", 95)
    wide = [row for row in rows if _measured(chart, row) and (spread(row) or 1.0) > SPREAD]
    if wide:
        where = [f"{row[chart.series]} at {_size(row[chart.x])} ({spread(row):.1f})" for row in wide]
        notes += wrap(f"disturbed, p80/p20 is above {SPREAD}: {', '.join(where)}", 95)
    return "\n".join(notes)


def _word(field, value):
    if isinstance(value, bool):
        return field if value else f"not {field}"
    return f"{field} = {value}" if isinstance(value, (int, float)) else str(value)


def _size(x):
    """1024 as 1k, shares with two decimals; other values as they are."""
    if isinstance(x, float):
        return f"{x:.2f}"
    return f"{x // 1024}k" if isinstance(x, int) and x >= 1024 and x % 1024 == 0 else f"{x}"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="bench/plots.py", description="Draws the charts of a bench's JSON file.")
    parser.add_argument("file", type=Path, metavar="FILE", help="what a bench wrote, e.g. out/attention_sweep.json")
    args = parser.parse_args(argv)
    try:
        for path in draw(args.file):
            print(f"wrote {path}")
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main()
