"""A block as one list of launches: the bits of the modules, and the modules wherever somebody looks on.

The gradients of three biases, c_attn's and c_proj's, are sums over rows: PyTorch takes them in a pass of its own, we in
the kernel that computes the rows, in another order. Ours may err there as much as PyTorch's, against the sum in float64
of those rows. Under autocast the gradients of matrices are ours in fp32; rounded to two bytes they are PyTorch's.
"""

import dataclasses
import importlib
import itertools
from contextlib import nullcontext
from functools import partial

import numerics
import pytest
import torch
from lanes import across_lanes
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import configs
from kernels.launch import forget
from model import GPT2, GPT2Config, gpt2
from model.cache import KVCache
from model.inputs import Padding
from model.layers import block, ops
from model.layers.blocks import Blocks

SIZES = {"n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 32, "vocab_size": 101}
RATES = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
DROPOUT = {"embd_pdrop": 0.1, "attn_pdrop": 0.25, "resid_pdrop": 0.125}
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0, 0]])


def build(device="cpu", dtype=torch.float32, **fields):
    torch.manual_seed(0)
    config = GPT2Config(**SIZES, **{**RATES, **fields}, bos_token_id=None, eos_token_id=None)
    model = GPT2(config, attn_implementation="triton", kernel_implementation="triton").to(device, dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model, torch.randint(SIZES["vocab_size"], MASK.shape, device=device)


@pytest.fixture
def taken(monkeypatch):
    """The calls of Blocks, as (whether a gradient is kept)."""
    calls, call = [], Blocks.__call__

    def noted(self, *arguments):
        calls.append(torch.is_grad_enabled())
        return call(self, *arguments)

    monkeypatch.setattr(Blocks, "__call__", noted)
    return calls


def module_by_module(monkeypatch):
    monkeypatch.setattr(Blocks, "of", classmethod(lambda cls, *arguments, **options: None))


def step(model, ids, **options):
    """Logits, loss, hidden states and every gradient of a training step, from one seed."""
    torch.manual_seed(1)
    model.zero_grad()
    output = model(ids, labels=ids, output_hidden_states=True, **options)
    output.loss.backward()
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return {"logits": output.logits, "loss": output.loss, **grads} | dict(enumerate(output.hidden_states))


def gradients_of_projections(patch):
    """{name of the bias of c_attn and either c_proj: the gradient [B, T, :] of that projection's result}, filled in
    where modules go backward."""
    received = {}
    for module, name, projections in (
        (gpt2, "self_attention", ["attn.c_attn"]),
        (ops, "fused_add_layer_norm", ["attn.c_proj", "mlp.c_proj"]),
    ):
        patch.setattr(module, name, _noting(getattr(module, name), projections, received))
    return received


def _noting(function, projections, received):
    """function(x, ...), that notes the gradient of x: of the next layer's projections in turn."""
    calls = itertools.count()

    def noted(x, *arguments, **options):
        layer, which = divmod(next(calls), len(projections))
        if x.requires_grad:
            name = f"transformer.h.{layer}.{projections[which]}.bias"
            x.register_hook(lambda d: received.update({name: d}))
        return function(x, *arguments, **options)

    return noted


MATRICES = ("attn.c_attn.weight", "c_proj.weight", "mlp.c_fc.weight")


def assert_same_bits(first, second, summed=(), products=None):
    """summed: {name: rows [..., C]} of what is a sum over rows in either; products: autocast's dtype; see above."""
    assert first.keys() == second.keys()
    for name, a in first.items():
        b = second[name]
        assert (a is None) == (b is None), name
        if a is not None and name in summed:
            exact = summed[name].double().flatten(0, -2).sum(0)
            numerics.assert_close(a, b, exact, factor=1.0, what=name)
        elif a is not None and products is not None and str(name).endswith(MATRICES):
            assert a.dtype == b.dtype == torch.float32
            limits = torch.finfo(products)
            half_ulp = limits.eps / 2 * b.abs().clamp_min(limits.smallest_normal)
            assert ((a - b).abs() <= half_ulp + numerics.floor(torch.float32, b)).all(), name
            assert not torch.equal(a, b), f"{name} is rounded"
        elif a is not None:
            assert a.dtype == b.dtype and torch.equal(a, b), name  # noqa: PT018


def both(model, ids, taken, monkeypatch, run=step, products=None, **options):
    """run() by launches, then module by module; how many blocks went by launches the first time."""
    whole = run(model, ids, **options)
    count = len(taken)
    with monkeypatch.context() as patch:
        module_by_module(patch)
        summed = gradients_of_projections(patch)
        plain = run(model, ids, **options)
    assert len(taken) == count
    assert_same_bits(whole, plain, summed, products)
    return count


CASES = {
    "plain": {},
    "dropout, padded": {"fields": DROPOUT, "attention_mask": MASK},
    "scales": {"fields": {"scale_attn_by_inverse_layer_idx": True, "n_inner": 48, "layer_norm_epsilon": 1e-3}},
}
TOKENS = torch.tensor([[5, 2, 7, 2, 9]])


@pytest.mark.parametrize("case", CASES)
@across_lanes(torch.float32, lanes=("interpret", "sm_90", "gpu"))
def test_a_training_step_has_the_bits_of_the_modules(lane, dtype, case, taken, monkeypatch):
    options = dict(CASES[case])
    model, ids = build(lane.device, dtype, **options.pop("fields", {}))
    options = {name: value.to(lane.device) for name, value in options.items()}
    assert both(model.train(), ids, taken, monkeypatch, **options) == 2


@across_lanes(torch.bfloat16, lanes=("sm_90", "gpu"))
def test_in_two_bytes(lane, dtype, taken, monkeypatch):
    model, ids = build(lane.device, dtype, **DROPOUT)
    assert both(model.train(), ids, taken, monkeypatch) == 2


@across_lanes(lanes=("interpret",))
def test_rows_too_wide_for_sums_beside_them(lane, taken, monkeypatch):
    """Rows of 8193 columns and more are summed by a kernel of their own, which is what small ones get here."""
    norm = importlib.import_module("kernels.layer_norm")

    def wide(direction, N):
        return dataclasses.replace(configs.row_config(direction, N), SUMS=False)

    forget()
    for place, name in ((norm, "_backward_config"), (block, "_backward_config")):
        monkeypatch.setattr(place, name, partial(wide, "backward"))
    monkeypatch.setattr(norm, "row_config", wide)
    summed, launch = [], norm._weight_gradients_kernel.run
    monkeypatch.setattr(norm._weight_gradients_kernel, "run", lambda *a, **o: summed.append(a) or launch(*a, **o))
    model, _ = build(lane.device)
    try:
        assert both(model, TOKENS, taken, monkeypatch) == 2
    finally:
        forget()
    assert len(summed) == 2 * 5  # norms of two passes


@across_lanes(torch.bfloat16, torch.float16, lanes=("sm_90", "gpu"))
def test_under_autocast(lane, dtype, taken, monkeypatch):
    model, ids = build(lane.device, **DROPOUT)

    def mixed(model, ids):
        with torch.autocast(lane.device, dtype):
            return step(model, ids)

    assert both(model.train(), ids, taken, monkeypatch, mixed, products=dtype) == 2


@across_lanes(lanes=("sm_90", "gpu"))
def test_backward_alone_under_autocast(lane, taken, monkeypatch):
    model, _ = build(lane.device)

    def run(model, ids):
        model.zero_grad()
        loss = model(ids, labels=ids).loss
        with torch.autocast(lane.device, torch.bfloat16):
            loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    assert both(model, TOKENS.to(lane.device), taken, monkeypatch, run) == 2


@across_lanes(torch.float16, lanes=("interpret", "sm_90", "gpu"))
def test_without_a_gradient(lane, dtype, taken, monkeypatch):
    model, ids = build(lane.device, dtype, **DROPOUT)

    def run(model, ids):
        torch.manual_seed(1)
        with torch.no_grad():
            output = model(ids, attention_mask=MASK.to(lane.device), output_hidden_states=True, use_cache=False)
        return dict(enumerate(output.hidden_states)) | {"logits": output.logits}

    for training in (False, True):  # dropout knows no gradient
        assert both(model.train(training), ids, taken, monkeypatch, run) == 2
        taken.clear()


@pytest.mark.parametrize("fields", [{}, DROPOUT], ids=["eval", "dropout"])
@across_lanes(torch.float16, lanes=("interpret", "sm_90", "gpu"))
def test_with_a_cache(lane, dtype, fields, taken, monkeypatch):
    """A prompt, one token more, three more at once: what is returned and what is stored."""
    model, _ = build(lane.device, dtype, **fields)
    ids = torch.tensor([[5, 2, 7, 2, 9, 4, 1], [3, 3, 8, 6, 0, 9, 9]], device=lane.device)
    ids = ids[: 1 if lane.device == "cpu" else 2]

    def run(model, ids):
        torch.manual_seed(1)
        cache, results = KVCache(model.config, len(ids), capacity=8, device=lane.device, dtype=dtype), {}
        for step in (ids[:, :3], ids[:, 3:4], ids[:, 4:]):
            output = model(step, past_key_values=cache, output_hidden_states=True)
            results |= {(cache.lengths[0], i): x for i, x in enumerate((output.logits, *output.hidden_states))}
        return results | {"cache": cache.data}

    assert both(model.train(bool(fields)), ids, taken, monkeypatch, run) == 6


CACHES = {
    "two rows on a CPU": lambda cache: None,
    "rows of different lengths": lambda cache: setattr(cache, "lengths", [1, 2]),
    "padding on the left": lambda cache: setattr(cache, "starts", [0, 1]),
    "one query at a time": lambda cache: setattr(cache, "one_query_at_a_time", True),
    "another dtype": lambda cache: setattr(cache, "data", cache.data.float()),
}


@pytest.mark.parametrize("case", CACHES)
@across_lanes(torch.float16, lanes=("interpret",))
def test_a_cache_of_another_kind_attends_itself(lane, dtype, case, taken, monkeypatch):
    model, ids = build(lane.device, dtype)

    def run(model, ids):
        cache = KVCache(model.config, 2, capacity=8, dtype=dtype)
        cache.advance([2, 2])
        CACHES[case](cache)
        try:
            return {"logits": model(ids[:, :2], past_key_values=cache).logits}
        except (ValueError, RuntimeError) as error:
            return {"error": torch.tensor(list(str(error).encode()))}

    assert both(model, ids, taken, monkeypatch, run) == 0


TRAINED = {
    "the last norm": ["ln_f"],
    "one bias in the middle": ["h.1.mlp.c_fc.bias"],
    "the first projection": ["h.0.attn.c_attn.weight"],
    "behind attention": ["h.1.attn.c_proj.bias", "h.0.ln_2"],
}


@pytest.mark.parametrize("case", TRAINED)
@across_lanes(lanes=("interpret", "sm_90", "gpu"))
def test_what_is_frozen_gets_no_gradient_and_costs_no_launch(lane, case, taken, monkeypatch):
    model, _ = build(lane.device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in TRAINED[case]))
    assert both(model, TOKENS.to(lane.device), taken, monkeypatch) == 2


