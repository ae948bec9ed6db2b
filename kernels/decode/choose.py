"""The next token of each row, the arg max of its logits as torch.argmax has it, and what a step leaves for the next.

NaN is the largest, the lowest of equal ids wins, -0 equals 0. Where NaN or -inf is the largest there is no token to
choose; what is said then is -1, and the step after reads token 0.
"""

import triton
import triton.language as tl

from kernels.launch import Launcher

NAN = tl.constexpr(0x7FFFFFFF)  # above infinity among the numbers of _rank
MINUS_INFINITY = tl.constexpr(-0x7F800001)
NOTHING = tl.constexpr(-(1 << 63))  # below every rank


@triton.jit
def _rank(logits, n):
    """Numbers (int64) in the order of preference: in the upper half the logits' order, in the lower one the ids'."""
    logits = logits + 0.0  # -0 becomes 0
    bits = logits.to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(logits != logits, NAN, order)
    return (order.to(tl.int64) << 32) + (0x7FFFFFFF - n)


@triton.jit
def _best(logits_ptr, first, end, WIDTH: tl.constexpr):
    """The highest rank of logits first to end, at most WIDTH of them."""
    n = first + tl.arange(0, WIDTH)
    logits = tl.load(logits_ptr + n, mask=n < end, other=0.0)
    return tl.max(tl.where(n < end, _rank(logits, n), NOTHING), 0)


@triton.jit
def _say(best, b, ids_ptr, lengths_ptr, said_ptr, capacity):
    """Text b goes on with the token of rank `best`: its next id, its length, and what it said after so many tokens."""
    token = (0x7FFFFFFF - (best & 0xFFFFFFFF)).to(tl.int64)
    is_one = ((best >> 32) < NAN) & ((best >> 32) > MINUS_INFINITY)
    length = tl.load(lengths_ptr + b)
    tl.store(said_ptr + b * capacity + length, tl.where(is_one, token, -1))
    tl.store(ids_ptr + b, tl.where(is_one, token, 0))
    tl.debug_barrier()  # all threads have read the length
    tl.store(lengths_ptr + b, length + 1)


@triton.jit
def _decode_choose_kernel(
    logits_ptr,  # [B, V] fp32
    ids_ptr,  # [B] int64
    lengths_ptr,  # [B] int32
    said_ptr,  # [B, capacity] int64
    V,
    capacity,
    WIDTH: tl.constexpr,
):
    """One program a row: its logits pass through L2, where the head has just put them."""
    b = tl.program_id(0)
    best = tl.full([WIDTH], NOTHING, tl.int64)
    row = logits_ptr + b.to(tl.int64) * V
    for start in tl.range(0, V, WIDTH):
        n = start + tl.arange(0, WIDTH)
        logits = tl.load(row + n, mask=n < V, other=0.0)
        best = tl.maximum(best, tl.where(n < V, _rank(logits, n), NOTHING))
    _say(tl.max(best, 0), b, ids_ptr, lengths_ptr, said_ptr, capacity)


def _choose_plan(B, V, capacity):
    WIDTH = min(16384, triton.next_power_of_2(V))
    return (B,), (V, capacity), {"WIDTH": WIDTH, "num_warps": max(1, WIDTH // 512)}, {}


_launch_choose = Launcher(_decode_choose_kernel, _choose_plan)


def choose(logits, ids, lengths, said):
    """Writes the tokens of logits [B, V] to ids [B] and to said[b, lengths[b]], and advances lengths [B]."""
    _launch_choose((logits, ids, lengths, said), *logits.shape, said.shape[1])
