"""Cross-entropy of a language model's head, without the logits: loss and gradients from x [M, C] and weight [V, C].

    logits = x weight^T + bias,   g = dloss/dlogits                    [chunk_rows, V], one chunk of rows at a time
    dx = g weight,   dweight = sum over chunks of g^T x,   dbias = sum over rows of g

The logits of a chunk live in one buffer, their gradient takes their place, and the matrix products of backward are done
before the next chunk: the whole [M, V], which outweighs GPT-2 itself at M = 16k, never exists. The factors dloss and,
for the mean, 1 / n are known late and multiply dx, dweight and dbias in backward, in fp32, so that small factors cost
fp16 nothing. dweight and dbias are sums over all rows before that division, which fp16 need not hold: they are fp32
from the matrix product on. With reduction="none" each row has its own dloss, so there backward goes through the chunks
once more: two products for the logits in place of one.

Bytes live at once beside the results: chunk_rows V e for the chunk, 4 V C for the fp32 sum of dweight; where a CPU
multiplies two-byte tensors, which it cannot into fp32, 4 chunk_rows V more. FLOPs: 6 M V C, as with the logits in full.
The same chunks can be taken by plain PyTorch, on any device. Autocast does not reach inside: x's dtype counts, to which
fp32 weights and biases, as mixed precision keeps them, are rounded; their gradients are not.
"""

import torch

from kernels.checks import (
    check_device,
    check_dtype,
    check_number,
    check_same,
    check_tensor,
    once,
    refuse_second_derivative,
)
from kernels.cross_entropy import (
    OPTIONS_SCHEMA,
    LossOptions,
    check_loss,
    launch_counts,
    launch_reduction,
    launch_rows,
    refuse_class_weight_gradient,
)
from kernels.library import define_op, without_autocast
from kernels.rows import (
    as_rows,
    empty_aligned,
    vocabulary_gradient,
    vocabulary_product,
    vocabulary_weight_gradient,
)

# What the chunks need of a loss, in plain PyTorch: see logits.py for the formulas.


def _torch_counts(target, class_weight, V, ignore_index, reduction):
    if reduction != "mean":
        return torch.empty(0, dtype=torch.float32, device=target.device)
    counted = target != ignore_index
    n = counted.sum().float()
    if class_weight is None:
        return torch.stack((n, torch.ones_like(n)))
    weights = class_weight.float()[target.masked_fill(~counted, 0)] * counted
    return torch.stack((n, n / weights.sum()))


def _torch_rows(logits, target, class_weight, counts, options, losses, *, dloss=None, gradient=False):
    ignored = target == options.ignore_index
    columns = target.masked_fill(ignored, 0)[:, None]
    z = logits.float()
    V = z.shape[1]
    slope = None
    if options.softcap:
        t = torch.tanh(z / options.softcap)
        z, slope = options.softcap * t, 1.0 - t * t
    lse = torch.logsumexp(z, 1, keepdim=True)
    x_target = z.gather(1, columns)
    w = None if class_weight is None else class_weight.float()
    w_target = torch.ones_like(lse) if w is None else w[columns]
    total_weight = float(V) if w is None else w.sum()
    ratio = counts[1] if counts.numel() and w is not None else lse.new_ones(())
    loss = w_target * (lse - x_target)
    smoothing = options.label_smoothing
    if smoothing:
        apart = lse - z if w is None else (lse - z) * w
        loss = loss * (1.0 - smoothing) + smoothing / V * apart.sum(1, keepdim=True)
    loss = loss * ratio + options.lse_square_scale * lse * lse
    losses.copy_(loss[:, 0].masked_fill_(ignored, 0.0))
    if not gradient:
        return
    ratio = ratio.masked_fill(~ratio.isfinite(), 0.0)
    hot, cold = (1.0 - smoothing) * w_target * ratio, smoothing / V * ratio
    whole = hot + cold * total_weight + 2.0 * options.lse_square_scale * lse
    p = z.sub_(lse).exp_().mul_(whole)  # without a softcap fp32 logits become p in place
    if smoothing:
        p.sub_(cold if w is None else cold * w)
    p.scatter_add_(1, columns, -hot)
    if slope is not None:
        p.mul_(slope)
    if dloss is not None:
        p.mul_(dloss[:, None])
    p.masked_fill_(ignored[:, None], 0.0)
    if slope is not None or p.dtype != logits.dtype:
        logits.copy_(p)


