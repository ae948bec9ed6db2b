"""flex and flash_attention_2 keep the registry's contract; the second through a stand-in for its package.

The stand-in has the signatures and the semantics that flash_attn documents for 2.1 and newer, computed plainly.
"""

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from kernels import reference
from model.attention import attention, attention_backends, get_attention, registry
from model.attention import flash_attention_2 as flash_attention_2_module
from model.attention import flex as flex_module

BOUNDS = ("kv_start", "kv_end", "q_start")
# T_q, T_k, kv_start, kv_end, q_start of two rows.
CASES = {
    "square": (17, 17, None, None, None),
    "left": (17, 17, [3, 11], None, None),
    "right": (17, 17, None, [14, 5], None),
    "both sides": (17, 17, [2, 6], [14, 9], None),
    "a row without keys": (17, 17, [3, 9], [12, 9], None),
    "bounds beyond the keys": (17, 17, [-4, 0], [99, 17], None),
    "decode": (1, 33, None, None, None),
    "rows of a cache": (3, 33, [0, 4], None, [30, 12]),
    "keys yet to come": (3, 33, None, [33, 20], [5, 25]),
    "more queries than keys": (17, 9, None, None, None),
    "more queries than keys, padded": (17, 9, [1, 4], None, None),
}


def case(name):
    T_q, T_k, *bounds = CASES[name]
    q, k, v, do = (torch.randn(2, T, 3, 16).transpose(1, 2) for T in (T_q, T_k, T_k, T_q))
    bounds = [None if bound is None else torch.tensor(bound, dtype=torch.int32) for bound in bounds]
    return q, k, v, do, dict(zip(BOUNDS, bounds))


def call(backend, q, k, v, **options):
    o, weights = backend(q, k, v, **{"upcast": False, "scale": None} | options)
    assert weights is None
    assert o.transpose(1, 2).is_contiguous()  # memory order [B, T, H, D]
    return o


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("name", "causal"), [*((name, True) for name in CASES), ("square", False), ("both sides", False)]
)
def test_flex_keeps_the_contract(name, causal, monkeypatch):
    """Uncompiled, in its plain form: compiling for the CPU takes ten seconds a case, and has no backward there."""
    monkeypatch.setattr(flex_module, "_compiled_flex", lambda: flex_attention)
    q, k, v, _, bounds = case(name)
    o = call(flex_module.flex, q, k, v, causal=causal, scale=0.3, **bounds)
    expected, _ = reference.attention(q, k, v, causal=causal, scale=0.3, **bounds)
    torch.testing.assert_close(o, expected, rtol=0, atol=2e-6)


def test_flex_keeps_a_mask_until_its_bounds_change(monkeypatch):
    built = []
    monkeypatch.setattr(flex_module, "_build_block_mask", lambda *arguments: built.append(arguments))
    start = torch.tensor([1, 2], dtype=torch.int32)

    def mask(*bounds):
        flex_module._block_mask(8, 8, True, start.device, *bounds)
        return len(built)

    assert [mask(start, None, None), mask(start, None, None)] == [1, 1]
    assert mask(start.clone(), None, None) == 2
    assert mask(None, start, None) == 3
    start.add_(1)
    assert mask(start, None, None) == 4
    with torch.inference_mode():
        unversioned = torch.tensor([1, 2], dtype=torch.int32)
    assert [mask(unversioned, None, None), mask(unversioned, None, None)] == [5, 6]


def test_flex_says_what_it_cannot():
    assert "flex" in attention_backends()
    q, k, v, _, _ = case("square")
    with pytest.raises(ValueError, match=r"'flex' does not support device cpu \(it runs on cuda\).*eager, sdpa"):
        attention(q, k, v, backend="flex")
    assert get_attention("flex").dropout is False


def flash(q, k, v, dropout_p=0.0, **options):
    return call(flash_attention_2_module.flash_attention_2, q, k, v, dropout_p=dropout_p, **options)


