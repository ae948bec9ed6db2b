"""Charts from the JSON that a bench wrote, and from nothing else:

    python bench/plots.py out/attention_sweep.json

draws, beside the file, each chart of bench/lib/charts.py whose fields the file's rows have, and the roofline of the
kernels that it measured on a chip whose peak is published; of a visit's results.json, the roofline of all of them. A
thin bar through a value goes from its 20th to its 80th percentile; where they are far apart the chart says so. It needs
json, numpy and matplotlib, so that results from another machine plot the same anywhere. --svg draws each as SVG, too.
"""

import argparse
import io
import json
import sys
from pathlib import Path
from textwrap import wrap

import numpy as np

if not __package__:  # run by its path: the checkout is found from there
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.lib import roofline
from bench.lib.charts import CHARTS, COLOURS, MARKERS
from bench.lib.files import write_file

OK = "ok"
SPREAD = 1.5  # p80 / p20 beyond it: something else used the machine


SPARE_COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555", "#000000")
SPARE_MARKERS = "hpd8<>^*"
HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx")  # bars are told apart in grey, too
INK, FAINT = "#222222", "#777777"
STYLE = {"fontsize": 9, "color": INK}


def draw(path, svg=False):
    """Draws the charts of the JSON file at `path` beside it; returns their paths. ValueError if none fits."""
    path = Path(path)
    environment, rows = load(path)
    charts = () if environment.get("of_visit") else CHARTS  # of several sweeps together, which have their own files
    drawn = [(chart, mine) for chart in charts if (mine := chart.rows_of(rows))]
    points = roofline.points(environment, rows)
    if not drawn and not points:
        raise ValueError(f"{path}: its rows have the fields of no chart in bench/lib/charts.py")
    # A quick run's charts must not take the place of a full sweep's either.
    quick = "_quick" if path.stem.endswith("_quick") else ""
    files = [path.with_name(f"{Path(chart.file).stem}{quick}.png") for chart, _ in drawn]
    figures = [draw_figure(chart, environment, mine) for chart, mine in drawn]
    if points:
        figures.append(roofline.draw_figure(environment, points))
        files.append(path.with_name(f"roofline{quick}.png"))
    return [out for figure, file in zip(figures, files) for out in save(figure, file, svg)]


def save(figure, path, svg=False):
    """Writes a figure as a PNG at `path` and, if wanted, an SVG beside it; returns the paths."""
    import matplotlib

    paths = [path, *([path.with_suffix(".svg")] if svg else [])]
    for out in paths:
        image, metadata = io.BytesIO(), {"Date": None} if out.suffix == ".svg" else None
        with matplotlib.rc_context({"svg.hashsalt": "bench", "svg.fonttype": "none"}):  # the same bytes each time
            figure.savefig(image, format=out.suffix[1:], metadata=metadata)
        write_file(out, image.getvalue())
    return paths


