"""flash_attention: right in every lane within the tolerance rule, copies nothing, depends on nothing it should not."""

from unittest import mock

import compiling
import lanes
import numerics
import pytest
import torch
import triton
from attention_cases import bounds, check_against_oracle, check_partial_sums, inputs, with_gradients
from lanes import across_lanes
from torch.library import opcheck

from kernels import flash_attention, flash_attention_packed, reference
from kernels.attention import backward, forward, ops
from kernels.configs import ATTENTION, SHORT_T, family
from kernels.launch import forget
from kernels.simulator import simulate

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = (F32, F16, BF16)

# (B, H, T_q, T_k, D): odd lengths and head dims, one query, more queries than keys, three heads.
SHAPES = [
    (1, 2, 1, 1, 64),
    (2, 1, 15, 15, 16),
    (1, 3, 16, 16, 40),
    (1, 1, 17, 17, 80),
    (2, 2, 65, 65, 64),
    (1, 1, 129, 129, 128),
    (1, 2, 300, 300, 64),
    (2, 1, 1, 129, 64),
    (1, 2, 5, 129, 40),
    (1, 1, 70, 17, 64),
    (1, 1, 33, 33, 96),
    (1, 1, 33, 33, 160),
    (1, 1, 17, 17, 256),
]

# Each shape compiles three kernels, so that the simulated chips run the few that differ most.
SIMULATED_SHAPES = [(2, 2, 65, 65, 64), (1, 2, 70, 131, 40)]

# Properties of the kernels run in one dtype, and of the simulated chips on the one with WGMMA; those of the host code
# need no chip at all.
a_property = across_lanes(F16, lanes=("interpret", "sm_90", "gpu"))
a_host_property = across_lanes(F16, lanes=("interpret", "gpu"))


def shape_id(shape):
    B, H, T_q, T_k, D = shape
    return f"B{B}-H{H}-Tq{T_q}-Tk{T_k}-D{D}"


every_shape = pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
causal_or_full = pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    """Tensors that PyTorch leaves uninitialised hold NaN, so that an element no kernel wrote cannot pass."""
    torch.use_deterministic_algorithms(True)  # which makes torch.empty fill with NaN
    yield
    torch.use_deterministic_algorithms(False)


@across_lanes(*DTYPES, lanes=("interpret", "gpu"))
@every_shape
@causal_or_full
def test_output_and_gradients_match_the_oracle(lane, dtype, shape, causal):
    check_against_oracle(*inputs(shape, dtype, lane.device), causal=causal)


@across_lanes(*DTYPES, lanes=("sm_80", "sm_90"))
@pytest.mark.parametrize("shape", SIMULATED_SHAPES, ids=shape_id)
def test_compiled_output_and_gradients_match_the_oracle(lane, dtype, shape):
    check_against_oracle(*inputs(shape, dtype, lane.device))


@across_lanes(F32, lanes=("sm_90",))
@pytest.mark.parametrize(
    ("shape", "causal"), [((1, 1, 17, 17, 256), True), ((1, 1, 33, 33, 96), False)], ids=["causal-D256", "full-D96"]
)
def test_long_chains_of_fp32_sums_match_the_oracle(lane, dtype, shape, causal):
    """As the first H100 had them: the interpreter's sums are numpy's, in parts, and shorter by their error."""
    check_against_oracle(*inputs(shape, dtype, lane.device), causal=causal)


@pytest.mark.simulate
@pytest.mark.parametrize("dtype", [F16, BF16], ids=lanes.short)
@pytest.mark.parametrize(("shape", "causal"), [((1, 2, 200, 200, 64), True), ((2, 1, 150, 333, 40), False)], ids=str)
def test_the_tiles_of_short_and_long_sequences_give_the_same_bits(dtype, shape, causal):
    """So that the length of a batch does not show in its rows."""
    q, k, v, _ = inputs(shape, dtype, "cpu")
    short, long = ("short forward", 2), ("forward", 2)
    found = []
    with simulate("sm_90"):
        for row in (short, long):
            with mock.patch.dict(ATTENTION["sm_90"], {short: ATTENTION["sm_90"][row]}):
                forget()
                found.append(flash_attention(q, k, v, causal=causal, return_lse=True, kernel="portable"))
    forget()
    assert all(map(torch.equal, *found))


