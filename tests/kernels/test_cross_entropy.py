"""cross_entropy and linear_cross_entropy: right in every lane within the tolerance rule, for any vocabulary."""

import compiling
import pytest
import torch
from lanes import across_lanes
from rowwise import assert_bit_identical, check_against_oracle, poisoned, with_gradients
from torch.library import opcheck

from bench.lib.live_bytes import LiveBytes
from kernels import cross_entropy, linear_cross_entropy, reference

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = (F32, F16, BF16)
GPT2_VOCABULARY = 50257

a_property = across_lanes(F16, lanes=("interpret", "sm_90", "gpu"))
_poisoned = pytest.fixture(autouse=True)(poisoned)


def inputs(M, V, dtype, device, padding=0):
    """logits [M, V] with rows V + padding apart, and targets of which the second is ignored."""
    logits = (torch.randn(M, V + padding) * 3).to(device, dtype)[:, :V]
    target = torch.randint(V, (M,))
    target[1:2] = -100
    return logits, target.to(device)


def with_options(function, **options):
    return lambda *tensors: function(*tensors, **options)


def check(logits, target, **options):
    M = logits.shape[0]
    shape = M if options.get("reduction") == "none" else ()
    dloss = torch.rand(shape, device=logits.device) + 0.5
    both = (with_options(function, **options) for function in (cross_entropy, reference.cross_entropy))
    check_against_oracle(*both, (logits, target), (dloss,))


# V: one, fewer than lanes, an odd one, a multiple of a tile, GPT-2's.
@across_lanes(*DTYPES, lanes=("interpret", "gpu"))
@pytest.mark.parametrize("V", [1, 10, 1001, 4096, GPT2_VOCABULARY])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_gradient_match_the_oracle(lane, dtype, V, reduction):
    check(*inputs(4, V, dtype, lane.device), reduction=reduction)


@across_lanes(*DTYPES, lanes=("sm_80", "sm_90"))
def test_compiled_loss_and_gradient_match_the_oracle(lane, dtype):
    check(*inputs(3, 5001, dtype, lane.device), reduction="none" if dtype == F32 else "mean")


@across_lanes(BF16, lanes=("sm_90",))
@pytest.mark.parametrize("padding", [0, 47], ids=["odd rows", "aligned rows"])
def test_compiled_rows_of_the_whole_vocabulary_match_the_oracle(lane, dtype, padding):
    check(*inputs(2, GPT2_VOCABULARY, dtype, lane.device, padding))


@across_lanes(F32, F16, BF16, lanes=("interpret", "sm_90", "gpu"))
def test_logits_of_ten_thousand(lane, dtype):
    logits = torch.where(torch.randn(4, 300) > 0, 1e4, -1e4) + torch.randn(4, 300)
    check(logits.to(lane.device, dtype), torch.arange(4).to(lane.device), reduction="none")


@a_property
def test_logits_may_be_minus_infinity(lane, dtype):
    logits, target = inputs(4, 1001, dtype, lane.device)
    logits[:, 100:900] = float("-inf")
    check(logits, target.clamp(max=99))


@a_property
def test_ignored_rows_give_no_loss_and_no_gradient(lane, dtype):
    logits, target = inputs(5, 1001, dtype, lane.device)
    logits[1] = float("nan")  # is not even read
    (loss,), (dlogits,) = with_gradients(cross_entropy, (logits, target), (torch.ones((), device=lane.device),))
    assert loss.isfinite()
    assert torch.equal(dlogits[1], torch.zeros_like(dlogits[1]))


@a_property
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_targets_ignored(lane, dtype, reduction):
    logits, target = inputs(3, 65, dtype, lane.device)
    target.fill_(7)
    options = {"ignore_index": 7, "reduction": reduction}
    loss = cross_entropy(logits.requires_grad_(), target, **options)
    expected = reference.cross_entropy(logits, target, **options)
    assert torch.equal(loss.isnan(), expected.isnan())
    assert torch.equal(loss.nan_to_num(), expected.nan_to_num())
    (dlogits,) = torch.autograd.grad(loss.sum(), logits)
    assert torch.equal(dlogits, torch.zeros_like(logits))


@a_property
def test_a_target_outside_the_vocabulary_gives_nan_and_reads_nothing(lane, dtype):
    logits, target = inputs(3, 65, dtype, lane.device)
    target[0], target[2] = 65, -1
    assert cross_entropy(logits, target, reduction="none").isnan().tolist() == [True, False, True]


