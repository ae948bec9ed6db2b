"""The roofline: what each kernel did beside what its chip could do at best with so many operations for each byte.

    roof(intensity) = min(peak, bandwidth * intensity)          TFLOP/s; intensity = FLOPs / least bytes

Peaks and bandwidths are published ones (chips.py), FLOPs and least bytes those that each kernel's file states.
Without torch: charts are drawn where there is none.
"""

from .chips import CHIPS

NAMES = {"A100": "sm_80", "H100": "sm_90"}  # in a device's name; of others no peak is known here
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}
# FLOPs for each element, forward and backward, as the kernels' files count them.
ELEMENTWISE = {"layer_norm": (8, 12), "add_layer_norm": (9, 13), "gelu": (10, 20), "bias_gelu": (11, 21)}
ELEMENTWISE["cross_entropy"] = (5, 5)
MODES = ("forward", "backward")
OURS = "triton"
MARKERS = {
    "attention": "o",
    "layer_norm": "s",
    "add_layer_norm": "D",
    "gelu": "^",
    "bias_gelu": "^",
    "cross_entropy": "v",
}
INK, FAINT = "#222222", "#777777"
COLOURS = {OURS: "#D55E00", "the best other": "#0072B2"}


def chip_of(environment):
    """The Chip of an environment's device, or None."""
    device = environment.get("device") or ""
    return next((CHIPS[arch] for name, arch in NAMES.items() if name in device), None)


def peak(chip, dtype):
    """TFLOP/s of the units that multiply this dtype: the matrix units, or for float32 the ordinary ones."""
    rate = 2 * chip.fma if dtype == "float32" else chip.tensor
    return rate * chip.multiprocessors * chip.clock / 1e12


def roof(chip, dtype, intensity):
    """TFLOP/s at best."""
    return min(peak(chip, dtype), chip.hbm * intensity / 1e12)


def work(row):
    """(kernel, FLOPs, least bytes) of a row of the attention or the pointwise sweep; None for another row."""
    if row.get("mode") not in MODES or row.get("dtype") not in ITEMSIZE or row.get("status", "ok") != "ok":
        return None
    backward = MODES.index(row["mode"])
    if row.get("scenario", "lengths") in ("lengths", "packed") and {"B", "H", "T", "D", "causal"} <= row.keys():
        elements = row["B"] * row["H"] * row["T"] * row["D"]
        flops = (10 if backward else 4) * elements * row["T"] / (2 if row["causal"] else 1)
        tensors, vectors = (8, 2) if backward else (4, 1)  # q k v o, do dq dk dv; lse, delta
        least = tensors * elements * ITEMSIZE[row["dtype"]] + vectors * 4 * elements / row["D"]
        return "attention", flops, least
    if row.get("op") in ELEMENTWISE and row.get("gb_per_s") and row.get("median_ms"):
        return (
            row["op"],
            ELEMENTWISE[row["op"]][backward] * row["M"] * row["N"],
            row["gb_per_s"] * row["median_ms"] * 1e6,
        )
    return None


def curve(chip, rows):
    """{T: TFLOP/s at best} of attention rows of one dtype, mode and shape."""
    found = {}
    for row in rows:
        counted = work(row)
        if counted is not None:
            found[row["T"]] = roof(chip, row["dtype"], counted[1] / counted[2])
    return dict(sorted(found.items()))


def points(environment, rows):
    """[(kernel, mode, ours or other, intensity, TFLOP/s)]: ours, and the fastest other one for each case of ours.

    Of a visit's results, or of one sweep's; none where the chip is not known or nothing of ours was timed. float32 has
    another peak and is left out. Packed attention computes what `lengths` does and stands there once.
    """
    if chip_of(environment) is None:
        return []
    cases = {}
    for row in rows:
        counted = work(row)
        if counted is None or not row.get("median_ms") or row["dtype"] == "float32" or row.get("scenario") == "packed":
            continue
        kernel, flops, least = counted
        shape = tuple(row.get(name) for name in ("B", "H", "T", "D", "M", "N", "dtype", "causal"))
        who = row.get("backend", row.get("provider"))
        cases.setdefault((kernel, row["mode"], *shape), {})[who] = (flops / least, flops / row["median_ms"] / 1e9)
    found = []
    for (kernel, mode, *_), timed in cases.items():
        others = [point for who, point in timed.items() if not who.startswith(OURS)]
        if OURS in timed:
            found.append((kernel, mode, OURS, *timed[OURS]))
            found += [(kernel, mode, "the best other", *max(others, key=lambda point: point[1]))] if others else []
    return found


def draw_figure(environment, points):
    """The roofline as a matplotlib figure: forward and backward side by side, both axes logarithmic."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    chip = chip_of(environment)
    figure = Figure(figsize=(11.2, 5.2), dpi=160, facecolor="white")
    figure.text(
        0.02, 0.94, "Roofline: what each kernel did, and what the chip could", fontsize=13, color=INK, weight="bold"
    )
    day, commit = (environment.get("date") or "")[:10], (environment.get("commit") or "")[:9]
    words = (environment.get("device"), f"torch {environment.get('torch')}", f"commit {commit}" if commit else "", day)
    figure.text(0.02, 0.9, "  ·  ".join(filter(None, words)), fontsize=8.5, color=FAINT)
    figure.subplots_adjust(0.065, 0.12, 0.84, 0.8, wspace=0.16)
    low, high = 0.5, max(4096.0, 2 * max(point[3] for point in points))
    floor = 0.5 * min(point[4] for point in points)
    xs = [low, peak(chip, "float16") * 1e12 / chip.hbm, high]
    for axis, mode in zip(figure.subplots(1, 2, sharey=True), MODES):
        axis.plot(xs, [roof(chip, "float16", x) for x in xs], color=INK, linewidth=1.4, zorder=2)
        axis.text(
            high,
            1.12 * peak(chip, "float16"),
            f"{peak(chip, 'float16'):.0f} TFLOP/s",
            ha="right",
            fontsize=8,
            color=INK,
        )
        axis.text(14, 1.6 * roof(chip, "float16", 14), f"{chip.hbm / 1e12:.2f} TB/s", ha="right", fontsize=8, color=INK)
        for kernel, of_mode, who, intensity, rate in points:
            if of_mode == mode:
                fill = COLOURS[who] if who == OURS else "white"
                axis.plot(
                    intensity, rate, MARKERS[kernel], color=COLOURS[who], markerfacecolor=fill, markersize=5.5, zorder=3
                )
        axis.set(xscale="log", yscale="log", xlim=(low, high), ylim=(floor, 2 * peak(chip, "float16")))
        axis.set_xscale("log", base=2)
        axis.set_title(mode, loc="left", fontsize=10, color=INK)
        axis.set_xlabel("FLOPs for each byte that must move", fontsize=9, color=INK)
        axis.grid(color="#e6e6e6", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8.5, colors=INK)
    figure.axes[0].set_ylabel("TFLOP/s", fontsize=9, color=INK)
    kernels = dict.fromkeys(point[0] for point in points)
    handles = [Line2D([], [], color=INK, marker=MARKERS[kernel], linestyle="", label=kernel) for kernel in kernels]
    for who in dict.fromkeys(point[2] for point in points):
        fill = COLOURS[who] if who == OURS else "white"
        label = "ours" if who == OURS else who
        handles.append(Line2D([], [], color=COLOURS[who], marker="o", markerfacecolor=fill, linestyle="", label=label))
    figure.axes[1].legend(handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, fontsize=8.5)
    return figure
