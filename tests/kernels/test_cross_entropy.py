"""cross_entropy and linear_cross_entropy: right in every lane within the tolerance rule, for any vocabulary."""

import importlib
from unittest import mock

import compiling
import pytest
import torch
from lanes import across_lanes
from rowwise import assert_bit_identical, check_against_oracle, poisoned, with_gradients
from torch.library import opcheck

from bench.lib.live_bytes import LiveBytes
from kernels import cross_entropy, linear_cross_entropy, reference, rows

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
    class_weight = torch.rand(65).to(logits)
    options = (-100, 0.1, 20.0, 0.01)
    ops = torch.ops.gpt2
    loss, counts, m, l = ops.cross_entropy_forward(logits, target, class_weight, "mean", *options)
    opcheck(ops.cross_entropy_forward.default, (logits, target, class_weight, "mean", *options))
    arguments = (torch.ones_like(loss), counts, logits, target, class_weight, m, l, *options)
    opcheck(ops.cross_entropy_backward.default, arguments)
    opcheck(ops.cross_entropy_backward_.default, arguments)
    x, weight = torch.randn(4, 16).to(logits), torch.randn(65, 16).to(logits)
    for reduction, dloss in (("mean", None), ("none", torch.rand(4, device=lane.device))):
        arguments = (
            x,
            weight,
            weight[:, 0].contiguous(),
            target,
            None,
            dloss,
            reduction,
            3,
            True,
            True,
            True,
            *options,
        )
        opcheck(ops.linear_cross_entropy_chunks.default, arguments)


@a_property
@pytest.mark.parametrize("use", ["an operation that saved them", "a second backward"])
def test_autograd_knows_that_the_gradient_took_the_logits_place(lane, dtype, use):
    logits, target = inputs(4, 65, dtype, lane.device)
    logits = logits.requires_grad_()
    after_tanh = torch.tanh(logits)  # its backward reads its result
    loss = cross_entropy(after_tanh, target, inplace=True)
    if use == "a second backward":
        logits = after_tanh
        torch.autograd.grad(loss, logits, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits)


def test_every_op_that_writes_into_an_argument_is_known():
    """Each of them must tell autograd, as the test above checks for this one."""
    ours = [schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("gpt2::")]
    assert [schema.name for schema in ours if schema.is_mutable] == ["gpt2::cross_entropy_backward_"]


@pytest.mark.parametrize("rows", [torch.zeros(4).expand(3, 4), torch.zeros(9).as_strided((3, 4), (2, 1))])
def test_rows_that_overlap_are_not_overwritten(rows):
    with pytest.raises(ValueError, match=r"^cross_entropy: inplace is set, .* must not overlap"):
        cross_entropy(rows, torch.zeros(3).long(), inplace=True)


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
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy_matches_the_oracle(lane, dtype, reduction):
    dloss = torch.full((8,) if reduction == "none" else (), 0.7, device=lane.device)
    both = (with_options(f, reduction=reduction) for f in (chunks_of_three, reference.linear_cross_entropy))
    check_against_oracle(*both, head_inputs(8, 24, 1001, dtype, lane.device), (dloss,))


