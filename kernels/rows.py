"""What the row-wise kernels share: a row held in registers, sums over columns, rows as the kernels take them.

A row of N columns is COLUMN_TILES tiles of BLOCK_N side by side, so that a width that is no power of two (768 = 3 * 256
and 1600 = 6.25 * 256) leaves at most a part of the last tile idle, where one padded tile would leave up to half of all
lanes. N is constexpr: whole tiles need no mask.

Sums over rows (dweight, dbias) are taken by P programs, at most PARTIAL_ROWS, each into one row of a [P, N] tensor in
fp32, and a second kernel adds those up: no atomics, and an order that depends on the shape alone.
"""

import torch
import triton
import triton.language as tl

from kernels.checks import check_last_stride, check_same, check_tensor
from kernels.launch import Launcher

# How many programs share the rows where columns are summed: one for each SM of most large chips, and few enough that
# writing and reading their partial sums stays below a tenth of the bytes at GPT-2's sizes.
PARTIAL_ROWS = 128


@triton.jit
def _offsets(offs_m, stride, i: tl.constexpr, BLOCK_N: tl.constexpr):
    """Offsets of column tile i of rows offs_m, [len(offs_m), BLOCK_N]."""
    offs_n = i * BLOCK_N + tl.arange(0, BLOCK_N)
    return offs_m.to(tl.int64)[:, None] * stride + offs_n[None, :]


