"""GPT-2 as a whole, backend against backend: the two tables and the diagram of GPT-2's model page.

    python bench/model_sweep.py                                  # what this machine can do
    python bench/model_sweep.py --pair sdpa triton --size gpt2-large --dtype float16
    python bench/model_sweep.py --pair transformers-sdpa sdpa    # where transformers is installed

training    forward and backward of the loss, no optimiser: time per batch.
decoding    one token after T - 1 in the cache: its latency. What generate() adds around the model is not in it.
inference   a forward pass over T tokens, logits of the last position: the diagram, over batch sizes.

Weights are random, from one seed, and the same for every provider. Before a provider is timed, its logits for 64 tokens
are held against float64 by the tolerance rule of the tests. Peak memory is the provider's weights and what the pass
allocates above them; a CPU's is not measured. Files: model_sweep.json, model_sweep.md, model_inference.png.
"""

import importlib.util
from functools import partial
from itertools import product

import torch

from bench import harness
from bench.harness import OK, UsageError
from model import GPT2, GPT2Config, attention_backends
from model.attention import get_attention
from model.cache import KVCache
from model.config import PRESETS

THEIRS = ("transformers-eager", "transformers-sdpa")
MODES = ("training", "decoding", "inference")

# By device, and whether --quick: {mode: (batch sizes, sequence lengths)}.
PAGE = {
    "training": ((1, 2, 4), (128, 256, 512, 1024)),
    "decoding": ((1, 2, 4), (128, 256, 512, 768)),
    "inference": ((1, 2, 4, 8), (512,)),
}
SIZES = {
    ("cuda", False): PAGE,
    ("cuda", True): {"training": ((1,), (128, 256)), "decoding": ((1,), (128,)), "inference": ((1, 2), (512,))},
    ("cpu", False): {
        "training": ((1, 2), (64, 128)),
        "decoding": ((1, 2, 4), (64, 256)),
        "inference": ((1, 2), (128,)),
    },
    ("cpu", True): {"training": ((1,), (32,)), "decoding": ((1, 2), (32,)), "inference": ((1, 2), (32,))},
}
GATE_TOKENS = 64
COLUMNS = ("backend", "mode", "dtype", "B", "T", "median_ms", "p20_ms", "p80_ms", "peak_memory_mb", "error", "status")


class Provider:
    """A model under a backend: ours, or transformers', on the same weights."""

    def __init__(self, name, ours):
        self.name = name
        self.ours = ours
        self.model = ours if name not in THEIRS else _transformers(name, ours)

    def use(self):
        """Our backends share one model; this gives it mine."""
        if self.model is self.ours:
            self.ours.set_attn_implementation(self.name)
        return self.model

    def logits(self, ids):
        with torch.no_grad():
            return self.use()(ids, use_cache=False).logits

    def training(self, B, T):
        model, ids = self.use().train(), _ids(self.ours, B, T)

        def step():
            model.zero_grad(set_to_none=True)
            model(ids, labels=ids, use_cache=False).loss.backward()

        return step

    @torch.no_grad()
    def decoding(self, B, T):
        model, ids = self.use().eval(), _ids(self.ours, B, T)
        if model is self.ours:
            model.pack_weights()
            cache = KVCache(model.config, B, capacity=T, device=model.device, dtype=model.dtype)
        else:
            from transformers import DynamicCache

            cache = DynamicCache(config=model.config)
        model(ids[:, :-1], past_key_values=cache, logits_to_keep=1)

        @torch.no_grad()
        def step():
            model(ids[:, -1:], past_key_values=cache, logits_to_keep=1)
            cache.crop(-1)

        return step

    def inference(self, B, T):
        model, ids = self.use().eval(), _ids(self.ours, B, T)

        @torch.no_grad()
        def forward():
            model(ids, use_cache=False, logits_to_keep=1)

        return forward