def _torch_reduction(losses, counts):
    return losses.sum() / counts[0] if counts.numel() else losses.sum()


def _chunked(x, weight, bias, target, class_weight, dloss, reduction, chunk_rows, wanted, options, parts):
    """loss ([], or [M] for "none"), counts [2] or [0], and the wanted ones of dx [M, C], dweight [V, C] and dbias [V],
    the last two fp32; gradients are before 1 / n and, unless dloss [M] is given, before dloss. Empty if not wanted."""
    counts_of, rows, reduce = parts
    wants_dx, wants_dweight, wants_dbias = wanted
    M, C = x.shape
    V = weight.shape[0]
    losses = torch.empty(M, dtype=torch.float32, device=x.device)
    buffer = empty_aligned(min(M, chunk_rows), V, x)
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    dx = torch.empty((M, C) if wants_dx else 0, dtype=x.dtype, device=x.device)
    begun = torch.empty if M else torch.zeros  # the first chunk writes, the others add
    dweight = begun((V, C) if wants_dweight else 0, dtype=torch.float32, device=x.device)
    dbias = torch.zeros(V if wants_dbias else 0, dtype=torch.float32, device=x.device)
    with without_autocast(x):
        counts = counts_of(target, class_weight, V, options.ignore_index, reduction)
        for start in range(0, M, chunk_rows):
            chunk = slice(start, start + chunk_rows)
            logits = buffer[: min(chunk_rows, M - start)]
            if bias is None:
                vocabulary_product(x[chunk], weight, logits)
            else:  # whole: in parts a GPU's sums came out up to four times further from the truth in fp16
                torch.addmm(bias, x[chunk], weight.T, out=logits)
            dlosses = None if dloss is None else dloss[chunk]
            rows(
                logits, target[chunk], class_weight, counts, options, losses[chunk], dloss=dlosses, gradient=any(wanted)
            )
            if wants_dx:
                vocabulary_gradient(logits, weight, dx[chunk])
            if wants_dweight:
                vocabulary_weight_gradient(logits, x[chunk], dweight, beta=float(start > 0))
            if wants_dbias:
                dbias += logits.sum(0, dtype=torch.float32)
        loss = losses if reduction == "none" else reduce(losses, counts)
    return loss, counts, dx, dweight, dbias


def _triton(x, weight, bias, target, class_weight, dloss, reduction, chunk_rows, dx, dweight, dbias, *options):
    check_device("linear_cross_entropy", x, "x")
    parts = launch_counts, launch_rows, launch_reduction
    shared = dloss, reduction, chunk_rows, (dx, dweight, dbias), LossOptions(*options), parts
    return _chunked(x, weight, bias, target, class_weight, *shared)


def _torch(x, weight, bias, target, class_weight, dloss, reduction, chunk_rows, dx, dweight, dbias, *options):
    parts = _torch_counts, _torch_rows, _torch_reduction
    shared = dloss, reduction, chunk_rows, (dx, dweight, dbias), LossOptions(*options), parts
    return _chunked(x, weight, bias, target, class_weight, *shared)


def _fake(x, weight, bias, target, class_weight, dloss, reduction, chunk_rows, dx, dweight, dbias, *options):
    loss = x.new_empty(x.shape[0] if reduction == "none" else (), dtype=torch.float32)
    return (
        loss,
        loss.new_empty(2 if reduction == "mean" else 0),
        x.new_empty(x.shape if dx else 0),
        loss.new_empty(weight.shape if dweight else 0),
        loss.new_empty(weight.shape[0] if dbias else 0),
    )