def load(path):
    """(environment, rows) of a bench's file, or of all of a visit's results. ValueError if it is neither."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from None
    if isinstance(data, dict) and isinstance(data.get("results"), dict):
        rows = [row for result in data["results"].values() for row in result.get("rows", ()) if roofline.work(row)]
        data = {"environment": {**data.get("environment", {}), "of_visit": True}, "rows": rows}
    if not isinstance(data, dict) or not isinstance(data.get("rows"), list) or "environment" not in data:
        raise ValueError(f"{path}: an object with `environment` and `rows` is required")
    return data["environment"], data["rows"]


def draw_chart(chart, environment, rows, path):
    """Draws one chart as a PNG at `path`; returns the path."""
    return save(draw_figure(chart, environment, rows), path)[0]


def draw_figure(chart, environment, rows):
    """One chart as a matplotlib figure."""
    from matplotlib.figure import Figure  # a second to import, which benches with --no-charts do without

    baseline = _baseline(chart, rows)
    varying = [field for field in chart.facets if len({row[field] for row in rows}) > 1]
    panels = {}
    for row in rows:
        panels.setdefault(tuple(row[field] for field in varying), []).append(row)
    panels = {key: values for key, values in panels.items() if _curves(chart, values, baseline)} or {(): rows}

    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    room = max(1.15, 0.3 + 0.083 * max(len(str(row[chart.series])) for row in rows))  # for the names of the lines
    width, height = (4.45 + room) * columns + 0.75, 4.35 * lines + 0.75
    figure = Figure(figsize=(width, height), dpi=160, facecolor="white")
    title, subtitle = (
        chart.title.format(baseline=baseline or "the baseline"),
        _subtitle(chart, environment, rows, varying),
    )
    figure.text(0.25 / width, 1 - 0.3 / height, title, fontsize=13, color=INK, weight="bold")
    figure.text(0.25 / width, 1 - 0.42 / height, subtitle, fontsize=8.5, color=FAINT, va="top", linespacing=1.5)
    # Room for the header above, the notes below, the names of the lines at the right: all in inches.
    figure.subplots_adjust(
        0.8 / width, 1.0 / height, 1 - room / width, 1 - 1.2 / height, wspace=0.365 * room, hspace=0.55
    )
    colours = colours_of([row[chart.series] for row in rows])
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, (key, values) in zip(axes, panels.items()):
        _draw_panel(axis, chart, values, baseline, colours, roofline.chip_of(environment) if chart.roof else None)
        axis.set_title(", ".join(_word(f, v) for f, v in zip(varying, key)), loc="left", fontsize=10, color=INK)
    for axis in axes[len(panels) :]:
        axis.remove()

    return figure


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


def _draw_panel(axis, chart, rows, baseline, colours, chip=None):
    curves = _curves(chart, rows, baseline)
    if not curves:
        axis.text(0.5, 0.5, "nothing was measured", transform=axis.transAxes, ha="center", color=FAINT)
        axis.set(xticks=[], yticks=[])
    if chart.kind == "bars":
        curves.pop(baseline, None)  # the line at 1
    if chart.kind == "bars":
        _draw_bars(axis, chart, curves, colours, rows)
    else:
        _draw_lines(axis, chart, curves, colours, rows, roofline.curve(chip, rows) if chip else {})
    if baseline is not None:
        axis.axhline(1.0, color=FAINT, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    if not chart.log_y:
        axis.set_ylim(bottom=0)
    axis.set_xlabel(chart.x_label, **STYLE)
    axis.annotate(
        _notes(chart, rows, chip),
        (0, 0),
        (0, -40),
        "axes fraction",
        "offset points",
        va="top",
        fontsize=7.5,
        color=FAINT,
    )
    axis.set_ylabel(chart.y_label.format(baseline=baseline or "the baseline"), **STYLE)
    axis.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#bbbbbb")
    axis.tick_params(labelsize=8.5, colors=INK, length=3, labelleft=True)
    if chart.kind == "bars":
        axis.tick_params("x", labelsize=7.5 if len(axis.get_xticks()) < 7 else 6.5)


def _draw_lines(axis, chart, curves, colours, rows, roof):
    names = list(colours)
    ticks = sorted({x for xs, _ in curves.values() for x in xs})
    for name, (xs, ys) in curves.items():
        at = dict(zip(xs, ys))
        heights = [at.get(x, np.nan) for x in ticks]  # a gap where nothing was measured
        marker = MARKERS.get(name) or SPARE_MARKERS[names.index(name) % len(SPARE_MARKERS)]
        axis.plot(ticks, heights, color=colours[name], marker=marker, markersize=4.5, linewidth=1.8, zorder=3)
    if chart.powers and ticks:
        axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [_size(x) for x in ticks])
    axis.minorticks_off()
    top = max((max(ys) for _, ys in curves.values()), default=0.0)
    top = max(top, 1.0) if chart.relative_to else top
    if chart.log_y and top > 0:
        axis.set_yscale("log")
        lowest = min(y for _, ys in curves.values() for y in ys if y > 0)
        axis.set_ylim(10 ** np.floor(np.log10(lowest)), 10 ** np.ceil(np.log10(1.01 * top)))
        axis.yaxis.minorticks_off()
    else:
        axis.set_ylim(0, 1.08 * max(top, *roof.values(), 0.0) or 1.0)
    roof = {x: y for x, y in roof.items() if x in ticks}
    if roof:
        axis.plot(list(roof), list(roof.values()), color=FAINT, linewidth=1.2, linestyle=(0, (4, 3)), zorder=2)
        curves, colours = {**curves, "roof": (list(roof), list(roof.values()))}, {**colours, "roof": FAINT}
    _draw_spreads(axis, chart, rows, curves, colours)
    _label_ends(axis, curves, colours)


def _label_ends(axis, curves, colours):
    """Names each line at the right, the names pushed apart where the ends are close."""
    ends = sorted((ys[int(np.argmax(xs))], max(xs), name) for name, (xs, ys) in curves.items())
    to_axes = axis.transScale + axis.transLimits  # heights as shares of the axis, logarithmic or not
    gap = 0.062
    heights = [float(to_axes.transform((x, y))[1]) for y, x, _ in ends]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    for i in reversed(range(len(heights))):  # what was pushed beyond the top comes down again
        heights[i] = min(heights[i], 1.0 - (len(heights) - 1 - i) * gap)
    for height, (y, x, name) in zip(heights, ends):
        leader = {"arrowstyle": "-", "color": colours[name], "linewidth": 0.6, "alpha": 0.6, "shrinkA": 1, "shrinkB": 4}
        leader["relpos"] = (0, 0.5)  # to the beginning of the name
        axis.annotate(
            name,
            (x, y),
            (1.03, height),
            textcoords="axes fraction",
            color=colours[name],
            fontsize=9,
            va="center",
            weight="bold",
            arrowprops=leader,
        )


def _draw_bars(axis, chart, curves, colours, rows):
    groups = list(dict.fromkeys(x for xs, _ in curves.values() for x in xs))
    thickness = 0.8 / max(len(curves), 1)
    crowded = len(groups) * len(curves) > 12  # then the figures stand upright, for they are wider than their bars
    for i, (name, (xs, ys)) in enumerate(curves.items()):
        places = [groups.index(x) + (i - (len(curves) - 1) / 2) * thickness for x in xs]
        look = {"color": colours[name], "hatch": HATCHES[i % len(HATCHES)], "edgecolor": "white", "linewidth": 0}
        axis.bar(places, ys, 0.92 * thickness, label=name, zorder=3, **look)
        for x, y, place in zip(xs, ys, places):
            row, top = next(r for r in rows if (r[chart.series], r[chart.x]) == (name, x) and _measured(chart, r)), y
            if spread(row):
                ends = [y * row["median_ms"] / row[p] for p in ("p80_ms", "p20_ms")]
                axis.vlines(place, *ends, color=INK, linewidth=1, zorder=4)
                top = max(y, *ends)
            figure = {"fontsize": 7.5, "color": INK, "ha": "center", "va": "bottom", "rotation": 90 * crowded}
            axis.annotate(f"{y:.3g}", (place, top), (0, 2), textcoords="offset points", **figure)
    axis.set_xticks(range(len(groups)), [group.replace(" ", "\n") for group in groups])
    axis.margins(y=0.18 if crowded else 0.12)
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8.5, labelcolor=INK)


def _subtitle(chart, environment, rows, varying):
    """Device and what is the same in all rows; versions, commit and day."""
    same = [_word(field, rows[0][field]) for field in chart.facets if field not in varying]
    tokens = {row["B"] * row["T"] for row in rows if row.get("B") and row.get("T")}
    if chart.x == "T" and len(tokens) == 1 and len({row["T"] for row in rows}) > 1:
        same.append(f"B T = {tokens.pop()}")
    versions = [f"{name} {environment[name]}" for name in ("torch", "triton") if environment.get(name)]
    commit, day = environment.get("commit"), (environment.get("date") or "")[:10]
    if commit:
        versions.append(f"commit {commit[:9]}{' + changes' if environment.get('dirty') else ''}")
    device = environment.get("device")
    if device and device == environment.get("cpu") and environment.get("threads"):
        device += f", {environment['threads']} threads"
    lines = [device, ", ".join(same)], [*versions, day]
    return "\n".join("  ·  ".join(filter(None, words)) for words in lines)


def _notes(chart, rows, chip=None):
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
    if chip is not None:
        notes.append(f"roof: {chip.name}'s published peak, or its {chip.hbm / 1e12:.2f} TB/s times FLOPs per byte")
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
    parser.add_argument("--svg", action="store_true", help="draw each as SVG, too")
    args = parser.parse_args(argv)
    try:
        for path in draw(args.file, svg=args.svg):
            print(f"wrote {path}")
    except ValueError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


if __name__ == "__main__":
    main()
