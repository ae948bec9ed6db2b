"""layer_norm and add_layer_norm: right in every lane within the tolerance rule, whatever the width and the strides."""

import importlib

import compiling
import numerics
import pytest
import torch
from lanes import across_lanes
from rowwise import assert_bit_identical, check_against_oracle, poisoned, with_gradients
from torch.library import opcheck

from kernels import add_layer_norm, configs, layer_norm, reference
from kernels.checks import INTERPRETED
from kernels.layer_norm import _launch_layer_norm_backward as backward_of_rows

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = (F32, F16, BF16)
WIDTHS = [1, 65, 768, 1023, 1024, 1280, 1600]
WIDE = 8200  # rows beside which no sums fit

a_property = across_lanes(F16, lanes=("interpret", "sm_90", "gpu"))
_poisoned = pytest.fixture(autouse=True)(poisoned)


def inputs(M, N, dtype, device, seed=0):
    """x, residual [M, N], weight, bias [N], and gradients dy, dsum."""
    torch.manual_seed(seed)
    x, residual, dy, dsum = (torch.randn(M, N).to(device, dtype) for _ in range(4))
    weight, bias = (torch.randn(N).to(device, dtype) for _ in range(2))
    return x, residual, weight, bias, dy, dsum


def check(x, residual, weight, bias, dy, dsum):
    beside = ()
    if (
        x.shape[1] == 1 and not INTERPRETED
    ):  # dx is a difference of equal numbers, times rstd; fused multiply-adds leave its rounding
        beside = ((dy * weight).double() * 1e-5**-0.5,)
    check_against_oracle(layer_norm, reference.layer_norm, (x, weight, bias), (dy,), beside)
    check_against_oracle(add_layer_norm, reference.add_layer_norm, (x, residual, weight, bias), (dy, dsum), beside)


@across_lanes(*DTYPES, lanes=("interpret", "gpu"))
@pytest.mark.parametrize("N", WIDTHS)
def test_results_and_gradients_match_the_oracle(lane, dtype, N):
    check(*inputs(17, N, dtype, lane.device))


@across_lanes(F32, lanes=("sm_90",))
def test_rows_of_one_column_match_the_oracle(lane, dtype):
    """As on the first H100: the interpreter rounds each operation, and dx comes out as an exact zero there."""
    check(*inputs(17, 1, dtype, lane.device))


@across_lanes(F32, lanes=("interpret", "gpu"))
def test_rows_too_wide_for_their_sums_match_the_oracle(lane, dtype):
    x, _, weight, bias, dy, _ = inputs(2, WIDE, dtype, lane.device)
    check_against_oracle(layer_norm, reference.layer_norm, (x, weight, bias), (dy,))


@across_lanes(*DTYPES, lanes=("sm_80", "sm_90"))
def test_compiled_results_and_gradients_match_the_oracle(lane, dtype):
    N = {F32: 1600, F16: 768, BF16: 1600}[dtype]
    x, residual, weight, bias, dy, dsum = inputs(37, N, dtype, lane.device)
    check_against_oracle(add_layer_norm, reference.add_layer_norm, (x, residual, weight, bias), (dy, dsum))


@across_lanes(BF16, lanes=("sm_90",))
@pytest.mark.parametrize("N", [65, WIDE])
def test_compiled_odd_and_wide_rows_match_the_oracle(lane, dtype, N):
    x, _, weight, bias, dy, _ = inputs(5, N, dtype, lane.device)
    check_against_oracle(layer_norm, reference.layer_norm, (x, weight, bias), (dy,))


@across_lanes(F32, F16, lanes=("interpret", "gpu"))
def test_more_rows_than_programs_hold_at_once(lane, dtype, monkeypatch):
    monkeypatch.setattr(importlib.import_module("kernels.layer_norm"), "PARTIAL_ROWS", 2)
    check(*inputs(70, 33, dtype, lane.device))


# The column sums of dx, which a projection's bias wants