@pytest.mark.parametrize("reentrant", [False, True])
@across_lanes(lanes=("interpret", "gpu"))
def test_blocks_are_recomputed(lane, reentrant, taken, monkeypatch):
    model, ids = build(lane.device, **DROPOUT)[0], TOKENS.to(lane.device)
    expected = step(model.train(), ids)
    taken.clear()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_same_bits(step(model, ids), expected)
    assert taken == [not reentrant] * 2 + [True] * 2  # the reentrant kind goes forward without a gradient


# Who must see modules or operations gets them


class Scaled(nn.Module):
    """A linear layer with something beside it, as LoRA has it."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x)


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Listening(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def hook(place, register="register_forward_hook"):
    return lambda model, patch: getattr(model.transformer.get_submodule(place), register)(lambda *arguments: None)


def replace(place):
    def change(model, patch):
        model.transformer.set_submodule(place, Scaled(model.transformer.get_submodule(place)))

    return change


def own_forward(place):
    def change(model, patch):
        module = model.transformer.get_submodule(place)
        module.forward = module.forward

    return change


def transposed(model, patch):
    weight = model.transformer.h[1].mlp.c_fc.weight
    weight.data = weight.data.t().contiguous().t()


def negative(model, patch):
    """A bias whose memory holds the opposite of its values."""
    norm = model.transformer.h[1].ln_2
    norm.bias = nn.Parameter(torch._neg_view((-norm.bias).detach()))


def on_all_modules(model, patch):
    handle = nn.modules.module.register_module_forward_hook(lambda *arguments: None)
    patch.setattr(model, "handle", handle, raising=False)


# By what is done: to the model before (and how many of two blocks still go by launches), or around the call.
CHANGES = {
    "a hook on h.1": (hook("h.1"), 0),  # the block before it leaves h.1's norm to h.1
    **{f"a hook on {place}": (hook(place), 1) for place in ("h.1.mlp", "h.1.attn.c_proj", "h.1.mlp.act")},
    "a hook on h.1.ln_1": (hook("h.1.ln_1"), 1),  # the norm behind the first block
    "a hook on h.0.ln_2": (hook("h.0.ln_2", "register_forward_pre_hook"), 1),
    "a hook on ln_f": (hook("ln_f", "register_full_backward_hook"), 1),
    "a hook on a dropout": (hook("h.0.attn.resid_dropout"), 1),
    "a hook on all modules": (on_all_modules, 0),
    "LoRA": (replace("h.0.attn.c_attn"), 1),
    "another MLP": (replace("h.1.mlp"), 1),
    "another forward": (own_forward("h.1.mlp.c_fc"), 1),
    "a transposed weight": (transposed, 1),
    "a negative view": (negative, 1),
}
AROUND = {
    "a dispatch mode": Watching,
    "a function mode": Listening,
    "forward-mode AD": torch.autograd.forward_ad.dual_level,
}


def logits(model, ids, around=nullcontext):
    with around():
        return {"logits": model(ids).logits}


@pytest.mark.parametrize("change", CHANGES)
@across_lanes(lanes=("interpret",))
def test_what_is_observed_or_replaced_is_called_as_a_module(lane, change, taken, monkeypatch):
    model, _ = build()
    apply, served = CHANGES[change]
    apply(model, monkeypatch)
    try:
        assert both(model, TOKENS, taken, monkeypatch, logits) == served
    finally:
        if hasattr(model, "handle"):
            model.handle.remove()


@pytest.mark.parametrize("name", AROUND)
@across_lanes(lanes=("interpret",))
def test_who_watches_operations_sees_them(lane, name, taken):
    model, _ = build()
    expected = logits(model, TOKENS)
    taken.clear()
    if name == "forward-mode AD":
        with AROUND[name]():
            assert Blocks.of(torch.ones(1, 5, 32), 16, "triton", Padding(), None, plain=False) is None
        return
    assert_same_bits(logits(model, TOKENS, AROUND[name]), expected)
    assert not taken
