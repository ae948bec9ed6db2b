"""gelu and bias_gelu: right in every lane within the tolerance rule, also where x is large."""

import compiling
import pytest
import torch
from lanes import across_lanes
from rowwise import assert_bit_identical, check_against_oracle, poisoned, with_gradients
from torch.library import opcheck

from kernels import bias_gelu, gelu, reference

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = (F32, F16, BF16)

a_property = across_lanes(F16, lanes=("interpret", "sm_90", "gpu"))
_poisoned = pytest.fixture(autouse=True)(poisoned)


def inputs(M, N, dtype, device):
    """x [M, N], bias [N], dy [M, N]."""
    return (
        (torch.randn(M, N) * 3).to(device, dtype),
        torch.randn(N).to(device, dtype),
        torch.randn(M, N).to(device, dtype),
    )


@across_lanes(*DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (17, 65), (33, 768)], ids=str)
def test_results_and_gradients_match_the_oracle(lane, dtype, shape):
    x, bias, dy = inputs(*shape, dtype, lane.device)
    check_against_oracle(bias_gelu, reference.bias_gelu, (x, bias), (dy,))
    if shape == (17, 65):
        check_against_oracle(gelu, reference.gelu, (x,), (dy,))


@across_lanes(*DTYPES, lanes=("interpret", "sm_90", "gpu"))
def test_large_values_are_passed_or_blocked(lane, dtype):
    """GELU is x or 0 and its slope 1 or 0 far from 0, also where x^2 overflows."""
    largest = torch.finfo(dtype).max / 2
    x = torch.tensor([-largest, -6e4, -1e3, -20.0, 20.0, 1e3, 6e4, largest]).to(lane.device, dtype)[None]
    (y,), (dx,) = with_gradients(gelu, (x,), (torch.ones_like(x),))
    assert torch.equal(y, x.clamp(min=0.0))
    torch.testing.assert_close(dx, (x > 0).to(dtype), atol=1e-30, rtol=0)


@across_lanes(F32, lanes=("interpret", "sm_90", "gpu"))
def test_small_results_of_negative_values_keep_their_digits(lane, dtype):
    """1 + tanh(w) cancels there; the sigmoid does not: a relative bound, against float64."""
    x = torch.linspace(-4.5, -2.0, 64).to(lane.device)[None]
    w = reference.SQRT_2_OVER_PI * (x.double() + 0.044715 * x.double() ** 3)
    expected = x.double() * torch.sigmoid(2 * w)
    torch.testing.assert_close(gelu(x).double(), expected, rtol=2e-5, atol=0)


@across_lanes(F16, lanes=("interpret", "sm_90", "gpu"))
def test_an_fp32_bias_beside_rows_of_two_bytes(lane, dtype):
    """Mixed precision: the bias is added, and its gradient given, in fp32."""
    x, _, dy = inputs(17, 65, dtype, lane.device)
    _, bias, _ = inputs(17, 65, F32, lane.device)

    def plain(x, bias):
        return reference.bias_gelu(x.to(bias.dtype), bias).to(x.dtype)

    (y,), (dx, dbias) = with_gradients(bias_gelu, (x, bias), (dy,))
    assert [t.dtype for t in (y, dx, dbias)] == [dtype, dtype, F32]
    check_against_oracle(bias_gelu, plain, (x, bias), (dy,))


@a_property
def test_rows_of_any_stride_are_read_in_place(lane, dtype):
    x, bias, dy = inputs(6, 3 * 40, dtype, lane.device)
    strided = with_gradients(bias_gelu, (x[:, 40:80], bias[:40]), (dy[:, :40],))
    dense = with_gradients(bias_gelu, (x[:, 40:80].contiguous(), bias[:40]), (dy[:, :40].contiguous(),))
    assert_bit_identical(strided, dense)


@a_property
def test_no_rows(lane, dtype):
    x, bias, dy = inputs(0, 96, dtype, lane.device)
    (y,), (dx, dbias) = with_gradients(bias_gelu, (x, bias), (dy,))
    assert y.shape == dx.shape == (0, 96)
    assert torch.equal(dbias, torch.zeros_like(bias))


@a_property
def test_a_row_does_not_depend_on_the_others_and_runs_are_bit_identical(lane, dtype):
    x, bias, dy = inputs(40, 65, dtype, lane.device)
    together, again = (with_gradients(bias_gelu, (x, bias), (dy,)) for _ in range(2))
    assert_bit_identical(together, again)
    alone = with_gradients(bias_gelu, (x[21:22], bias), (dy[21:22],))
    assert torch.equal(together[0][0][21:22], alone[0][0])
    assert torch.equal(together[1][0][21:22], alone[1][0])


@a_property
def test_ops_pass_opcheck(lane, dtype):
    x, bias, dy = inputs(5, 96, dtype, lane.device)
    ops = torch.ops.gpt2
    opcheck(ops.gelu_forward.default, (x,))
    opcheck(ops.gelu_backward.default, (dy, x))
    opcheck(ops.bias_gelu_forward.default, (x, bias))
    opcheck(ops.bias_gelu_backward.default, (dy, x, bias))


@a_property
def test_a_second_derivative_is_refused(lane, dtype):
    x, bias, _ = (t.requires_grad_() for t in inputs(2, 8, dtype, lane.device))
    for name, y in (("gelu", gelu(x)), ("bias_gelu", bias_gelu(x, bias))):
        with pytest.raises(RuntimeError, match=f"^{name}: no second derivative"):
            torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize(
    ("x", "bias", "error", "message"),
    [
        (torch.zeros(2, 8), torch.zeros(7), ValueError, r"bias has shape \(7,\) .* contiguous and \(8,\)"),
        (torch.zeros(2, 8), torch.zeros(16)[::2], ValueError, "it must be contiguous"),
        (torch.zeros(2, 8), torch.zeros(8).half(), ValueError, "bias has dtype torch.float16, x has torch.float32"),
        (torch.zeros(2, 8).double(), torch.zeros(8).double(), TypeError, "x is float64; it must be"),
        (torch.zeros(8, 2).T, torch.zeros(8), ValueError, "the last must be 1"),
    ],
)
def test_a_wrong_argument_says_what_came_and_what_is_required(x, bias, error, message):
    with pytest.raises(error, match=f"bias_gelu: .*{message}"):
        bias_gelu(x, bias)


@pytest.mark.compile
@pytest.mark.parametrize("arch", compiling.ARCHITECTURES)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=["bfloat16", "float32"])
def test_every_kernel_compiles_fits_and_does_not_spill(arch, dtype):
    x, bias, dy = inputs(4, 768, dtype, "cpu")
    with compiling.compile_only(arch) as kernels:
        bias_gelu(x.requires_grad_(), bias.requires_grad_()).backward(dy)
    assert [kernel.name for kernel in kernels[:2]] == ["_gelu_forward_kernel", "_gelu_backward_kernel"]
    for kernel in kernels:
        assert kernel.spilled == 0, kernel
        assert kernel.shared <= compiling.SHARED_MEMORY[arch], kernel


@across_lanes(torch.float32, lanes=("interpret", "sm_80", "sm_90", "gpu"))
def test_the_slope_at_nan_is_nan(lane, dtype):
    x = torch.tensor([1.0, float("nan"), float("inf")], device=lane.device, requires_grad=True)
    gelu(x).sum().backward()
    assert x.grad.isnan().tolist() == [False, True, False]