@across_lanes(F32, F16, lanes=("interpret", "sm_90", "gpu"))
@pytest.mark.parametrize(("M", "N"), [(9, 300), (3, WIDE)], ids=["beside the rows", "wide"])
@pytest.mark.parametrize("dropped", [False, True], ids=["no dropout", "dropout"])
def test_the_sums_of_dx_change_nothing_else_and_are_those_of_what_is_stored(lane, dtype, M, N, dropped):
    """Under mixed precision dx has two bytes where dresidual has four."""
    _, total, weight, _, _, dtotal = inputs(M, N, F32, lane.device)
    dy = torch.randn(M, N).to(lane.device, dtype)
    mean, rstd = total.mean(1), total.var(1).rsqrt()
    seed = torch.tensor([7], device=lane.device) if dropped else None
    arguments = dy, dtotal, total, weight, torch.stack((mean, 0 * mean)), rstd, seed, 0.25 * dropped, dtype
    dresidual, dx, vectors = backward_of_rows(*arguments)
    *rows, sums = backward_of_rows(*arguments, sum_d=True)
    assert torch.equal(rows[0], dresidual)
    assert (dx is None) == (rows[1] is None) == (dtype == F32 and not dropped)
    d = dresidual if dx is None else dx
    assert dx is None or torch.equal(rows[1], dx)
    assert torch.equal(sums[:2], vectors)
    numerics.assert_close(sums[2], d.sum(0).float(), d.double().sum(0), what="the sums of dx")


# Numerics


@across_lanes(F32, BF16, lanes=("interpret", "gpu"))
def test_a_large_mean_and_a_small_spread(lane, dtype):
    x, residual, weight, bias, dy, dsum = inputs(8, 768, dtype, lane.device)
    x = (1e4 + 1e-2 * torch.randn(8, 768)).to(lane.device, dtype)
    check(x, torch.zeros_like(residual), weight, bias, dy, dsum)


@across_lanes(F32, lanes=("interpret", "gpu"))
def test_nothing_is_lost_to_the_rounding_of_a_large_mean(lane, dtype):
    """A mean of 1e4 has an error of 5e-4 in fp32, 5% of this spread: in y and, through x_hat, in every gradient."""
    _, _, weight, bias, dy, _ = inputs(8, 1600, dtype, lane.device)
    x = (1e4 + 1e-2 * torch.randn(8, 1600)).to(lane.device)
    (y,), ours = with_gradients(layer_norm, (x, weight, bias), (dy,))
    wide = [t.double() for t in (x, weight, bias, dy)]
    (expected,), oracle = with_gradients(reference.layer_norm, wide[:3], wide[3:])
    for actual, exact in zip((y, *ours), (expected, *oracle)):
        assert numerics.max_error(actual, exact) < 2e-5 * exact.abs().max()


@a_property
@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 6e4])
def test_a_constant_row_gives_the_bias(lane, dtype, value):
    x, _, weight, bias, _, _ = inputs(4, 768, dtype, lane.device)
    y = layer_norm(torch.full_like(x, value), weight, bias)
    assert torch.equal(y, bias.expand_as(y))


@a_property
def test_values_near_the_end_of_fp16(lane, dtype):
    x, residual, weight, bias, dy, dsum = inputs(8, 768, dtype, lane.device)
    x = torch.where(x > 0, 6e4, -6e4).to(dtype)
    check(x, residual, weight, bias, dy, dsum)


# Dropout


def kept(seed, M, N):
    """dropout's choice as the kernel's own generator makes it, from add_layer_norm of ones to zeros."""
    ones, zeros = torch.ones(M, N), torch.zeros(M, N)
    _, sum = add_layer_norm(ones, zeros, torch.ones(N), torch.zeros(N), dropout_p=0.25, dropout_seed=seed)
    return sum != 0


@across_lanes(F32, lanes=("interpret", "sm_90"))
def test_dropout_drops_its_share_and_backward_replays_it(lane, dtype):
    x, residual, weight, bias, dy, dsum = inputs(40, 300, dtype, lane.device)
    seed = torch.tensor([7])
    keep = kept(seed, 40, 300)
    assert abs(keep.float().mean() - 0.75) < 0.02
    assert not torch.equal(keep, kept(torch.tensor([8]), 40, 300))
    check_against_oracle(
        lambda *tensors: add_layer_norm(*tensors, dropout_p=0.25, dropout_seed=seed),
        lambda *tensors: reference.add_layer_norm(*tensors, dropout_p=0.25, keep=keep),
        (x, residual, weight, bias),
        (dy, dsum),
    )


# Properties