@pytest.fixture
def flash_attn(monkeypatch):
    """A stand-in for the package; `calls` lists what it was asked for."""
    module = ModuleType("flash_attn")
    module.__spec__ = ModuleSpec("flash_attn", None)
    module.__version__ = "2.8.3"
    module.calls = []

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
        module.calls.append({"dropout_p": dropout_p, "softmax_scale": softmax_scale, "causal": causal, "q": q.shape})
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        o, _ = reference.attention(q, k, v, scale=softmax_scale, causal=causal)  # bottom-right
        return o.transpose(1, 2)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
    ):
        assert q.dim() == k.dim() == v.dim() == 3  # [total, H, D]
        outputs = []
        for ends, longest, packed in ((cu_seqlens_q, max_seqlen_q, q), (cu_seqlens_k, max_seqlen_k, k)):
            assert ends.dtype == torch.int32
            assert ends[-1] == len(packed)
            assert longest == ends.diff().max()
        for i in range(len(cu_seqlens_q) - 1):
            queries = slice(cu_seqlens_q[i], cu_seqlens_q[i + 1])
            keys = slice(cu_seqlens_k[i], cu_seqlens_k[i + 1])
            row = [x[None] for x in (q[queries], k[keys], v[keys])]
            outputs.append(flash_attn_func(*row, dropout_p, softmax_scale, causal)[0])
        return torch.cat(outputs)

    module.flash_attn_func = flash_attn_func
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return module


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("name", CASES)
def test_flash_attention_2_keeps_the_contract(flash_attn, name, causal):
    q, k, v, do, bounds = case(name)

    def with_gradients(function):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        o = function(*leaves)
        return o, *torch.autograd.grad(o, leaves, do)

    got = with_gradients(lambda *x: flash(*x, causal=causal, **bounds))
    expected = with_gradients(lambda *x: reference.attention(*x, causal=causal, **bounds)[0])
    for actual, wanted in zip(got, expected):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=2e-6)


def test_flash_attention_2_is_given_the_layout_that_it_takes(flash_attn):
    q, k, v, _, _ = case("decode")
    flash(q, k, v, causal=True, scale=0.25, dropout_p=0.1, **dict.fromkeys(BOUNDS))
    assert flash_attn.calls == [{"dropout_p": 0.1, "softmax_scale": 0.25, "causal": True, "q": (2, 1, 3, 16)}]
    flash_attn.calls.clear()
    q, k, v, _, bounds = case("left")
    flash(q, k, v, causal=True, scale=0.25, dropout_p=0.1, **bounds)
    row = {"dropout_p": 0.1, "softmax_scale": 0.25, "causal": True, "q": (1, 17, 3, 16)}
    assert flash_attn.calls == [row, row]  # one call for both rows: no query stands beyond the last key


def test_flash_attention_2_is_there_when_its_package_is(flash_attn, monkeypatch):
    monkeypatch.setattr(registry, "_BACKENDS", dict(registry._BACKENDS))
    monkeypatch.setattr(registry, "_NOT_INSTALLED", {})
    importlib.reload(flash_attention_2_module)
    backend = get_attention("flash_attention_2")
    assert backend.forward is flash_attention_2_module.flash_attention_2
    request = {"device": "cuda", "dtype": torch.float16, "head_dim": 64}
    assert backend.refusal(**request, padding=True, dropout=True, unequal_lengths=True) is None
    assert backend.refusal(**request | {"dtype": torch.float32}) == "torch.float32 (it computes float16, bfloat16)"


def test_flash_attention_2_is_not_there_when_its_package_is_not(monkeypatch):
    monkeypatch.setattr(registry, "_BACKENDS", {})
    monkeypatch.setattr(registry, "_NOT_INSTALLED", {})
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    importlib.reload(flash_attention_2_module)
    assert attention_backends() == ()
    with pytest.raises(ValueError, match="'flash_attention_2' needs the package flash_attn, which is not installed"):
        get_attention("flash_attention_2")


def test_an_old_flash_attn_is_refused(flash_attn):
    flash_attn.__version__ = "2.0.8"
    q, k, v, _, bounds = case("square")
    with pytest.raises(ImportError, match=r"flash_attn 2\.0\.8 is installed; 2\.1 or newer is required"):
        flash(q, k, v, causal=True, **bounds)
