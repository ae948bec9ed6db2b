"""Cross-entropy of a language model's head, without the logits: loss, dx and dweight from x [M, C] and weight [V, C].

    logits = x weight^T,   g = softmax(logits) - onehot(target)        [chunk_rows, V], one chunk of rows at a time
    dx = g weight,         dweight = sum over chunks of g^T x          each times dloss, and 1 / count for the mean

The logits of a chunk live in one buffer, their gradient takes their place, and both matrix products of backward are
done before the next chunk: the whole [M, V], which outweighs GPT-2 itself at M = 16k, never exists. The factor dloss is
known only in backward and multiplies dx and dweight there, so that gradients lose nothing to the range of fp16.

Bytes live at once beside the results: chunk_rows V e for the chunk, V C e for its part of dweight, 4 V C for the fp32
sum of those. FLOPs: 6 M V C, as with the logits in full. The same chunks can be taken by plain PyTorch, on any device.
"""

import torch

from kernels.checks import check_device, check_dtype, check_same, refuse_second_derivative
from kernels.cross_entropy import check_target, launch_reduction, launch_rows
from kernels.library import define_op
from kernels.rows import as_rows

_ROW_ALIGNMENT = 64  # logits: rows start on a cache line, whatever V is


def _triton_rows(logits, target, ignore_index):
    """The losses of a chunk [rows]; its logits are overwritten by their gradient."""
    return launch_rows(logits, target, ignore_index, gradient=True)[0]


def _torch_rows(logits, target, ignore_index):
    """As _triton_rows, in plain PyTorch."""
    ignored = target == ignore_index
    columns = target.masked_fill(ignored, 0)[:, None]
    wide = logits.float()
    lse = torch.logsumexp(wide, 1, keepdim=True)
    losses = (lse - wide.gather(1, columns))[:, 0].masked_fill_(ignored, 0.0)
    p = wide.sub_(lse).exp_()  # fp32 logits become p in place
    p.scatter_add_(1, columns, torch.full_like(lse, -1.0)).masked_fill_(ignored[:, None], 0.0)
    if p.dtype != logits.dtype:
        logits.copy_(p)
    return losses


def _torch_reduction(losses, target, ignore_index, reduction):
    scale = (target != ignore_index).sum().float().reciprocal() if reduction == "mean" else None
    return losses.sum() if scale is None else losses.sum() * scale, scale


def _chunked(x, weight, target, ignore_index, reduction, chunk_rows, gradients, rows, reduce):
    """loss [], scale [] or [0], dx [M, C] and dweight [V, C] fp32, both before dloss and scale; empty if not wanted."""
    M, C = x.shape
    V = weight.shape[0]
    losses = torch.empty(M, dtype=torch.float32, device=x.device)
    width = -(-V // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
    buffer = torch.empty(min(M, chunk_rows), width, dtype=x.dtype, device=x.device)
    dx = torch.empty((M, C) if gradients else 0, dtype=x.dtype, device=x.device)
    dweight = torch.zeros((V, C) if gradients else 0, dtype=torch.float32, device=x.device)
    for start in range(0, M, chunk_rows):
        chunk = slice(start, start + chunk_rows)
        logits = buffer[: min(chunk_rows, M - start), :V]
        torch.mm(x[chunk], weight.T, out=logits)
        losses[chunk] = rows(logits, target[chunk], ignore_index)
        if gradients:
            torch.mm(logits, weight, out=dx[chunk])
            dweight += logits.T @ x[chunk]
    loss, scale = reduce(losses, target, ignore_index, reduction)
    return loss, losses.new_empty(0) if scale is None else scale, dx, dweight


def _triton_forward(x, weight, target, ignore_index, reduction, chunk_rows, gradients):
    check_device("linear_cross_entropy", x, "x")
    options = (ignore_index, reduction, chunk_rows, gradients)
    return _chunked(x, weight, target, *options, _triton_rows, launch_reduction)


def _torch_forward(x, weight, target, *options):
    return _chunked(x, weight, target, *options, _torch_rows, _torch_reduction)


def _forward_fake(x, weight, target, ignore_index, reduction, chunk_rows, gradients):
    loss = x.new_empty((), dtype=torch.float32)
    dweight = weight.new_empty(weight.shape if gradients else 0, dtype=torch.float32)
    return loss, loss.new_empty(() if reduction == "mean" else 0), x.new_empty(x.shape if gradients else 0), dweight


linear_cross_entropy_forward = define_op(
    "linear_cross_entropy_forward(Tensor x, Tensor weight, Tensor target, int ignore_index, str reduction, "
    "int chunk_rows, bool gradients) -> (Tensor, Tensor, Tensor, Tensor)",
    _triton_forward,
    _forward_fake,
)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, target, compute, *options):
        gradients = any(ctx.needs_input_grad[:2])
        loss, scale, dx, dweight = compute(x, weight, target, *options, gradients)
        ctx.save_for_backward(scale, dx, dweight)
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, dloss):
        refuse_second_derivative("linear_cross_entropy")
        scale, dx, dweight = ctx.saved_tensors
        factor = dloss * scale if scale.dim() == 0 else dloss
        needs_dx, needs_dweight = ctx.needs_input_grad[:2]
        return (
            (dx * factor).to(dx.dtype) if needs_dx else None,
            (dweight * factor).to(ctx.dtype) if needs_dweight else None,
            *[None] * 5,
        )


def linear_cross_entropy(
    x, weight, target, *, ignore_index=-100, reduction="mean", chunk_rows=2048, implementation="triton"
):
    """cross_entropy(x weight^T, target) without ever holding all logits; differentiable once.

    x: [M, C]; weight: [V, C]; fp16, bf16 or fp32, the same. target: int64 [M], in [0, V) or ignore_index.
    reduction: "mean" over targets that are not ignored, or "sum". chunk_rows: how many rows of logits exist at once.
    implementation: "triton", or "torch", which takes the same chunks in plain PyTorch on any device.
    Returns the loss, fp32 []. If x or weight needs a gradient, forward computes both; dweight is summed in fp32.
    Raises TypeError or ValueError, before anything is launched, for what it cannot compute.
    """
    function = "linear_cross_entropy"
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{function}: x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}; they must be [M, C] and [V, C]"
        )
    check_dtype(function, x, "x")
    check_same(function, x, "x", weight, "weight")
    check_target(function, as_rows(function, x, "x"), target, reduction)
    if reduction == "none":
        raise ValueError(f"{function}: reduction is 'none'; it must be sum, mean: a factor per row comes too late")
    if chunk_rows < 1:
        raise ValueError(f"{function}: chunk_rows is {chunk_rows}; it must be at least 1")
    if implementation not in ("triton", "torch"):
        raise ValueError(f"{function}: implementation is {implementation!r}; it must be triton or torch")
    compute = linear_cross_entropy_forward if implementation == "triton" else _torch_forward
    return _LinearCrossEntropy.apply(x, weight, target, compute, ignore_index, reduction, chunk_rows)