def chunks_of_three(*tensors, **options):
    return linear_cross_entropy(*tensors, chunk_rows=3, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_its_plain_pytorch_form_matches_the_oracle(dtype, reduction):
    tensors = head_inputs(8, 24, 1001, dtype, "cpu")
    both = (
        with_options(chunks_of_three, reduction=reduction, implementation="torch"),
        with_options(reference.linear_cross_entropy, reduction=reduction),
    )
    check_against_oracle(*both, tensors, (torch.full((8,) if reduction == "none" else (), 0.7),))


def head_gradients(lane, implementation, x, weight, target, **options):
    loss = linear_cross_entropy(x, weight, target, implementation=implementation, **options)
    loss.sum().backward()
    return loss.detach(), x.grad, weight.grad


in_both_forms = pytest.mark.parametrize("implementation", ["triton", "torch"])


@a_property
@in_both_forms
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_fused_head_without_a_target_has_gradients_of_zero(lane, dtype, implementation, reduction):
    """An unguarded 1 / count made them NaN."""
    x, weight, _ = head_inputs(5, 8, 65, dtype, lane.device)
    target = torch.full((5,), -100, device=lane.device)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    loss, dx, dweight = head_gradients(lane, implementation, x, weight, target, chunk_rows=3, reduction=reduction)
    assert loss.isnan().all() if reduction == "mean" else torch.equal(loss, torch.zeros_like(loss))
    assert torch.equal(dx, torch.zeros_like(x))
    assert torch.equal(dweight, torch.zeros_like(weight))


@a_property
@in_both_forms
def test_the_weights_gradient_is_rounded_once_after_the_mean(lane, dtype, implementation):
    """Before the division by the number of rows it is beyond fp16's range, which made it infinite."""
    x = torch.full((2048, 2), 40.0).to(lane.device, dtype).requires_grad_()
    weight = torch.zeros(44, 2).to(x).requires_grad_()
    target = torch.zeros(2048, dtype=torch.int64, device=lane.device)
    _, _, dweight = head_gradients(lane, implementation, x, weight, target)
    expected = torch.full((44, 2), 40 / 44)
    expected[0] -= 40
    torch.testing.assert_close(dweight.cpu().float(), expected, rtol=2e-3, atol=0)


@a_property
@in_both_forms
def test_a_factor_below_fp16s_normal_numbers_costs_dx_no_digits(lane, dtype, implementation):
    """A scalar tensor times an fp16 tensor is rounded to fp16 first."""
    x, weight, target = head_inputs(4, 8, 65, dtype, lane.device)
    x, weight = (x * 1e-4).requires_grad_(), weight * 2e4
    loss = linear_cross_entropy(x, weight, target, implementation=implementation)
    one, small = (torch.autograd.grad(loss * factor, x, retain_graph=True)[0] for factor in (1, 3e-7))
    torch.testing.assert_close(small.double(), one.double() * 3e-7, rtol=2e-3, atol=1e-7)


@a_property
@in_both_forms
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_small_or_large_factor_costs_the_gradients_no_digits(lane, dtype, implementation, reduction):
    """The factor is fp32: 1e-7 would vanish in fp16, and 1e5 (a scaled loss) would be infinite."""
    x, weight, target = head_inputs(4, 8, 65, dtype, lane.device)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(x, weight, target, implementation=implementation, reduction=reduction)
    gradients = [torch.autograd.grad(loss.sum() * factor, (x, weight), retain_graph=True) for factor in (1, 1e-4, 1e5)]
    for one, small, large in zip(*gradients):
        torch.testing.assert_close(small.double() * 1e4, one.double(), rtol=0, atol=1e-3)
        expected = (one.double() * 1e5).clamp(*(s * 65504 for s in (-1, 1)))
        torch.testing.assert_close(large.double().clamp(-65504, 65504), expected, rtol=2e-3, atol=1e-3 * 1e5)


@across_lanes(F32, lanes=("sm_90", "gpu"))
@in_both_forms
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast_does_not_reach_inside_the_fused_head(lane, dtype, implementation, reduction):
    x, weight, target = head_inputs(6, 24, 65, dtype, lane.device)
    bias = weight[:, 0].clone()

    def gradients():
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        options = {"bias": leaves[2], "implementation": implementation, "reduction": reduction}
        loss = linear_cross_entropy(*leaves[:2], target, **options)
        return loss, *torch.autograd.grad(loss.sum(), leaves)

    plain = gradients()
    with torch.autocast(lane.device, dtype=torch.bfloat16):
        within = gradients()
    for one, other in zip(plain, within):
        assert torch.equal(one, other)


@across_lanes(torch.float16, lanes=("sm_90", "gpu"))
@in_both_forms
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fp32_weights_beside_x_of_two_bytes(lane, dtype, implementation, reduction):
    """Mixed precision: the products are those of rounded weights; the gradients keep what they were summed to."""
    x, weight, target = head_inputs(6, 24, 65, dtype, lane.device)
    bias = weight[:, 0].clone()

    def gradients(*tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        options = {"bias": leaves[2], "implementation": implementation, "reduction": reduction}
        loss = linear_cross_entropy(*leaves[:2], target, **options)
        return loss, *torch.autograd.grad(loss.sum(), leaves)

    loss, dx, dweight, dbias = gradients(x, weight, bias)
    mixed = gradients(x, weight.float(), bias.float())
    assert torch.equal(mixed[0], loss)
    assert torch.equal(mixed[1], dx)
    for wide, narrow in zip(mixed[2:], (dweight, dbias)):
        assert wide.dtype == F32
        assert torch.equal(wide.to(dtype), narrow)
        assert not torch.equal(wide, narrow.float())


@pytest.mark.parametrize("V", [63, 64, 65, 200])
def test_products_in_parts_are_the_whole_products(V, monkeypatch):
    """What a GPU does with a vocabulary that is no multiple of 64, on a CPU."""
    logits = mock.Mock(is_cuda=True, shape=(5, V))
    parts = rows.vocabulary_parts(logits)
    assert [i for part in parts for i in range(V)[part]] == list(range(V))
    assert all((part.stop - part.start) % 64 == 0 for part in parts[:-1])
    monkeypatch.setattr(rows, "vocabulary_parts", lambda logits: parts)
    x, weight = torch.randn(5, 24), torch.randn(V, 24)
    logits = rows.vocabulary_product(x, weight, rows.empty_aligned(5, V, x))
    torch.testing.assert_close(logits, x @ weight.T)
    dx = rows.vocabulary_gradient(logits, weight, torch.empty_like(x))
    torch.testing.assert_close(dx, logits @ weight, atol=1e-3, rtol=1e-4)
    total = torch.ones(V, 24)
    rows.vocabulary_weight_gradient(logits, x, total)
    torch.testing.assert_close(total, 1 + logits.T @ x, atol=1e-3, rtol=1e-4)


@across_lanes(torch.float16, lanes=("sm_90", "gpu"))
def test_rows_of_the_gradient_begin_on_cache_lines(lane, dtype):
    """They are the operand of two matrix products, which want it."""
    logits = torch.randn(5, 70).to(lane.device, dtype).requires_grad_()
    loss = cross_entropy(logits, torch.randint(70, (5,), device=lane.device))
    (dlogits,) = torch.autograd.grad(loss, [logits])
    assert dlogits.stride() == (128, 1)


@pytest.mark.parametrize("frozen", ["nothing", "x", "weight", "bias", "everything", "no_grad"])
def test_only_gradients_that_are_asked_for_are_computed(frozen, monkeypatch):
    asked = []

    def spy(*arguments):
        asked.append(arguments[8:11])
        return compute(*arguments)

    module = importlib.import_module("kernels.linear_cross_entropy")
    compute = module._torch
    monkeypatch.setattr(module, "_torch", spy)
    x, weight, target = head_inputs(4, 8, 65, F32, "cpu")
    tensors = {"x": x, "weight": weight, "bias": torch.randn(65)}
    for name, tensor in tensors.items():
        tensor.requires_grad_(frozen not in (name, "everything"))
    with torch.set_grad_enabled(frozen != "no_grad"):
        linear_cross_entropy(x, weight, target, bias=tensors["bias"], implementation="torch")
    needed = [frozen != "no_grad" and tensor.requires_grad for tensor in tensors.values()]
    assert asked == [tuple(needed)]


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
        *(
            (torch.zeros(2, 4), torch.zeros(2).long(), {name: value}, ValueError, f"{name} is .*{message}")
            for name, value, message in (
                ("label_smoothing", 1.5, "from 0 to 1"),
                ("softcap", 0.0, "positive"),
                ("lse_square_scale", float("nan"), "finite"),
                ("class_weight", torch.ones(3), r"contiguous and \(4,\)"),
                ("class_weight", torch.ones(4).long(), "floating"),
                ("class_weight", torch.ones(8)[::2], "contiguous"),
            )
        ),
        (
            torch.zeros(2, 4),
            torch.zeros(2).long(),
            {"class_weight": torch.ones(4, requires_grad=True)},
            ValueError,
            "class_weight requires a gradient",
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
        (((2, 3), (5, 3)), {"bias": torch.zeros(3)}, r"bias has shape \(3,\); it must be \(5,\)"),
        (((2, 3), (5, 3)), {"reduction": "avg"}, "reduction is 'avg'; it must be one of none, sum"),
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
    logits, targets = inputs(2, GPT2_VOCABULARY, BF16, "cpu", padding)
    with compiling.compile_only(arch) as kernels:
        cross_entropy(logits.requires_grad_(), targets, inplace=True).backward()
        x, weight, _ = head_inputs(2, 8, GPT2_VOCABULARY, F32, "cpu")
        linear_cross_entropy(x.requires_grad_(), weight, targets)
        if padding:  # every option at once, with the softcap's registers
            options = {"label_smoothing": 0.1, "softcap": 30.0, "lse_square_scale": 1e-4}
            class_weight = torch.ones(GPT2_VOCABULARY)
            cross_entropy(logits.detach().requires_grad_(), targets, class_weight=class_weight, **options).backward()
    assert len(kernels) >= 4
    for kernel in kernels:
        assert kernel.spilled == 0, kernel
        assert kernel.shared <= compiling.SHARED_MEMORY[arch], kernel