@across_lanes(BF16, lanes=("sm_80", "sm_90"))
def test_compiled_full_attention_matches_the_oracle(lane, dtype):
    check_against_oracle(*inputs(SIMULATED_SHAPES[0], dtype, lane.device), causal=False)


@a_host_property
def test_scale_multiplies_the_scores(lane, dtype):
    check_against_oracle(*inputs((1, 2, 33, 33, 64), dtype, lane.device), scale=0.5)


@a_property
def test_log_sum_exp_is_that_of_the_scaled_scores(lane, dtype):
    q, k, v, _ = inputs((2, 2, 70, 70, 16), dtype, lane.device)
    _, lse = flash_attention(q, k, v, causal=False, return_lse=True)
    expected = torch.logsumexp(q.double() @ k.double().transpose(-2, -1) * 16**-0.5, -1)
    torch.testing.assert_close(lse.double(), expected, atol=2e-5, rtol=1e-6)


@a_property
@pytest.mark.parametrize(
    "rows",
    [
        {"kv_end": [70, 66, 1, 0]},
        {"kv_start": [0, 3, 69, 70]},
        {"kv_start": [0, 5, 40, 60], "kv_end": [70, 66, 41, 60]},
    ],
    ids=["right", "left", "both"],
)
@causal_or_full
def test_padding_matches_the_oracle(lane, dtype, rows, causal):
    q, k, v, do = inputs((4, 2, 70, 70, 16), dtype, lane.device)
    check_against_oracle(q, k, v, do, causal=causal, **bounds(lane.device, **rows))


@a_property
def test_rows_of_a_cache_may_stand_at_different_positions(lane, dtype):
    q, k, v, do = inputs((3, 2, 4, 100, 16), dtype, lane.device)
    rows = bounds(lane.device, kv_start=[3, 0, 0], kv_end=[50, 97, 4], q_start=[46, 93, 0])
    check_against_oracle(q, k, v, do, **rows)


# Properties


@a_property
def test_a_row_with_no_key_gives_zero_and_no_gradient(lane, dtype):
    q, k, v, do = inputs((2, 2, 70, 70, 16), dtype, lane.device)
    rows = bounds(lane.device, kv_start=[0, 8], kv_end=[70, 8])
    o, dq, dk, dv = with_gradients(lambda q, k, v: flash_attention(q, k, v, **rows), q, k, v, do)
    for result in (o, dq, dk, dv):
        assert torch.equal(result[1], torch.zeros_like(result[1]))
    _, lse = flash_attention(q, k, v, return_lse=True, **rows)
    assert torch.equal(lse[1], torch.full_like(lse[1], float("-inf")))


@a_property
def test_padded_keys_and_values_may_be_nan(lane, dtype):
    q, k, v, do = inputs((2, 2, 70, 70, 16), dtype, lane.device)
    rows = bounds(lane.device, kv_start=[3, 0], kv_end=[70, 40])
    clean = with_gradients(lambda q, k, v: flash_attention(q, k, v, causal=False, **rows), q, k, v, do)
    for x in (k, v):
        x[0, :, :3] = float("nan")
        x[1, :, 40:] = float("nan")
    dirty = with_gradients(lambda q, k, v: flash_attention(q, k, v, causal=False, **rows), q, k, v, do)
    for before, after in zip(clean, dirty):
        assert torch.equal(before, after)


@a_property
def test_left_padding_leaves_every_bit_of_a_row_as_it_is(lane, dtype):
    q, k, v, _ = inputs((1, 2, 70, 70, 16), dtype, lane.device)
    alone = flash_attention(q, k, v)
    q, k, v = (torch.nn.functional.pad(x, (0, 0, 11, 0), value=float("nan")) for x in (q, k, v))
    padded = flash_attention(q, k, v, **bounds(lane.device, kv_start=[11]))
    assert torch.equal(padded[:, :, 11:], alone)


@a_property
def test_a_later_token_leaves_earlier_outputs_bit_identical(lane, dtype):
    q, k, v, _ = inputs((1, 2, 70, 70, 16), dtype, lane.device)
    before = flash_attention(q, k, v)
    for x in (q, k, v):
        x[:, :, 41] += 1.0
    after = flash_attention(q, k, v)
    assert torch.equal(before[:, :, :41], after[:, :, :41])
    assert not torch.equal(before[:, :, 41], after[:, :, 41])


