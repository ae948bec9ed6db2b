"""kernels/decode: a step is the model's forward pass of one token, in every lane, whatever the batch and the cache."""

import copy

import pytest
import torch
from lanes import across_lanes
from numerics import assert_close

from bench.lib.sass import inspect
from kernels.decode import DecodeBuffers, from_int8, pack, to_int8
from kernels.decode import step as step_module
from kernels.decode.step import BK, SPLIT
from kernels.launch import forget
from kernels.simulator import DependentLaunchRace, simulate
from model import GPT2, GPT2Config
from model.cache import KVCache
from model.generation.fused import MAX_TEXTS, FusedStep
from model.generation.rounded import rounded

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
CAPACITY = 2 * SPLIT
V = 131


def build(dtype, device, n_layer=2, n_embd=96, n_head=2, **fields):
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=n_layer, n_head=n_head, n_embd=n_embd, n_positions=3 * SPLIT, vocab_size=V, bos_token_id=0, **fields
    )
    model = GPT2(config, attn_implementation="eager", kernel_implementation="torch").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.to(device, dtype)


def held_cache(model, lengths, capacity=CAPACITY):
    """Random keys and values; NaN where a row holds none."""
    config, B = model.config, len(lengths)
    data = torch.full((config.n_layer, 2, B, config.n_head, capacity, config.head_dim), torch.nan)
    for b, length in enumerate(lengths):
        torch.manual_seed(100 + length)  # a row's contents depend on its length alone
        data[:, :, b, :, :length] = torch.randn(config.n_layer, 2, config.n_head, length, config.head_dim)
    return data.to(model.device, model.dtype)


def by_kernels(model, ids, data, lengths, weights="model"):
    B, device = len(lengths), model.device
    step = FusedStep(model, B, data.shape[4], weights=weights)
    logits = torch.full((B, model.config.vocab_size), torch.nan, device=device)
    counts = torch.tensor(lengths, dtype=torch.int32, device=device)
    step.run(torch.tensor(ids, device=device)[:, None], counts, data, logits)
    assert counts.tolist() == lengths
    return logits


@torch.no_grad()
def by_model(model, ids, data, lengths):
    """Logits, keys and values by the model's forward pass, in the dtype of the model."""
    cache = KVCache(model.config, len(lengths), capacity=data.shape[4], device=model.device, dtype=model.dtype)
    cache.data.copy_(data.nan_to_num(0.0))
    cache.lengths = list(lengths)
    logits = model(torch.tensor(ids, device=model.device)[:, None], past_key_values=cache).logits[:, 0]
    return logits, cache.data


def new_slots(data, lengths):
    """Keys and values of the new token, [B, n_layer, 2, H, D]."""
    return torch.stack([data[:, :, b, :, length] for b, length in enumerate(lengths)])


@across_lanes(F32, F16, BF16, lanes=("sm_80", "sm_90", "gpu"))
def test_logits_keys_and_values_are_those_of_the_forward_pass(lane, dtype):
    """At lengths on both sides of a split, and in an empty cache."""
    lengths, ids = [SPLIT + 6, 0, SPLIT - 1, SPLIT], [3, 77, 130, 9]
    model = build(dtype, lane.device)
    data = held_cache(model, lengths)
    before = data.clone()
    baseline = by_model(model, ids, data, lengths)
    oracle = by_model(copy.deepcopy(model).double(), ids, data.double(), lengths)
    logits = by_kernels(model, ids, data, lengths)
    assert_close(logits.to(dtype), baseline[0], oracle[0])
    assert_close(*(new_slots(x, lengths) for x in (data, baseline[1], oracle[1])))
    for b, length in enumerate(lengths):
        data[:, :, b, :, length] = before[:, :, b, :, length]
    assert torch.equal(data.nan_to_num(7.0), before.nan_to_num(7.0))  # nothing else was written


@across_lanes(F16, lanes=("sm_90", "gpu"))
@pytest.mark.parametrize(
    "fields",
    [
        {"n_embd": BK + 44, "n_head": 3, "n_layer": 1},
        {"n_inner": 36, "activation_function": "gelu_pytorch_tanh"},
        {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False},
        {"tie_word_embeddings": False, "layer_norm_epsilon": 1e-3},
    ],
    ids=lambda fields: "+".join(fields),
)
def test_widths_scales_and_weights_of_any_kind(lane, dtype, fields):
    model, lengths, ids = build(dtype, lane.device, **fields), [5], [3]
    data = held_cache(model, lengths)
    baseline = by_model(model, ids, data, lengths)[0]
    oracle = by_model(copy.deepcopy(model).double(), ids, data.double(), lengths)[0]
    assert_close(by_kernels(model, ids, data, lengths).to(dtype), baseline, oracle)