linear_cross_entropy_chunks = define_op(
    "linear_cross_entropy_chunks(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, "
    "Tensor? dloss, str reduction, int chunk_rows, bool dx, bool dweight, bool dbias, "
    f"{OPTIONS_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _triton,
    _fake,
)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, target, class_weight, compute, reduction, chunk_rows, wanted, *options):
        ctx.late = reduction == "none"
        now = (False, False, False) if ctx.late else wanted
        tensors = x, weight, bias, target, class_weight
        loss, counts, *gradients = compute(*tensors, None, reduction, chunk_rows, *now, *options)
        ctx.save_for_backward(*(tensors if ctx.late else (counts, *gradients)))
        ctx.again = compute, reduction, chunk_rows, wanted, options
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors[:3]]
        return loss

    @staticmethod
    def backward(ctx, dloss):
        refuse_second_derivative("linear_cross_entropy")
        compute, reduction, chunk_rows, wanted, options = ctx.again
        if ctx.late:
            # Of any size, dloss leaves the gradients of the logits within the range of fp16.
            size = dloss.abs().max() if dloss.numel() else dloss.new_ones(())
            factor = torch.where(size.isfinite() & (size > 0), size, 1.0)
            arguments = *ctx.saved_tensors, dloss / factor, reduction, chunk_rows
            _, _, *gradients = compute(*arguments, *wanted, *options)
        else:
            counts, *gradients = ctx.saved_tensors
            factor = dloss
            if counts.numel():  # no target at all: the gradients are 0, as the sums are
                factor = torch.where(counts[0] > 0, dloss / counts[0], 0.0)
        # One dimension more than a scalar has: fp16 times a scalar would round the factor to fp16 first.
        scaled = (
            torch.mul(gradient, factor.reshape(1), out=torch.empty_like(gradient, dtype=dtype)) if needed else None
            for gradient, dtype, needed in zip(gradients, ctx.dtypes, ctx.needs_input_grad)
        )
        return *scaled, *[None] * 10


@once
def _check(tensors, chunk_rows, implementation, *options):
    """linear_cross_entropy's checks; the LossOptions."""
    function = "linear_cross_entropy"
    x, weight, bias, target, class_weight = tensors
    check_tensor(function, x, "x", "MC")
    check_tensor(function, weight, "weight", "VC")
    if x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{function}: x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}; they must be [M, C] and [V, C]"
        )
    check_dtype(function, x, "x")
    check_same(function, x, "x", weight, "weight", may_be_fp32=True)
    V = weight.shape[0]
    if bias is not None:
        check_tensor(function, bias, "bias")
        check_same(function, x, "x", bias, "bias", may_be_fp32=True)
        if bias.shape != (V,):
            raise ValueError(f"{function}: bias has shape {tuple(bias.shape)}; it must be ({V},)")
    rows = as_rows(function, x, "x")
    options = check_loss(function, rows, V, target, class_weight, *options)
    check_number(function, chunk_rows, "chunk_rows", "at least 1", lambda rows: rows >= 1, integer=True)
    if not isinstance(implementation, str) or implementation not in ("triton", "torch"):
        raise ValueError(f"{function}: implementation is {implementation!r}; it must be triton or torch")
    return options


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_rows: int = 2048,
    implementation: str = "triton",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    lse_square_scale: float = 0.0,
    class_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """cross_entropy(x weight^T + bias, target) without ever holding all logits; differentiable once.

    x: [M, C], fp16, bf16 or fp32, which is what is multiplied in: autocast does not reach inside. weight: [V, C] and
        bias: [V] or None, of x's dtype, or fp32 beside an x of two bytes. target: int64 [M], in [0, V) or ignore_index.
    chunk_rows: how many rows of logits exist at once.
    implementation: "triton", or "torch", which takes the same chunks in plain PyTorch on any device.
    The other options are cross_entropy's.
    Returns the loss, fp32: [] or, for "none", [M]. Forward computes the gradients that will be asked for and no other:
    none under no_grad, none for a frozen head or frozen rows; with "none" backward computes them. dweight and dbias are
    summed in fp32.
    Raises TypeError or ValueError, before anything is launched, for what it cannot compute.
    """
    shared = ignore_index, reduction, label_smoothing, softcap, lse_square_scale
    options = _check((x, weight, bias, target, class_weight), chunk_rows, implementation, *shared)
    refuse_class_weight_gradient("linear_cross_entropy", class_weight)
    compute = linear_cross_entropy_chunks if implementation == "triton" else _torch
    # Inside forward gradients are off, and needs_input_grad says what the inputs are, not what was asked for.
    wanted = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, weight, bias))
    return _LinearCrossEntropy.apply(
        x, weight, bias, target, class_weight, compute, reduction, chunk_rows, wanted, *options
    )