@a_property
def test_a_row_does_not_depend_on_the_other_rows_of_the_batch(lane, dtype):
    q, k, v, do = inputs((3, 2, 70, 70, 16), dtype, lane.device)
    together = with_gradients(flash_attention, q, k, v, do)
    alone = with_gradients(flash_attention, *(x[1:2] for x in (q, k, v, do)))
    for row, single in zip(together, alone):
        assert torch.equal(row[1:2], single)


@a_property
def test_two_runs_are_bit_identical(lane, dtype):
    arguments = inputs((1, 2, 70, 70, 16), dtype, lane.device)
    first, second = (with_gradients(flash_attention, *arguments) for _ in range(2))
    for one, other in zip(first, second):
        assert torch.equal(one, other)


@a_property
def test_the_weights_of_a_query_sum_to_one(lane, dtype):
    q, k, v, _ = inputs((1, 2, 70, 70, 16), dtype, lane.device)
    o = flash_attention(q, k, torch.ones_like(v))
    torch.testing.assert_close(o, torch.ones_like(o), atol=torch.finfo(dtype).eps, rtol=0)


@a_property
def test_scores_beyond_the_range_of_fp16_are_no_trouble(lane, dtype):
    q, k, v, _ = inputs((1, 2, 70, 70, 16), dtype, lane.device)
    q, k = q * 200, k * 200  # scores of a few hundred thousand
    o = flash_attention(q, k, v)
    oracle, _ = reference.attention(q.double(), k.double(), v.double())
    assert numerics.max_error(o, oracle) <= numerics.floor(dtype, oracle)


# The fused projection, read and written in place


@a_host_property
def test_packed_equals_separate(lane, dtype):
    qkv = torch.randn(2, 37, 3 * 2 * 40).to(lane.device, dtype).requires_grad_()
    do = torch.randn(2, 37, 2 * 40).to(lane.device, dtype)
    packed = flash_attention_packed(qkv, 2)
    (dqkv,) = torch.autograd.grad(packed, qkv, do)

    q, k, v = qkv.detach().view(2, 37, 3, 2, 40).permute(2, 0, 3, 1, 4)
    o, *gradients = with_gradients(flash_attention, q, k, v, do.view(2, 37, 2, 40).transpose(1, 2))
    assert torch.equal(packed, o.transpose(1, 2).reshape(2, 37, 80))
    assert torch.equal(dqkv, torch.stack(gradients).permute(1, 3, 0, 2, 4).reshape(2, 37, 240))


@a_host_property
def test_the_gradients_sums_over_rows_are_left_to_be_added_up(lane, dtype):
    check_partial_sums(dtype, lane.device, 40)


@a_host_property
def test_nothing_is_copied(lane, dtype, monkeypatch):
    """The kernels get pointers into the projection, and into its one gradient, with the projection's strides."""
    launched = {}

    class Recorder:
        pre_run_hooks = ("watching",)  # so that no launch goes past Triton

        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*arguments, **options):
                launched[self.kernel.__name__] = arguments
                return self.kernel[grid](*arguments, **options)

            return launch

    for launcher in (forward._launch_packed, backward._launch_packed_dq, backward._launch_packed_dkdv):
        monkeypatch.setattr(launcher, "kernel", Recorder(launcher.kernel))

    B, T, H, D = 2, 20, 3, 16
    C = H * D
    qkv = torch.randn(B, T, 3 * C, dtype=dtype, device=lane.device, requires_grad=True)
    do = torch.randn(B, T, C, dtype=dtype, device=lane.device)
    o = flash_attention_packed(qkv, H)
    (dqkv,) = torch.autograd.grad(o, qkv, do)
    assert o.shape == (B, T, C)
    assert o.is_contiguous()

    def part(whole, index):
        return whole.data_ptr() + index * C * whole.element_size()

    def read(kernel, tensors):
        """Where the kernel's first tensors stand, and their strides of [B, H, T]."""
        arguments = launched[kernel]
        numbers = [x for x in arguments if type(x) is int]
        strides = [tuple(numbers[3 * i : 3 * i + 3]) for i in range(tensors)]
        return list(zip((x.data_ptr() for x in arguments), strides))

    projected, merged = (3 * T * C, D, 3 * C), (T * C, D, C)
    q, k, v = ((part(qkv, i), projected) for i in range(3))
    dq, dk, dv = ((part(dqkv, i), projected) for i in range(3))
    output, gradient = (o.data_ptr(), merged), (do.data_ptr(), merged)
    assert read("_attention_forward_kernel", 4) == [q, k, v, output]
    assert read("_attention_dq_kernel", 6) == [q, k, v, output, gradient, dq]
    assert read("_attention_dkdv_kernel", 6) == [q, k, v, gradient, dk, dv]