@across_lanes(F16, lanes=("sm_90", "gpu"))
def test_a_row_depends_on_neither_the_batch_nor_the_capacity(lane, dtype):
    model = build(dtype, lane.device, n_layer=1)
    lengths = [SPLIT + 1, 7, 20]
    together = by_kernels(model, [1, 2, 3], held_cache(model, lengths), lengths)
    alone = by_kernels(model, [2], held_cache(model, lengths[1:2], 3 * SPLIT), lengths[1:2])
    assert torch.equal(together[1:2], alone)
    full = by_kernels(model, [2] * MAX_TEXTS, held_cache(model, [7] * MAX_TEXTS), [7] * MAX_TEXTS)
    assert torch.equal(full, alone.expand_as(full))


@across_lanes(F32, F16, BF16, lanes=("sm_90", "gpu"))
def test_int8_weights_are_the_rounded_ones(lane, dtype):
    """Against the forward pass with the weights that the integers stand for; the baseline rounds them to the dtype."""
    lengths, ids = [SPLIT + 6, 0], [3, 77]
    model = build(dtype, lane.device, n_layer=1)
    data = held_cache(model, lengths)
    exact = rounded(copy.deepcopy(model).double())
    baseline = by_model(rounded(model), ids, data, lengths)
    oracle = by_model(exact, ids, data.double(), lengths)
    logits = by_kernels(model, ids, data, lengths, "int8")
    assert_close(logits.to(dtype), baseline[0], oracle[0])
    assert_close(*(new_slots(x, lengths) for x in (data, baseline[1], oracle[1])))
    alone = by_kernels(model, ids[1:], held_cache(model, lengths[1:]), lengths[1:], "int8")
    assert torch.equal(logits[1:], alone)


def verified(model, ids, data, lengths, counts=None, weights="model"):
    """Logits [B, T, V] after ids [B, T], NaN where counts says that there is no token."""
    (B, T), device = ids.shape, model.device
    lengths, counts = (x and torch.tensor(x, dtype=torch.int32, device=device) for x in (lengths, counts))
    logits = torch.full((B * T, V), torch.nan, device=device)
    FusedStep(model, B, CAPACITY, T, weights).run(ids.contiguous(), lengths, data, logits, counts)
    return logits.view(B, T, V)


@across_lanes(F16, lanes=("sm_90", "gpu"))
def test_drafts_get_the_bits_of_single_steps(lane, dtype):
    """Two texts, of which one has fewer new tokens: across a split's border, each token as if it came alone."""
    model = build(dtype, lane.device)
    lengths, counts, T = [SPLIT - 2, 5], [4, 2], 4
    ids = torch.tensor([[3, 77, 130, 9], [8, 1, 0, 0]], device=model.device)
    data = held_cache(model, lengths)
    before, single = data.clone(), data.clone()
    expected = [verified(model, ids[:, t : t + 1], single, [n + t for n in lengths])[:, 0] for t in range(T)]
    logits = verified(model, ids, data, lengths, counts)
    for b, (length, count) in enumerate(zip(lengths, counts)):
        assert torch.equal(logits[b, :count], torch.stack(expected)[:count, b])
        assert logits[b, count:].isnan().all()  # what is no token writes nothing
        new = slice(length, length + count)
        assert torch.equal(data[:, :, b, :, new], single[:, :, b, :, new])
        before[:, :, b, :, new] = data[:, :, b, :, new]
    assert torch.equal(data.nan_to_num(7.0), before.nan_to_num(7.0))


def test_int8_keeps_to_half_a_scale_and_tells_of_what_is_not_finite():
    torch.manual_seed(0)
    weight = torch.randn(64, 96).double()
    weight[3] = 0.0
    integers, scale = to_int8(weight)
    assert (integers.dtype, scale.dtype, integers.abs().max()) == (torch.int8, F32, 127)
    error = (from_int8(integers, scale) - weight).abs()
    assert (error <= 0.5001 * scale[:, None]).all()
    assert torch.equal(scale, (weight.abs().amax(1) / 127).float())
    weight[5, 7], weight[6, 1] = torch.nan, torch.inf
    assert not from_int8(*to_int8(weight))[[5, 6]].isfinite().all(1).any()
    with pytest.raises(ValueError, match="pack: weights is 'int4'; it must be 'model' or 'int8'"):
        pack(weight, "int4")


