"""What a call costs the host, ours and theirs, with a driver that launches nothing: a table, a JSON file, a chart.

    python bench/host_overhead.py
    python bench/host_overhead.py --quick

A GPU waits for its host wherever kernels are short: at batch 1 and up to 1024 tokens, in most of GPT-2. The cost is
Python, the dispatcher and autograd, so no GPU is needed to measure it: kernels are compiled for a chip, launches do
nothing, tensors are tiny CPU tensors. What PyTorch itself computes is computed, by all providers alike; it is little.

`host_us` is the CPU time of a call, one thread, in the quickest round: other processes only add. `of_peer` is that over
the peer's in the same run (SDPA for attention, torch's LayerNorm with the addition before it, torch's GELU with the
bias, transformers' model with SDPA). `launches` counts kernels and PyTorch operations that compute, which on a GPU are
launches; `allocations` counts blocks of memory asked for. (Where somebody looks on, as a counter does, blocks go module
by module; here they are told not to.) Only ratios of one run mean something: another CPU, or another load, has other
times.

modes: inference (no gradient), forward (with a gradient), backward (the gradients of all inputs); of a model training
(forward, loss and backward, no optimizer), inference, and decode (one token after 15 in the cache).
"""

import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

if not __package__:  # run by its path: the checkout is found from there
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.lib.cli import Parser
from bench.lib.no_launch import launching_nothing
from bench.lib.providers import Provider, random_ids
from bench.lib.record import Record
from kernels import add_layer_norm, bias_gelu, flash_attention_packed
from model import GPT2, GPT2Config
from model.cache import KVCache
from model.layers import blocks

COLUMNS = ("what", "mode", "layers", "provider", "host_us", "median_us", "p80_us", "of_peer", "launches", "allocations")
PEERS = ("torch", "transformers-sdpa")
B, T, H, D = 1, 16, 2, 16
LAYERS = (2, 12, 24, 48)  # small has 12, medium 24, xl 48
ROUNDS, CALLS = 15, 100  # rounds of that many calls of an op; models take a call a round
# What returns a view of its input, or memory with nothing in it, launches nothing.
ALLOCATE_ONLY = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
ALLOCATE_ONLY |= {"detach", "lift_fresh"}


def sdpa(qkv):
    """Attention from the packed projection as transformers calls it."""
    q, k, v = qkv.view(B, T, 3, H, D).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, H * D)


def torch_add_layer_norm(x, residual, weight, bias):
    total = x + residual
    return F.layer_norm(total, weight.shape, weight, bias), total


def ops():
    """{op: ({provider: function}, inputs)}."""
    torch.manual_seed(0)
    C = H * D
    x, residual, qkv = torch.randn(B, T, C), torch.randn(B, T, C), torch.randn(B, T, 3 * C)
    weight, bias = torch.randn(2, C)
    return {
        "attention": ({"triton": partial(flash_attention_packed, num_heads=H), "torch": sdpa}, (qkv,)),
        "add_layer_norm": (
            {"triton": add_layer_norm, "torch": torch_add_layer_norm},
            (x, residual, weight, bias),
        ),
        "bias_gelu": (
            {"triton": bias_gelu, "torch": lambda x, bias: F.gelu(x + bias, approximate="tanh")},
            (x, bias),
        ),
    }


def op_calls(name, mode):
    """{provider: a call of the op}."""
    functions, inputs = ops()[name]
    calls = {}
    for provider, function in functions.items():
        leaves = [x.clone().requires_grad_(mode != "inference") for x in inputs]
        calls[provider] = partial(function, *leaves)
        if mode == "backward":
            outputs = calls[provider]()
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            gradients = [torch.randn_like(y) for y in outputs]
            calls[provider] = partial(torch.autograd.grad, outputs, leaves, gradients, retain_graph=True)
    return calls