@a_host_property
def test_output_is_in_the_order_that_merges_heads_without_a_copy(lane, dtype):
    q, k, v, _ = inputs((2, 3, 20, 20, 16), dtype, lane.device)
    o = flash_attention(q, k, v)
    assert o.transpose(1, 2).is_contiguous()


@a_host_property
@pytest.mark.parametrize("expand", [False, True], ids=["strided", "expanded"])
def test_an_output_gradient_of_any_strides_is_read_rightly(lane, dtype, expand):
    q, k, v, do = inputs((1, 2, 20, 20, 16), dtype, lane.device)
    awkward = do[:, :, :1, :1].expand_as(do) if expand else do.transpose(2, 3).contiguous().transpose(2, 3)
    plain = with_gradients(flash_attention, q, k, v, awkward.contiguous())
    strided = with_gradients(flash_attention, q, k, v, awkward)
    for one, other in zip(plain, strided):
        assert torch.equal(one, other)


# The ops


OPTIONS = (None, None, None, None, 0.25, True, 0.0, "auto", True)


@a_host_property
def test_ops_pass_opcheck(lane, dtype):
    q, k, v, do = inputs((1, 2, 20, 20, 16), dtype, lane.device)
    o, lse = ops.attention_forward(q, k, v, *OPTIONS)
    opcheck(ops.attention_forward.overload, (q, k, v, *OPTIONS))
    opcheck(ops.attention_backward.overload, (do, q, k, v, o, lse, *OPTIONS))
    qkv = torch.randn(1, 20, 96, device=lane.device, dtype=dtype)
    o, lse = ops.packed_attention_forward(qkv, 2, *OPTIONS)
    opcheck(ops.packed_attention_forward.overload, (qkv, 2, *OPTIONS))
    opcheck(ops.packed_attention_backward.overload, (torch.randn_like(o), qkv, o, lse, 2, *OPTIONS))


@a_host_property
def test_torch_compile_traces_it_without_a_graph_break(lane, dtype):
    torch._dynamo.reset()

    def block(qkv):
        return flash_attention_packed(qkv * 2, 2).square().sum()

    qkv = torch.randn(2, 20, 96, device=lane.device, dtype=dtype, requires_grad=True)
    (eager,) = torch.autograd.grad(block(qkv), qkv)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    (traced,) = torch.autograd.grad(compiled(qkv), qkv)
    assert torch.equal(eager, traced)


@a_host_property
def test_a_second_derivative_is_refused(lane, dtype):
    q, k, v, _ = (x.requires_grad_() for x in inputs((1, 1, 8, 8, 16), dtype, lane.device))
    with pytest.raises(RuntimeError, match="flash_attention: no second derivative"):
        torch.autograd.grad(flash_attention(q, k, v).sum(), q, create_graph=True)


@a_host_property
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_replays_dropout(lane, dtype, use_reentrant):
    qkv = torch.randn(2, 20, 96, device=lane.device, dtype=dtype, requires_grad=True)

    def layer(qkv):
        return flash_attention_packed(qkv * 2, 2, dropout_p=0.3)

    torch.manual_seed(1)
    layer(qkv).float().square().sum().backward()
    plain, qkv.grad = qkv.grad, None
    torch.manual_seed(1)
    torch.utils.checkpoint.checkpoint(layer, qkv, use_reentrant=use_reentrant).float().square().sum().backward()
    assert torch.equal(plain, qkv.grad)


@a_host_property
def test_autocast_changes_nothing(lane, dtype):
    """The kernel computes in the dtype that it is given: under autocast, that of the projection before it."""
    qkv = torch.randn(2, 20, 96, device=lane.device, dtype=dtype)
    with torch.autocast(lane.device, dtype=torch.bfloat16):
        inside = flash_attention_packed(qkv, 2)
    assert torch.equal(inside, flash_attention_packed(qkv, 2))