def _transformers(name, ours):
    import transformers

    values = {key: value for key, value in ours.config.to_dict().items() if key != "model_type"}
    config = transformers.GPT2Config(**values, attn_implementation=name.removeprefix("transformers-"))
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config)
    model.load_state_dict(ours.state_dict(), assign=True)
    model.tie_weights()
    return model.eval()


def _ids(model, B, T):
    generator = torch.Generator().manual_seed(T)
    return torch.randint(0, model.config.vocab_size, (B, T), generator=generator).to(model.device)


def build(args):
    """Our model on the device, random weights, dropout 0: with it there would be nothing to compare."""
    torch.manual_seed(0)
    config = GPT2Config.preset(args.size, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    return GPT2(config).to(args.device, harness.DTYPES[args.dtype]).eval()


def gate(providers, ours):
    """{name: (error, status)}: logits against those of the same weights in float64."""
    ids = _ids(ours, 1, GATE_TOKENS)
    with torch.no_grad():
        oracle_model = GPT2(ours.config, attn_implementation="eager").to(ours.device, torch.float64).eval()
        oracle_model.load_state_dict(ours.state_dict())
        oracle = oracle_model(ids, use_cache=False).logits
    del oracle_model
    baseline = Provider("eager", ours).logits(ids)
    judged = {}
    for provider in providers:
        results = {"logits": (provider.logits(ids), baseline, oracle)}
        judged[provider.name] = harness.judge(results, factor=harness.FORWARD_FACTOR)
    return judged


def sweep(args):
    """The rows of every mode, batch size and sequence length."""
    ours = build(args)
    providers = [Provider(name, ours) for name in args.pair]
    judged = gate(providers, ours)
    weights_mb = sum(p.nbytes for p in ours.parameters()) / 2**20
    sizes = SIZES[args.device.type, args.quick]
    shapes = [
        (mode, B, T)
        for mode in args.mode
        for B, T in product(args.batch or sizes[mode][0], args.seq_lens or sizes[mode][1])
    ]
    rows = []
    for mode, B, T in harness.progress(shapes, "model sweep"):
        entries = {}
        for provider in providers:
            error, status = judged[provider.name]
            entry = {"backend": provider.name, "mode": mode, "size": args.size, "dtype": args.dtype, "B": B, "T": T}
            entry |= dict.fromkeys(("median_ms", "p20_ms", "p80_ms", "peak_memory_mb"))
            rows.append(entry | {"error": error, "lane": args.device.type, "status": status})
            if status == OK:
                entries[provider.name] = rows[-1]
        for provider in providers:
            if provider.name not in entries:
                continue
            entry = entries[provider.name]
            once = partial(_once, getattr(provider, mode), B, T)
            peak, entry["status"] = harness.attempt(harness.peak_memory_mb, once, args.device)
            entry["peak_memory_mb"] = None if peak is None else peak + weights_mb
            if entry["status"] != OK:
                del entries[provider.name]
        makes = {p.name: partial(getattr(p, mode), B, T) for p in providers if p.name in entries}
        for name, timing in harness.measure(makes, args.device, quick=args.quick).items():
            entries[name].update(timing)
    return rows


def _once(make, B, T):
    make(B, T)()


TITLES = {
    "training": ("Time per batch ({} - s)", 1e-3, "Training: forward and backward"),
    "decoding": ("Per token latency {} (ms)", 1.0, "Decoding: one token after seq len - 1"),
    "inference": ("Time {} (ms)", 1.0, "Inference: a forward pass"),
}


def markdown(rows, pair, environment):
    """The page's tables, in its own columns, of the first provider of the pair against the second."""
    a, b = pair
    parts = [
        f"{environment['device']}, {rows[0]['size']}, {rows[0]['dtype']}, torch {environment['torch']}; random weights"
    ]
    for mode, (time, scale, title) in TITLES.items():
        mine = {(row["backend"], row["B"], row["T"]): row for row in rows if row["mode"] == mode}
        if not mine:
            continue
        names = ("Batch size", "Seq len", time.format(a), time.format(b), "Speedup (%)")
        names += (f"{a} peak mem (MB)", f"{b} peak mem (MB)", "Mem saved (%)")
        lines = [f"\n## {title}\n", "| " + " | ".join(names) + " |", "|" + " ---: |" * len(names)]
        for B, T in dict.fromkeys((row["B"], row["T"]) for row in mine.values()):
            first, second = mine[a, B, T], mine[b, B, T]
            cells = [B, T, *(_time(row, scale) for row in (first, second)), _percent(first, second, "median_ms")]
            cells += [*(harness.cell(row["peak_memory_mb"]) for row in (first, second))]
            cells += [_percent(first, second, "peak_memory_mb")]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        parts.append("\n".join(lines))
    return "\n".join(parts) + "\n"


def _time(row, scale):
    return row["status"] if row["status"] != OK else harness.cell(row["median_ms"] * scale)


def _percent(first, second, field):
    """By how much the first exceeds the second, in percent of the second, as the page has it."""
    if first[field] is None or second[field] is None:
        return harness.NOT_MEASURED
    return f"{100 * (first[field] / second[field] - 1):.1f}"


def parser():
    result = harness.Parser("bench/model_sweep.py", __doc__, check=complete)
    known = (*attention_backends(), *THEIRS)
    result.add_argument("--pair", nargs=2, metavar="NAME", help=f"two of {', '.join(known)}")
    result.add_argument("--size", choices=PRESETS, help="default: gpt2-large on a GPU, as on the page; else distilgpt2")
    result.add_argument("--dtype", choices=harness.DTYPES, help="default: float16 on a GPU, float32 on a CPU")
    result.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES), help="default: all")
    result.add_argument(
        "--batch", type=harness.positive, nargs="+", metavar="B", help="default: the page's; fewer on a CPU"
    )
    result.add_argument(
        "--seq-lens", type=harness.positive, nargs="+", metavar="T", help="default: the page's; fewer on a CPU"
    )
    return result