@triton.jit
def _inside(offs_m, M, i: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where column tile i of rows offs_m lies inside [M, N]; broadcasts to [len(offs_m), BLOCK_N]."""
    inside = (offs_m < M)[:, None]
    if (i + 1) * BLOCK_N > N:
        inside = inside & (i * BLOCK_N + tl.arange(0, BLOCK_N) < N)[None, :]
    return inside


@triton.jit
def _load_tile(ptr, offs_m, stride, M, i: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """Column tile i of rows offs_m as stored, [len(offs_m), BLOCK_N]; zero outside [M, N]."""
    return tl.load(ptr + _offsets(offs_m, stride, i, BLOCK_N), mask=_inside(offs_m, M, i, N, BLOCK_N), other=0.0)


@triton.jit
def _store_tile(ptr, tile, offs_m, stride, M, i: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """Stores [len(offs_m), BLOCK_N] as column tile i of rows offs_m, rounded to the tensor's dtype."""
    value = tile.to(ptr.dtype.element_ty)
    tl.store(ptr + _offsets(offs_m, stride, i, BLOCK_N), value, mask=_inside(offs_m, M, i, N, BLOCK_N))


@triton.jit
def _load_vector_tile(ptr, i: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """Column tile i of a vector [N] as stored, [1, BLOCK_N]; zero beyond N."""
    offs_n = i * BLOCK_N + tl.arange(0, BLOCK_N)
    return tl.load(ptr + offs_n, mask=offs_n < N, other=0.0)[None, :]


@triton.jit
def _sum_of_rows(tile):
    """tl.sum(tile, 0) for [1, n], [2, n] or [4 k, n], which reduces without conflicts in shared memory.

    Rows that several warps hold are exchanged as a change of layout, whose accesses spread over all banks, where those
    of a reduction's do not. Of four warps a thread has every fourth row, and adds its own first.
    """
    M: tl.constexpr = tile.shape[0]
    N: tl.constexpr = tile.shape[1]
    if M > 4:
        tile = tl.sum(tl.reshape(tile, [M // 4, 4, N]), 0)
    if M >= 4:
        first, second = tl.split(tl.reshape(tl.trans(tile), [N, 2, 2]))
        first, second = tl.split(first + second)
        return first + second
    if M == 2:
        first, second = tl.split(tl.trans(tile))
        return first + second
    return tl.sum(tile, 0)


@triton.jit
def _store_partial(partial_ptr, sums, k, p, P, offs_n, N):
    """Stores sums [len(offs_n)] of program p as partial[k, p, offs_n] of a [K, P, N] tensor."""
    tl.store(partial_ptr + (tl.cast(k, tl.int64) * P + p) * N + offs_n, sums, mask=offs_n < N)


@triton.jit
def _column_sums(partial_ptr, sums_ptr, program, P, N, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of partial [K, P, N] the sums [K, N] over P, BLOCK_N columns of one k by a program."""
    tiles = tl.cdiv(N, BLOCK_N)
    k = (program // tiles).to(tl.int64)
    offs_n = program % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for p in tl.range(0, P, BLOCK_P):
        offs_p = p + tl.arange(0, BLOCK_P)
        mask = (offs_p < P)[:, None] & (offs_n < N)[None, :]
        acc += tl.load(partial_ptr + (k * P + offs_p)[:, None] * N + offs_n[None, :], mask=mask, other=0.0)
    sums = _sum_of_rows(acc).to(sums_ptr.dtype.element_ty)
    tl.store(sums_ptr + k * N + offs_n, sums, mask=offs_n < N)


MOST_GROUPS = 5
# Of no number it is known what divides it: the loads, and with them the order of the sums, are the same for all.
_SIZES = [f"{size}_{i}" for i in range(MOST_GROUPS) for size in "KPN"]


@triton.jit(do_not_specialize=_SIZES)
def _column_sums_kernel(
    partial_ptr,  # GROUPS of [K, P, N] fp32, one behind the other
    sums_ptr,  # of each group [K, N], one behind the other
    K_0,
    P_0,
    N_0,
    K_1,
    P_1,
    N_1,
    K_2,
    P_2,
    N_2,
    K_3,
    P_3,
    N_3,
    K_4,
    P_4,
    N_4,
    GROUPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    sizes = ((K_0, P_0, N_0), (K_1, P_1, N_1), (K_2, P_2, N_2), (K_3, P_3, N_3), (K_4, P_4, N_4))
    program = tl.program_id(0)
    for i in tl.static_range(GROUPS):
        K, P, N = sizes[i]
        programs = K * tl.cdiv(N, BLOCK_N)
        if (program >= 0) & (program < programs):
            _column_sums(partial_ptr, sums_ptr, program, P, N, BLOCK_P, BLOCK_N)
        program -= programs
        partial_ptr += tl.cast(K * P, tl.int64) * N
        sums_ptr += K * N


def _column_sums_plan(first, *groups):
    """first: the element of the partial sums at which they begin; groups: (K, P, N)."""
    programs = sum(K * triton.cdiv(N, 32) for K, _, N in groups)
    numbers = [number for group in groups for number in group] + [0] * (3 * (MOST_GROUPS - len(groups)))
    options = {"GROUPS": len(groups), "BLOCK_P": 64, "BLOCK_N": 32, "num_warps": 4}
    return (programs,), numbers, options, {0: first} if first else {}


_launch_column_sums = Launcher(_column_sums_kernel, _column_sums_plan)


def column_sums(partial, dtype):
    """The sums over axis 1 of partial [K, P, N] fp32, rounded once to dtype: [K, N]."""
    K, P, N = partial.shape
    sums = partial.new_empty((K, N), dtype=dtype)
    _launch_column_sums((partial, sums), 0, (K, P, N))
    return sums


def as_rows(function, tensor, name):
    """tensor [..., N] as a view [M, N]; ValueError if that would take a copy, or if the last stride is not 1."""
    check_tensor(function, tensor, name)
    N = tensor.shape[-1] if tensor.dim() else 0
    if N == 0:
        raise ValueError(f"{function}: {name} has shape {tuple(tensor.shape)}; it must be [..., N] with N at least 1")
    check_last_stride(function, tensor, name)
    try:
        return tensor.view(tensor.shape[:-1].numel(), N)
    except RuntimeError as error:
        raise ValueError(
            f"{function}: {name} has shape {tuple(tensor.shape)} and strides {tuple(tensor.stride())}; "
            "its rows must be evenly spaced (the kernel copies nothing)"
        ) from error


def empty_rows(tensor, dtype=None):
    """A contiguous tensor of the same shape, dtype (unless given) and device, with nothing in it. (new_empty takes
    twice as long.)"""
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


ALIGNMENT = 64  # elements: a row of so many, and of any multiple, begins on a cache line


def empty_aligned(M, V, like):
    """[M, V] of like's dtype and device, with nothing in it, whose rows begin on cache lines whatever V is.

    Rows of 50257 elements, back to back, admit no wide load.
    """
    return like.new_empty_strided((M, V), (-(-V // ALIGNMENT) * ALIGNMENT, 1))


def vocabulary_product(x, weight, logits):
    """logits [M, V] = x [M, C] weight^T, written into rows that empty_aligned has made."""
    for columns in vocabulary_parts(logits):
        if torch.compiler.is_compiling():  # dynamo takes no out= with gaps between its rows
            logits[:, columns].copy_(torch.mm(x, weight[columns].T))
        else:
            torch.mm(x, weight[columns].T, out=logits[:, columns])
    return logits


def vocabulary_gradient(dlogits, weight, dx):
    """dx [M, C] = dlogits [M, V] weight, dlogits in aligned rows."""
    first, *rest = vocabulary_parts(dlogits)
    torch.mm(dlogits[:, first], weight[first], out=dx)
    for columns in rest:
        dx.addmm_(dlogits[:, columns], weight[columns])
    return dx


def vocabulary_weight_gradient(dlogits, x, total, beta=1.0):
    """total [V, C] fp32 = beta total + dlogits^T [V, M] x [M, C], summed in fp32 whatever their dtype.

    With a beta of 0 total need hold nothing and is not read.
    """
    for columns in vocabulary_parts(dlogits):
        part, g = total[columns], dlogits[:, columns].T
        if x.dtype == torch.float32:
            part.addmm_(g, x, beta=beta)
        elif x.is_cuda:
            torch.addmm(part, g, x, beta=beta, out_dtype=torch.float32, out=part)
        else:
            part.addmm_(g.float(), x.float(), beta=beta)


def vocabulary_parts(logits):
    """The columns [0, V) as slices whose products a GPU's libraries are fast at: a multiple of 64, and the rest.

    They choose by the extents: of 50257 columns, aligned or not, both products with the weight go to kernels of an
    older kind without wide loads, which on an H100 take five to seven times as long. 50240 and 17 do not.
    """
    V = logits.shape[1]
    whole = V // ALIGNMENT * ALIGNMENT
    if not logits.is_cuda or whole in (0, V):
        return [slice(0, V)]
    return [slice(0, whole), slice(whole, V)]


def row_stride(tensor):
    """What as_rows(tensor).stride(0) would be, without making the view."""
    shape = tensor.shape
    if len(shape) == 2:
        return tensor.stride(0)
    for axis in range(len(shape) - 2, -1, -1):
        if shape[axis] != 1:
            return tensor.stride(axis)
    return shape[-1]


def check_vector(function, x, x_name, vector, name, *, may_be_fp32=False):
    """`vector` must be a contiguous [N] for x [..., N], of x's dtype (or fp32, if it may) and device."""
    check_tensor(function, vector, name)
    check_same(function, x, x_name, vector, name, may_be_fp32=may_be_fp32)
    if vector.shape != x.shape[-1:] or not vector.is_contiguous():
        raise ValueError(
            f"{function}: {name} has shape {tuple(vector.shape)} and strides {vector.stride()}; "
            f"it must be contiguous and ({x.shape[-1]},)"
        )


def unit_stride(gradient):
    """Autograd may hand over any strides (an expanded scalar after .sum()); attention reads rows of unit stride."""
    return gradient if gradient.stride(-1) == 1 or gradient.shape[-1] == 1 else gradient.contiguous()


def even_rows(gradient):
    """As unit_stride, for the row-wise kernels, whose rows are also evenly spaced."""
    return gradient if gradient.is_contiguous() else gradient.contiguous()