@a_property
def test_rows_of_any_stride_are_read_in_place(lane, dtype):
    x, residual, weight, bias, dy, dsum = inputs(6, 3 * 96, dtype, lane.device)
    views = [tensor[:, 96:192] for tensor in (x, residual)]
    parameters = weight[:96], bias[:96]
    strided = with_gradients(add_layer_norm, (*views, *parameters), (dy[:, :96], dsum[:, 96:192]))
    dense = [tensor.contiguous() for tensor in (*views, dy[:, :96], dsum[:, 96:192])]
    assert_bit_identical(strided, with_gradients(add_layer_norm, (*dense[:2], *parameters), dense[2:]))
    batched = layer_norm(views[0].unflatten(0, (2, 3)), *parameters)
    assert torch.equal(batched.flatten(0, 1), layer_norm(dense[0], *parameters))


@a_property
def test_no_rows(lane, dtype):
    x, residual, weight, bias, dy, dsum = inputs(0, 96, dtype, lane.device)
    (y, sum), gradients = with_gradients(add_layer_norm, (x, residual, weight, bias), (dy, dsum))
    assert y.shape == sum.shape == (0, 96)
    for gradient in gradients[2:]:
        assert torch.equal(gradient, torch.zeros_like(weight))


@a_property
def test_a_row_does_not_depend_on_the_others(lane, dtype):
    x, residual, weight, bias, dy, dsum = inputs(21, 300, dtype, lane.device)
    together = with_gradients(add_layer_norm, (x, residual, weight, bias), (dy, dsum))
    one = slice(13, 14)
    alone = with_gradients(add_layer_norm, (x[one], residual[one], weight, bias), (dy[one], dsum[one]))
    for outputs in (0, 1):
        for whole, row in zip(together[outputs][:2], alone[outputs][:2]):
            assert torch.equal(whole[one], row)


@a_property
def test_two_runs_are_bit_identical(lane, dtype):
    x, residual, weight, bias, dy, dsum = inputs(65, 300, dtype, lane.device)
    runs = [with_gradients(add_layer_norm, (x, residual, weight, bias), (dy, dsum)) for _ in range(2)]
    assert_bit_identical(*runs)


@a_property
def test_adding_first_changes_nothing(lane, dtype):
    x, residual, weight, bias, _, _ = inputs(9, 300, dtype, lane.device)
    y, sum = add_layer_norm(x, residual, weight, bias)
    assert torch.equal(sum, x + residual)
    assert torch.equal(y, layer_norm(sum, weight, bias))


@a_property
@pytest.mark.parametrize("used", [0, 1], ids=["only y", "only sum"])
def test_one_result_may_go_unused(lane, dtype, used):
    x, residual, weight, bias, dy, dsum = inputs(5, 96, dtype, lane.device)

    def one(function):
        return lambda *tensors: function(*tensors)[used]

    gradient = (dy, dsum)[used]
    tensors = [t.requires_grad_() for t in (x, residual, weight, bias)]
    ours = torch.autograd.grad(one(add_layer_norm)(*tensors), tensors, gradient)
    expected = torch.autograd.grad(
        add_layer_norm(*tensors), tensors, [gradient if i == used else torch.zeros_like(x) for i in range(2)]
    )
    for first, second in zip(ours, expected):
        assert torch.equal(first, second)


# The ops


@a_property
def test_ops_pass_opcheck(lane, dtype):
    x, residual, weight, bias, dy, dsum = inputs(5, 96, dtype, lane.device)
    ops = torch.ops.gpt2
    _, mean, rstd = ops.layer_norm_forward(x, weight, bias, 1e-5, None)
    opcheck(ops.layer_norm_forward.default, (x, weight, bias, 1e-5, None))
    opcheck(ops.layer_norm_backward.default, (dy, x, weight, mean, rstd))
    opcheck(ops.add_layer_norm_forward.default, (x, residual, weight, bias, None, 1e-5, 0.0))
    opcheck(ops.add_layer_norm_backward.default, (dy, dsum, x, weight, mean, rstd, None, 0.0))


@a_property
def test_torch_compile_traces_it_without_a_graph_break(lane, dtype):
    torch._dynamo.reset()

    def block(x, residual, weight, bias):
        y, sum = add_layer_norm(x * 2, residual, weight, bias)
        return (layer_norm(y, weight, bias) + sum).square().sum()

    tensors = [x.requires_grad_() for x in inputs(5, 96, dtype, lane.device)[:4]]
    eager = torch.autograd.grad(block(*tensors), tensors)
    traced = torch.autograd.grad(torch.compile(block, fullgraph=True, backend="aot_eager")(*tensors), tensors)
    for one, other in zip(eager, traced):
        assert torch.equal(one, other)