def test_transforms_of_torch_func_are_refused():
    q = torch.zeros(3, 1, 2, 8, 16)
    with pytest.raises(
        RuntimeError, match=r"flash_attention: torch.func transforms are not supported; make the vmapped"
    ):
        torch.func.vmap(flash_attention)(q, q, q)
    with pytest.raises(RuntimeError, match="take gradients with autograd"):
        torch.func.grad(lambda x: flash_attention_packed(x, 2).sum())(torch.zeros(1, 8, 96))


@pytest.mark.interpret
@pytest.mark.parametrize("part", ["row", "head", "token"])
def test_strides_beyond_two_to_the_31_elements(part):
    """A view of 4 GiB and more of address space, of which only the rows that are read ever exist."""
    torch.use_deterministic_algorithms(False)
    far = 2**31 // 2 + 64
    storage = torch.empty(2 * far + 4096, dtype=F16)
    shape, strides = {
        "row": ((3, 1, 4, 16), (far, 64, 64, 1)),
        "head": ((1, 3, 4, 16), (64, far, 64, 1)),
        "token": ((1, 1, 3, 16), (64, 64, far, 1)),
    }[part]
    q, k, v = (torch.as_strided(storage, shape, strides, offset) for offset in (0, 16, 32))
    for x in (q, k, v):
        x.copy_(torch.randn(shape))
    near = with_gradients(flash_attention, *(x.clone() for x in (q, k, v)), torch.ones(shape, dtype=F16))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = flash_attention(*leaves)
    for one, other in zip(near, (o, *torch.autograd.grad(o, leaves, torch.ones(shape, dtype=F16)))):
        assert torch.equal(one, other)
    decoded = flash_attention(q[:, :, -1:], k, v)
    torch.testing.assert_close(decoded, o[:, :, -1:], atol=2e-3, rtol=0)


# Errors: before anything is launched, with what came and what is required


def q_k_v(**changes):
    shapes = {"q": (2, 3, 8, 16), "k": (2, 3, 8, 16), "v": (2, 3, 8, 16)} | changes
    return [torch.zeros(shape) for shape in shapes.values()]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (q_k_v(k=(2, 3, 8, 32)), {}, ValueError, "flash_attention: k has head_dim 32, q has 16; they must match"),
        (q_k_v(v=(2, 4, 8, 16)), {}, ValueError, "v has heads 4, q has 3"),
        (q_k_v(k=(1, 3, 8, 16)), {}, ValueError, "k has batch size 1, q has 2"),
        (q_k_v(v=(2, 3, 9, 16)), {}, ValueError, "k has 8 keys, v has 9"),
        (q_k_v(q=(3, 8, 16)), {}, ValueError, r"it must be \[B, H, T, D\]"),
        (q_k_v(k=(2, 3, 0, 16), v=(2, 3, 0, 16)), {}, ValueError, "there must be at least one"),
        ([x.double() for x in q_k_v()], {}, TypeError, "float64; it must be float16, bfloat16, float32"),
        ([q_k_v()[0].half(), *q_k_v()[1:]], {}, ValueError, "k has dtype torch.float32, q has torch.float16"),
        ([torch.zeros(1, 1, 4, 257)] * 3, {}, ValueError, "head_dim is 257; it must be from 1 to 256"),
        ([torch.zeros(2, 3, 16, 8).mT, *q_k_v()[1:]], {}, ValueError, r"q has strides .*; the last must be 1"),
        (q_k_v(), {"scale": -1.0}, ValueError, "scale is -1.0; it must be positive"),
        (q_k_v(), {"dropout_p": 1.0}, ValueError, r"dropout_p is 1.0; it must be in \[0, 1\)"),
        (q_k_v(), {"kv_end": torch.zeros(2)}, ValueError, r"kv_end is torch.float32 .* must be torch.int32 \(2,\)"),
    ],
)
def test_a_wrong_argument_says_what_came_and_what_is_required(arguments, options, error, message):
    with pytest.raises(error, match=message):
        flash_attention(*arguments, **options)