@a_property
def test_the_gradient_may_take_the_place_of_the_logits(lane, dtype):
    logits, target = inputs(4, 1001, dtype, lane.device)
    kept = logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(cross_entropy(kept, target), kept)
    overwritten = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(overwritten, target, inplace=True), overwritten)
    assert gradient.data_ptr() == overwritten.data_ptr()
    assert torch.equal(gradient, expected)


@a_property
def test_rows_and_targets_of_any_stride_are_read_in_place(lane, dtype):
    logits, target = inputs(8, 300, dtype, lane.device)
    dloss = torch.rand(8, device=lane.device)[::2]
    views = logits[::2, 17:118], target.clamp(max=100)[::2]
    function = with_options(cross_entropy, reduction="none")
    strided = with_gradients(function, views, (dloss,))
    dense = with_gradients(function, [x.contiguous() for x in views], (dloss.contiguous(),))
    assert_bit_identical(strided, dense)


@a_property
def test_a_row_does_not_depend_on_the_others_and_runs_are_bit_identical(lane, dtype):
    logits, target = inputs(5, 1001, dtype, lane.device)
    dloss = torch.rand(5, device=lane.device)
    function = with_options(cross_entropy, reduction="none")
    together, again = (with_gradients(function, (logits, target), (dloss,)) for _ in range(2))
    assert_bit_identical(together, again)
    alone = with_gradients(function, (logits[3:4], target[3:4]), (dloss[3:4],))
    assert torch.equal(together[0][0][3:4], alone[0][0])
    assert torch.equal(together[1][0][3:4], alone[1][0])


@a_property
def test_no_rows(lane, dtype):
    logits, target = inputs(0, 65, dtype, lane.device)
    assert cross_entropy(logits, target, reduction="none").shape == (0,)
    assert cross_entropy(logits, target, reduction="sum") == 0.0
    assert cross_entropy(logits, target).isnan()


@a_property
def test_ops_pass_opcheck(lane, dtype):
    logits, target = inputs(4, 65, dtype, lane.device)
    ops = torch.ops.gpt2
    loss, scale, m, l = ops.cross_entropy_forward(logits, target, -100, "mean")
    opcheck(ops.cross_entropy_forward.default, (logits, target, -100, "mean"))
    arguments = (torch.ones_like(loss), scale, logits, target, m, l, -100)
    opcheck(ops.cross_entropy_backward.default, arguments)
    opcheck(ops.cross_entropy_backward_.default, arguments)
    x, weight = torch.randn(4, 16).to(logits), torch.randn(65, 16).to(logits)
    opcheck(ops.linear_cross_entropy_forward.default, (x, weight, target, -100, "mean", 3, True))


@a_property
def test_a_second_derivative_is_refused(lane, dtype):
    logits, target = inputs(3, 65, dtype, lane.device)
    with pytest.raises(RuntimeError, match="cross_entropy: no second derivative"):
        torch.autograd.grad(cross_entropy(logits.requires_grad_(), target), logits, create_graph=True)


# The head fused with its loss


def head_inputs(M, C, V, dtype, device):
    _, target = inputs(M, V, dtype, device)
    x, weight = torch.randn(M, C).to(device, dtype), (torch.randn(V, C) / C**0.5).to(device, dtype)
    return x, weight, target


@across_lanes(F32, F16, BF16, lanes=("interpret", "sm_90", "gpu"))
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_cross_entropy_matches_the_oracle(lane, dtype, reduction):
    dloss = torch.tensor(0.7, device=lane.device)
    both = (with_options(f, reduction=reduction) for f in (chunks_of_three, reference.linear_cross_entropy))
    check_against_oracle(*both, head_inputs(8, 24, 1001, dtype, lane.device), (dloss,))


