"""The charts that bench/plots.py draws, and the colour of each name. A new bench adds its own to CHARTS."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chart:
    """One chart. The fields of `facets` that vary over the rows split it into panels, the others go into the subtitle.

    x, y, series: fields of a row. kind: "lines" for numbers x, "bars" for names x.
    relative_to: names of series; y becomes (y of the first of them that was measured) / y, a speed-up if y is a time.
    powers: the x axis is logarithmic to base 2, with a tick at each x.
    mode: draws only the rows of this mode; None for all.
    what: draws only the rows whose `what` is one of these; empty for all.
    if_measured: drawn only where one of its values was measured: a CPU has no such numbers.
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
    what: tuple[str, ...] = ()
    if_measured: bool = False
    roof: bool = False  # what the chip could do at best, drawn in (bench/lib/roofline.py)
    log_y: bool = False

    def rows_of(self, rows):
        """The rows that this chart draws, or none if one of them lacks a field."""
        mine = [row for row in rows if self.mode is None or row.get("mode") == self.mode]
        mine = [row for row in mine if self.scenario is None or row.get("scenario", "lengths") == self.scenario]
        mine = [row for row in mine if not self.what or row.get("what") in self.what]
        if self.if_measured and all(row.get(self.y) is None for row in mine):
            return []
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
        roof=True,
    ),
    Chart(
        file="attention_error.png",
        title="Attention: largest error against float64",
        y="error",
        y_label="largest error",
        facets=("dtype", "mode", "H", "D", "causal"),
        scenario="lengths",
        log_y=True,
    ),
    Chart(
        file="attention_memory.png",
        title="Attention: peak memory of a call",
        y="peak_memory_mb",
        y_label="MB",
        facets=_ATTENTION,
        scenario="lengths",
        log_y=True,
        if_measured=True,
    ),
    Chart(
        file="attention_host.png",
        title="Attention: time that the host takes for a call",
        y="host_us",
        y_label="us",
        facets=_ATTENTION,
        scenario="lengths",
        log_y=True,
        if_measured=True,
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
        what=("model",),
    ),
    Chart(
        file="host_calls.png",
        title="Host time of a call, nothing launched",
        y="host_us",
        y_label="us",
        x="what",
        x_label="",
        series="provider",
        facets=("mode",),
        kind="bars",
        what=("attention", "add_layer_norm", "bias_gelu"),
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

# Okabe and Ito's palette, which colour-blind readers can tell apart. A name keeps its colour in every chart, and its
# marker, for in grey several of the colours are alike.
COLOURS = {
    "triton": "#D55E00",
    "triton-portable": "#E69F00",
    "triton-hopper": "#882255",
    "triton-one-pass": "#AA4499",
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
    "transformers-sdpa": "#555555",
}
MARKERS = {
    "triton": "o",
    "triton-portable": "h",
    "triton-hopper": "P",
    "triton-one-pass": "p",
    "eager": "X",
    "sdpa": "s",
    "sdpa-flash": "v",
    "sdpa-cudnn": "D",
    "sdpa-efficient": "^",
    "sdpa-math": "<",
    "flex": ">",
    "flash_attention_2": "*",
    "torch": "s",
    "compiled": "v",
    "liger": "D",
    "transformers-sdpa": "X",
}