def test_a_projection_that_does_not_divide_into_heads_is_refused():
    with pytest.raises(ValueError, match=r"shape \(1, 4, 96\) for 5 heads; it must be \[B, T, 3 \* heads"):
        flash_attention_packed(torch.zeros(1, 4, 96), 5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so Triton has a driver")
def test_a_cpu_tensor_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match="q is on cpu, and Triton finds no GPU here; the kernel needs one"):
        flash_attention(*q_k_v())


@pytest.mark.gpu
def test_a_cpu_tensor_beside_a_gpu_is_refused():
    with pytest.raises(ValueError, match="q is on cpu, and Triton's active driver runs on cuda"):
        flash_attention(*q_k_v())


@pytest.mark.interpret
def test_the_interpreter_refuses_bf16():
    with pytest.raises(ValueError, match="bfloat16, which Triton's interpreter multiplies wrongly"):
        flash_attention(*(x.bfloat16() for x in q_k_v()))


# The compile lane


def lengths(arch):
    """Numbers of queries that take all rows of the chip's table: one, or one on either side of SHORT_T."""
    has_short_rows = any(direction.startswith("short") for direction, _ in ATTENTION[family_of(arch)])
    return (64, SHORT_T + 64) if has_short_rows else (64,)


def family_of(arch):
    return family(arch if arch.startswith("gfx") else int(arch.removeprefix("sm_")))


# Bytes that these rows spill on sm_90, where they take less time on an H100 than every row tried that spills none.
FASTER_THOUGH_SPILLED = {("dkdv", 128): 112, ("dq", 256): 48, ("dkdv", 256): 48}


# What compiles alike is shown once: fp16 takes the registers of bf16, sm_89 has the rows and the code of sm_86.
@pytest.mark.compile
@pytest.mark.parametrize(
    ("arch", "dtype", "head_dim"),
    [
        (arch, dtype, head_dim)
        for arch in compiling.ARCHITECTURES
        for dtype in DTYPES
        for head_dim in (64, 128, 256)
        if (dtype != F16 or arch in ("sm_80", "sm_90")) and (arch != "sm_89" or head_dim == 64)
    ],
    ids=lambda value: lanes.short(value) if isinstance(value, torch.dtype) else str(value),
)
def test_every_config_compiles_fits_and_does_not_spill(arch, dtype, head_dim):
    with compiling.compile_only(arch) as kernels:
        for T in lengths(arch):
            qkv = torch.empty(1, T, 3 * 2 * head_dim, dtype=dtype, requires_grad=True)
            o = flash_attention_packed(qkv, 2, kernel="portable")
            o.backward(torch.empty_like(o))
    assert {kernel.name for kernel in kernels} == {
        "_attention_forward_kernel",
        "_attention_dq_kernel",
        "_attention_dkdv_kernel",
    }
    for kernel in kernels:
        direction = kernel.name.removeprefix("_attention_").removesuffix("_kernel")
        known = 0
        if dtype == F32 and (direction, head_dim) == ("dq", 256) and arch != "gfx942":
            known = 224 if triton.__version__.startswith("3.6.") else 208
        elif dtype != F32 and arch == "sm_90":
            known = FASTER_THOUGH_SPILLED.get((direction, head_dim), 0)
        assert kernel.spilled <= known, kernel
        assert kernel.shared <= compiling.SHARED_MEMORY[arch], kernel


@pytest.mark.compile
@pytest.mark.parametrize("arch", [arch for arch in compiling.ARCHITECTURES if arch != "sm_89"])  # sm_86's rows and code
@pytest.mark.parametrize(("causal", "dropout_p"), [(True, 0.0), (True, 0.1), (False, 0.1)])
def test_padding_and_dropout_do_not_spill_at_gpt2s_head_dim(arch, causal, dropout_p):
    rows = bounds("cpu", kv_start=[0, 0], kv_end=[64, 64])
    with compiling.compile_only(arch) as kernels:
        for T in lengths(arch):
            qkv = torch.empty(2, T, 3 * 2 * 64, dtype=BF16, requires_grad=True)
            o = flash_attention_packed(qkv, 2, causal=causal, dropout_p=dropout_p, **rows)
            o.backward(torch.empty_like(o))
    assert len({kernel.name for kernel in kernels}) == 3
    assert not any(kernel.spilled for kernel in kernels), kernels