@a_property
def test_a_second_derivative_is_refused(lane, dtype):
    x, _, weight, bias, _, _ = (t.requires_grad_() for t in inputs(3, 96, dtype, lane.device))
    with pytest.raises(RuntimeError, match="layer_norm: no second derivative"):
        torch.autograd.grad(layer_norm(x, weight, bias).sum(), x, create_graph=True)


# Errors


def arguments(**changes):
    shapes = {"x": (4, 96), "residual": (4, 96), "weight": (96,), "bias": (96,)} | changes
    return [torch.zeros(shape) for shape in shapes.values()]


@pytest.mark.parametrize(
    ("tensors", "options", "error", "message"),
    [
        (
            arguments(residual=(5, 96)),
            {},
            ValueError,
            r"residual has shape \(5, 96\), x has \(4, 96\); they must match",
        ),
        (arguments(weight=(95,)), {}, ValueError, r"weight has shape \(95,\) .* contiguous and \(96,\)"),
        (arguments(x=(4, 0)), {}, ValueError, "with N at least 1"),
        ([x.double() for x in arguments()], {}, TypeError, "x is float64; it must be float16, bfloat16, float32"),
        ([*arguments()[:2], torch.zeros(96).half(), torch.zeros(96)], {}, ValueError, "weight has dtype torch.float16"),
        ([torch.zeros(96, 4).T, *arguments()[1:]], {}, ValueError, "the last must be 1"),
        ([torch.zeros(2, 3, 96)[:, :2], *arguments()[1:]], {}, ValueError, "its rows must be evenly spaced"),
        ([torch.zeros(1, 16385)] * 2 + [torch.zeros(16385)] * 2, {}, ValueError, "16385; it must be at most 16384"),
        (arguments(), {"dropout_p": 1.0}, ValueError, r"dropout_p is 1.0; it must be in \[0, 1\)"),
        (arguments(), {"dropout_p": 0.1, "dropout_seed": torch.zeros(1)}, ValueError, r"must be torch.int64 \(1,\)"),
    ],
)
def test_a_wrong_argument_says_what_came_and_what_is_required(tensors, options, error, message):
    with pytest.raises(error, match=f"add_layer_norm: .*{message}"):
        add_layer_norm(*tensors, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so Triton has a driver")
def test_a_cpu_tensor_without_a_gpu_is_refused():
    x, _, weight, bias = arguments()
    with pytest.raises(ValueError, match="layer_norm: x is on cpu, and Triton finds no GPU here"):
        layer_norm(x, weight, bias)


# The compile lane


@pytest.mark.compile
@pytest.mark.parametrize("arch", compiling.ARCHITECTURES)
@pytest.mark.parametrize(("dtype", "N"), [(BF16, 1600), (F32, 16384)], ids=["bfloat16-1600", "float32-16384"])
def test_every_kernel_compiles_fits_and_does_not_spill(arch, dtype, N):
    """The widths that take the most registers, with and without sums beside the rows; dropout adds a few, and so do the
    sums of dx."""
    tensors = [x.requires_grad_() for x in inputs(1, N, dtype, "cpu")[:4]]
    x, weight, seed = tensors[0].detach(), tensors[2].detach(), torch.zeros(1, dtype=torch.int64)
    with compiling.compile_only(arch) as kernels:
        y, sum = add_layer_norm(*tensors, dropout_p=0.1)
        torch.autograd.backward((y, sum), (y.detach(), sum.detach()))
        backward_of_rows(x, x, x, weight, torch.zeros(2, 1), torch.zeros(1), seed, 0.1, dtype, sum_d=True)
    assert {"_layer_norm_forward_kernel", "_layer_norm_backward_kernel"} <= {kernel.name for kernel in kernels}
    for kernel in kernels:
        assert kernel.spilled == 0, kernel
        assert kernel.shared <= compiling.SHARED_MEMORY[arch], kernel


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("N", [768, 1024, 1280, 1600, 1023, 3072, 5000, 6400, 16384])
def test_no_width_leaves_half_of_the_lanes_idle(direction, N):
    """Backward holds rows of 1025 to 8192 columns in one tile, which a GPU was faster with."""
    config = configs.row_config(direction, N)
    assert N <= config.BLOCK_N * config.COLUMN_TILES < (1.35 if direction == "forward" else 2.0) * N


@across_lanes(torch.bfloat16, lanes=("sm_90", "gpu"))
def test_fp32_parameters_beside_rows_of_two_bytes(lane, dtype):
    """Mixed precision, as torch computes it on a CPU; on CUDA its layer_norm refuses such rows."""

    def plain(x, weight, bias):
        return reference.layer_norm(x.to(weight.dtype), weight, bias).to(x.dtype)

    x, weight, bias = torch.randn(5, 40).to(lane.device, dtype), torch.randn(40), torch.randn(40)
    inputs = (x, weight.to(lane.device), bias.to(lane.device))
    check_against_oracle(layer_norm, plain, inputs, (torch.randn_like(x),))


@across_lanes(F16, lanes=("interpret", "sm_90", "gpu"))
@pytest.mark.parametrize("dropped", [False, True], ids=["no dropout", "dropout"])
def test_mixed_precision_keeps_the_residual_in_fp32(lane, dtype, dropped):
    """The sublayer's output and y in two bytes, the residual, the sum and the parameters in fp32."""
    _, residual, weight, bias, _, dsum = inputs(9, 300, F32, lane.device)
    x, _, _, _, dy, _ = inputs(9, 300, dtype, lane.device, seed=1)
    options, keep = {}, None
    if dropped:
        options = {"dropout_p": 0.25, "dropout_seed": torch.tensor([7], device=lane.device)}
        ones, zeros = torch.ones_like(residual), torch.zeros_like(residual)
        keep = add_layer_norm(ones, zeros, weight, bias, **options)[1] != 0

    def plain(x, residual, weight, bias):
        options = {"dropout_p": 0.25, "keep": keep} if dropped else {}
        y, total = reference.add_layer_norm(x.to(residual.dtype), residual, weight, bias, **options)
        return y.to(x.dtype), total

    ours = with_gradients(lambda *tensors: add_layer_norm(*tensors, **options), (x, residual, weight, bias), (dy, dsum))
    assert [t.dtype for t in (*ours[0], *ours[1])] == [dtype, F32, dtype, F32, F32, F32]
    check_against_oracle(
        lambda *tensors: add_layer_norm(*tensors, **options), plain, (x, residual, weight, bias), (dy, dsum)
    )


@across_lanes(F16, lanes=("interpret", "sm_90", "gpu"))
def test_a_norm_of_fp32_rows_may_be_written_in_two_bytes(lane, dtype):
    x, _, weight, bias, dy, _ = inputs(9, 300, F32, lane.device)

    def ours(x, weight, bias):
        return layer_norm(x, weight, bias, dtype=dtype)

    def plain(x, weight, bias):
        y = reference.layer_norm(x, weight, bias)
        return y if y.dtype == torch.float64 else y.to(dtype)

    (y,), (dx, dweight, dbias) = with_gradients(ours, (x, weight, bias), (dy.to(dtype),))
    assert [t.dtype for t in (y, dx, dweight, dbias)] == [dtype, F32, F32, F32]
    assert torch.equal(y, layer_norm(x, weight, bias).to(dtype))
    check_against_oracle(ours, plain, (x, weight, bias), (dy.to(dtype),))


def test_a_dtype_that_the_rows_cannot_have_is_refused():
    x, vector = torch.zeros(2, 4, dtype=F16), torch.ones(4)
    for rows, dtype in ((x, F32), (x, BF16), (x.float(), torch.float64), (x.float(), torch.int32)):
        with pytest.raises(ValueError, match=r"^layer_norm: dtype is torch\.\w+ and x has torch\.\w+; it must be x's"):
            layer_norm(rows, vector, vector, dtype=dtype)
    with pytest.raises(ValueError, match=r"residual has dtype torch\.float16, x has torch\.float32; they must match"):
        add_layer_norm(x.float(), x, vector, vector)


def test_a_norm_without_a_bias_is_refused():
    with pytest.raises(TypeError, match=r"^layer_norm: bias is None, of NoneType; it must be a tensor"):
        layer_norm(torch.zeros(2, 4), torch.ones(4), None)