def model_calls(layers, mode):
    """{provider: a step of a model of this many layers and tiny tensors}."""
    torch.manual_seed(0)
    rates = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    ids = {"bos_token_id": None, "eos_token_id": None}
    config = GPT2Config(vocab_size=64, n_positions=64, n_embd=H * D, n_layer=layers, n_head=H, **rates, **ids)
    ours = GPT2(config, kernel_implementation="triton").eval()
    return {name: model_call(Provider(name, ours), name, ours, mode) for name in ("triton", "transformers-sdpa")}


def model_call(provider, name, ours, mode):
    if mode == "training":
        step = provider.training(B, T)
        ours.set_kernel_implementation("triton")  # "auto", as the provider has it, is PyTorch's on a CPU
        return step
    model = provider.model.eval()
    if model is ours:
        model.set_attn_implementation(name)
    if mode == "inference":
        return torch.no_grad()(partial(model, random_ids(ours, B, T), use_cache=False))
    if model is ours:
        cache = KVCache(ours.config, B, capacity=T)
        cache.data.normal_()
        cache.advance([T - 1] * B)
    else:
        from transformers import DynamicCache

        cache = DynamicCache(config=model.config)
        for layer in range(ours.config.n_layer):
            cache.update(*torch.randn(2, B, H, T - 1, D), layer)

    token = random_ids(ours, B, 1)

    @torch.no_grad()
    def step():
        model(token, past_key_values=cache)
        cache.crop(-1)

    return step


class _Computing(TorchDispatchMode):
    """Counts the PyTorch operations that compute something; our own ops launch kernels, which are counted there."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        is_ours = function.namespace == "gpt2"
        self.count += not (is_ours or function.is_view or name in ALLOCATE_ONLY)
        return result


@contextmanager
def unnoticed():
    """Inside, blocks go by their launches though a mode or a profiler looks on."""
    asked = blocks.is_ordinary
    blocks.is_ordinary = lambda tensors, kinds: True
    try:
        yield
    finally:
        blocks.is_ordinary = asked


def counts(call, launches):
    """(launches, allocations) of a call."""
    call()
    launches.names.clear()
    with unnoticed(), _Computing() as computing:
        call()
    launched = len(launches.names) + computing.count
    with unnoticed(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = recorded.profiler.kineto_results.events()
    return launched, sum(event.name() == "[memory]" and event.nbytes() > 0 for event in events)


def times(calls, rounds, repeats):
    """{provider: microseconds of a call in each round}, the providers taking turns."""
    taken = {provider: [] for provider in calls}
    for call in calls.values():
        for _ in range(max(2, repeats // 10)):
            call()
    for _ in range(rounds):
        for provider, call in calls.items():
            start = time.thread_time()
            for _ in range(repeats):
                call()
            taken[provider].append((time.thread_time() - start) / repeats * 1e6)
    return taken


def rows_of(what, mode, layers, quick):
    with launching_nothing() as launches:
        calls = op_calls(what, mode) if layers is None else model_calls(layers, mode)
        counted = {provider: counts(call, launches) for provider, call in calls.items()}
        taken = times(calls, 3 if quick else ROUNDS, (2 if quick else CALLS) if layers is None else 1)
    least = {provider: min(each) for provider, each in taken.items()}
    peer = next(least[provider] for provider in PEERS if provider in least)
    return [
        {
            "what": what,
            "mode": mode,
            "layers": layers or 0,
            "provider": provider,
            "host_us": us,
            "median_us": float(np.median(taken[provider])),
            "p80_us": float(np.percentile(taken[provider], 80)),
            "of_peer": us / peer,
            "launches": counted[provider][0],
            "allocations": counted[provider][1],
        }
        for provider, us in least.items()
    ]


def cases(quick):
    """(what, mode, layers); layers is None for an op."""
    yield from ((op, mode, None) for op in ops() for mode in ("inference", "forward", "backward"))
    for layers in LAYERS[:1] if quick else LAYERS:
        yield from (("model", mode, layers) for mode in ("training", "inference", "decode"))


def main(argv=None):
    args = Parser("bench/host_overhead.py", __doc__, devices=("cpu",)).parse_args(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with Record(args, columns=COLUMNS) as record:
            for case in record.missing(list(cases(args.quick)), "host overhead"):
                record.add_from(case, rows_of, *case, args.quick)
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