def chunks_of_three(*tensors, **options):
    return linear_cross_entropy(*tensors, chunk_rows=3, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_its_plain_pytorch_form_matches_the_oracle(dtype, reduction):
    tensors = head_inputs(8, 24, 1001, dtype, "cpu")
    both = (
        with_options(chunks_of_three, reduction=reduction, implementation="torch"),
        with_options(reference.linear_cross_entropy, reduction=reduction),
    )
    check_against_oracle(*both, tensors, (torch.tensor(0.7),))


def peak_of_a_step(loss_function, device="meta"):
    """Bytes at the peak of loss and gradients for GPT-2's head at B = 8, T = 1024; meta tensors have sizes, no data."""
    M, C, V = 8 * 1024, 768, GPT2_VOCABULARY
    x = torch.empty(M, C, device=device, requires_grad=True)
    weight = torch.empty(V, C, device=device, requires_grad=True)
    target = torch.empty(M, dtype=torch.int64, device=device)
    with LiveBytes() as live:
        loss_function(x, weight, target).backward()
    assert x.grad.shape == x.shape
    assert weight.grad.shape == weight.shape
    return live.peak, 4 * M * V


def test_the_peak_of_a_step_stays_below_the_logits_own_size():
    torch.use_deterministic_algorithms(False)  # nothing to poison: meta tensors hold nothing
    fused, logits = peak_of_a_step(with_options(linear_cross_entropy, implementation="torch"))
    plain, _ = peak_of_a_step(reference.linear_cross_entropy)
    assert fused < 0.6 * logits
    assert plain > 2 * logits  # the count sees what it should


@pytest.mark.gpu
def test_the_peak_of_a_step_on_a_gpu_stays_below_the_logits_own_size():
    M, C, V = 8 * 1024, 768, GPT2_VOCABULARY
    x, weight, _ = head_inputs(1, C, V, BF16, "cuda")
    x = x.expand(M, C).contiguous().requires_grad_()
    target = torch.randint(V, (M,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(x, weight.requires_grad_(), target).backward()
    assert torch.cuda.max_memory_allocated() - before < 2 * M * V


# Errors


@pytest.mark.parametrize(
    ("logits", "target", "options", "error", "message"),
    [
        (
            torch.zeros(2, 3, 4),
            torch.zeros(2).long(),
            {},
            ValueError,
            r"logits has shape \(2, 3, 4\); it must be \[M, V\]",
        ),
        (
            torch.zeros(2, 4),
            torch.zeros(3).long(),
            {},
            ValueError,
            r"target is torch.int64 \(3,\) .* torch.int64 \(2,\)",
        ),
        (torch.zeros(2, 4), torch.zeros(2), {}, ValueError, "target is torch.float32"),
        (torch.zeros(4, 2).T, torch.zeros(2).long(), {}, ValueError, "the last must be 1"),
        (torch.zeros(2, 4).double(), torch.zeros(2).long(), {}, TypeError, "logits is float64"),
        (
            torch.zeros(2, 4),
            torch.zeros(2).long(),
            {"reduction": "avg"},
            ValueError,
            "'avg'; it must be one of none, sum",
        ),
    ],
)
def test_a_wrong_argument_says_what_came_and_what_is_required(logits, target, options, error, message):
    with pytest.raises(error, match=f"^cross_entropy: .*{message}"):
        cross_entropy(logits, target, **options)


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((2, 3), (5, 4)), {}, r"x has shape \(2, 3\), weight \(5, 4\)"),
        (((2, 3), (5, 3)), {"reduction": "none"}, "reduction is 'none'; it must be sum, mean"),
        (((2, 3), (5, 3)), {"chunk_rows": 0}, "chunk_rows is 0; it must be at least 1"),
        (((2, 3), (5, 3)), {"implementation": "cuda"}, "implementation is 'cuda'; it must be triton or torch"),
    ],
)
def test_a_wrong_argument_of_the_fused_head_is_refused(shapes, options, message):
    with pytest.raises(ValueError, match=f"^linear_cross_entropy: {message}"):
        linear_cross_entropy(*(torch.zeros(shape) for shape in shapes), torch.zeros(2).long(), **options)


@pytest.mark.compile
@pytest.mark.parametrize("arch", compiling.ARCHITECTURES)
@pytest.mark.parametrize("padding", [0, 47], ids=["odd rows", "aligned rows"])
def test_every_kernel_compiles_fits_and_does_not_spill(arch, padding):
    logits, target = inputs(2, GPT2_VOCABULARY, BF16, "cpu", padding)
    with compiling.compile_only(arch) as kernels:
        cross_entropy(logits.requires_grad_(), target, inplace=True).backward()
        x, weight, target = head_inputs(2, 8, GPT2_VOCABULARY, F32, "cpu")
        linear_cross_entropy(x.requires_grad_(), weight, target)
    assert len(kernels) >= 4
    for kernel in kernels:
        assert kernel.spilled == 0, kernel
        assert kernel.shared <= compiling.SHARED_MEMORY[arch], kernel