def complete(args):
    """Fills in what was not given and refuses what cannot be served, before any work."""
    on_gpu = args.device.type == "cuda"
    args.size = args.size or ("gpt2-large" if on_gpu else "distilgpt2")
    args.dtype = args.dtype or ("float16" if on_gpu else "float32")
    args.pair = args.pair or (["sdpa", "triton"] if on_gpu else ["eager", "sdpa"])
    config = GPT2Config.preset(args.size)
    for name in args.pair:
        if name in THEIRS:
            if importlib.util.find_spec("transformers") is None:
                raise UsageError(f"--pair {name}: transformers is not installed here")
            continue
        if name not in attention_backends():
            raise UsageError(f"--pair {name}: unknown; choose from {', '.join((*attention_backends(), *THEIRS))}")
        if name == "triton" and not on_gpu:
            raise UsageError("--pair triton: not timed without a GPU; bench/attention_sweep.py checks it here")
        request = {"device": args.device, "dtype": harness.DTYPES[args.dtype], "head_dim": config.head_dim}
        reason = get_attention(name).refusal(**request)
        if reason is not None:
            raise UsageError(f"--pair {name} does not support {reason}")
    if args.pair[0] == args.pair[1]:
        raise UsageError(f"--pair {args.pair[0]} {args.pair[1]}: two different providers are required")
    for T in args.seq_lens or ():
        if not 2 <= T <= config.n_positions:
            raise UsageError(f"--seq-lens {T}: between 2 and n_positions = {config.n_positions} is required")


def main(argv=None):
    args = parser().parse_args(argv)
    environment = harness.environment(args.device, args.command)
    rows = sweep(args)
    text = markdown(rows, args.pair, environment)
    (args.out / "model_sweep.md").write_text(text, encoding="utf-8")
    path = args.out / "model_sweep.json"
    if "inference" in args.mode:
        harness.finish(path, environment, rows, columns=COLUMNS)
    else:  # no diagram
        harness.save(path, environment, rows)
        print(f"{harness.table(rows, COLUMNS)}\n\nwrote {path}")
    print(f"wrote {args.out / 'model_sweep.md'}")


if __name__ == "__main__":
    main()