@pytest.mark.simulate
@pytest.mark.parametrize(("seed", "T", "weights"), [(1, 1, "model"), (2, 1, "int8"), (3, 3, "int8")])
def test_no_order_of_warps_changes_a_bit(seed, T, weights):
    model = build(F16, "cpu", n_layer=1)
    results, ids = [], torch.arange(2 * T).view(2, T)
    for options in ({}, {"seed": seed}):
        data = held_cache(model, [SPLIT + 1, 7])
        with simulate("sm_90", **options):
            results.append(verified(model, ids, data, [SPLIT + 1, 7], None, weights))
    assert torch.equal(*results)


@pytest.mark.simulate
def test_a_launch_ahead_of_the_end_of_the_one_before_changes_nothing(monkeypatch):
    model, results = build(F16, "cpu", n_layer=1), []
    for dependent in (False, True):
        monkeypatch.setattr(step_module, "DEPENDENT", dependent)
        forget()
        with simulate("sm_90"):
            results.append(by_kernels(model, [1], held_cache(model, [7]), [7]))
    forget()
    assert torch.equal(*results)


@pytest.mark.simulate
@pytest.mark.parametrize("T", [1, 2])
def test_each_missing_wait_of_a_launch_ahead_is_reported(monkeypatch, T):
    """5 of 5 kernels, with one token or two drafts: without its wait each touches what the one before writes."""
    monkeypatch.setattr(step_module, "DEPENDENT", True)
    forget()
    model, reported = build(F16, "cpu", n_layer=2), []
    for name in ("qkv", "attention", "out", "fc", "proj"):

        def plant(text, kernel=f"_decode_{name}_kernel"):
            return text.replace("griddepcontrol.wait;", "") if f".entry {kernel}" in text else text

        with simulate("sm_90", transform=plant):
            try:
                verified(model, torch.zeros(1, T, dtype=torch.long), held_cache(model, [7]), [7])
            except DependentLaunchRace as error:
                reported.append(error.kernel)
    forget()
    assert reported == [f"_decode_{name}_kernel" for name in ("qkv", "attention", "out", "fc", "proj")]


@pytest.mark.simulate
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, F16), (64, F32), (128, F16), (256, F32)], ids=str)
def test_a_tile_of_keys_fits_the_registers(head_dim, dtype):
    """A split of 256 keys would spill beyond a head dim of 64 in two bytes."""
    model = build(dtype, "cpu", n_layer=1, n_embd=head_dim, n_head=1)
    with simulate("sm_90") as gpu:
        by_kernels(model, [1], held_cache(model, [20]), [20])
    (attention,) = (launch for launch in gpu.launches if launch.kernel == "_decode_attention_kernel")
    assert inspect(attention.cubin, attention.kernel).spilled == 0
    assert step_module.split_keys(64, F16) == SPLIT


@pytest.mark.simulate
@pytest.mark.parametrize("weights", ["model", "int8"])
def test_five_launches_a_layer_read_each_weight_once(weights):
    """Simulated, at a width of GPT-2's kind: bytes over the least possible, weights and keys and values once."""
    C, layers, length = 256, 2, SPLIT - 1
    model = build(F16, "cpu", n_layer=layers, n_embd=C, n_head=4)
    data = held_cache(model, [length], SPLIT)
    with simulate("sm_90") as gpu:
        by_kernels(model, [3], data, [length], weights)
    steps = [launch for launch in gpu.launches if launch.kernel.startswith("_decode_")]  # not int8's fingerprints
    names = [launch.kernel.removeprefix("_decode_").removesuffix("_kernel") for launch in steps]
    assert names == ["qkv", "attention", "out", "fc", "proj"] * layers + ["fc"]
    numbers = layers * 12 * C * C + V * C
    least = numbers * (2 if weights == "model" else 1)
    keys = 2 * layers * 2 * C * (length + 1)
    counters = [launch.counters for launch in steps]
    moved = sum(counter.global_read + counter.global_written for counter in counters)
    beside = 1.2 * (2 * numbers + keys)  # each warp reads the row and the norm for itself, from L1 but for the first
    assert moved < least + keys + beside


def test_what_the_buffers_hold():
    buffers = DecodeBuffers.make(2, 96, 2, 384, 2 * SPLIT + 1, F16, "cpu")
    assert (buffers.h.shape, buffers.h.dtype) == ((2, 384), F16)
    assert buffers.part.shape == (2, 2, 3, 64)
    assert {x.dtype for x in (buffers.x, buffers.q, buffers.part, buffers.lse)} == {F32}
