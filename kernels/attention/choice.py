"""Which kernels compute attention: those of every chip, or Hopper's. By a table and the call, never by a failed try."""

import torch
from triton.runtime import driver

from kernels.attention import backward, forward, hopper, hopper_backward, hopper_one_pass
from kernels.configs import HOPPER_CHOSEN
from kernels.launch import MOST, Bound, forgotten
from kernels.library import INTERPRETED

KERNELS = ("auto", "portable", "hopper")

_known = forgotten({})  # what Hopper's kernels do not support of a call, by all that this depends on


def uses_hopper(function, direction, kernel, tensors, head_dim, options):
    """Whether Hopper's kernels compute the "forward" or the "backward" of these tensors.

    "hopper" asks for them: ValueError with the reason where they cannot. "auto" takes them where they can and
    configs.py's table, which goes by the head dim, says that they are faster. A row's bits depend on the choice, so it
    depends on nothing but the kind of call: not on sizes, and of addresses only on whether 16 divides them.
    """
    if kernel == "portable" or (kernel == "auto" and head_dim not in HOPPER_CHOSEN[direction]):
        return False
    padded = options.kv_start is not None or options.kv_end is not None
    reason = _refusal(tensors, head_dim, padded, options.seed is not None)
    if reason is not None and kernel == "hopper":
        raise ValueError(f"{function}: kernel='hopper' does not support {reason}; kernel='portable' does")
    return reason is None


def uses_one_pass(function, kernel, deterministic, tensors, head_dim, T_q, options):
    """Whether the one-pass backward computes the gradients; ValueError, forward already, where it cannot be had."""
    if deterministic:
        return False
    padded = options.kv_start is not None or options.kv_end is not None
    if kernel == "portable":
        reason = "kernel='portable'"
    else:
        reason = _refusal(tensors, head_dim, padded, options.seed is not None) or hopper_one_pass.refusal(head_dim)
    if reason is not None:
        raise ValueError(f"{function}: deterministic=False does not support {reason}; deterministic=True does")
    return T_q >= hopper_one_pass.LEAST_QUERIES


def _refusal(tensors, head_dim, padded, dropout):
    if INTERPRETED:
        return hopper.refusal(tensors[0].dtype, head_dim, padded, dropout)
    index, device = tensors[0].get_device(), driver.active.get_current_device()
    if index >= 0 and index != device:
        with torch.cuda.device(index):
            return _refusal(tensors, head_dim, padded, dropout)
    bits, key = 0, [device, tensors[0].dtype, head_dim, padded, dropout]
    for tensor in tensors:
        bits |= tensor.data_ptr()
        key += (tensor.shape, tensor.stride())
    key = tuple(key)
    reason = _known.get(key, _known)
    if reason is _known:
        reason = hopper.refusal(*key[1:5]) or hopper.strides_refusal(tensors)
        if len(_known) >= MOST:
            _known.clear()
        _known[key] = reason
    if reason is None and bits & 15:
        place = next(tensor.data_ptr() for tensor in tensors if tensor.data_ptr() & 15)
        reason = f"a tensor at {place:#x}: 16-byte alignment is required"
    return reason


def launch_forward(kernel, deterministic, q, k, v, options):
    """o [B, H, T_q, D] in memory order [B, T_q, H, D], and lse [B, H, T_q], fp32, in units of log2."""
    uses_one_pass("flash_attention", kernel, deterministic, (q, k, v), q.shape[3], q.shape[2], options)
    is_hopper = uses_hopper("flash_attention", "forward", kernel, (q, k, v), q.shape[3], options)
    launch = hopper._launch_hopper_forward if is_hopper else forward._launch_attention_forward
    return launch(q, k, v, options)


def launch_packed_forward(kernel, deterministic, qkv, num_heads, options):
    """o [B, T, C], and lse [B, H, T], fp32, in units of log2, from qkv [B, T, 3C]."""
    head_dim = qkv.shape[2] // (3 * num_heads)
    uses_one_pass("flash_attention_packed", kernel, deterministic, (qkv,), head_dim, qkv.shape[1], options)
    is_hopper = uses_hopper("flash_attention_packed", "forward", kernel, (qkv,), head_dim, options)
    return (hopper._launch_packed_hopper if is_hopper else forward._launch_packed_forward)(qkv, num_heads, options)


def launch_backward(kernel, deterministic, do, q, k, v, o, lse, dq, dk, dv, options):
    """Writes dq, dk and dv, which have the shapes of q, k and v and strides of their own."""
    tensors = q, k, v, o, dq, dk, dv
    if uses_one_pass("flash_attention", kernel, deterministic, tensors, q.shape[3], q.shape[2], options):
        hopper_one_pass._launch_one_pass_backward(_as_copied(do), q, k, v, o, lse, dq, dk, dv, options)
    elif uses_hopper("flash_attention", "backward", kernel, tensors, q.shape[3], options):
        do = _as_copied(do)
        hopper_backward._launch_hopper_backward(do, q, k, v, o, lse, dq, dk, dv, options)
    else:
        backward._launch_attention_backward(do, q, k, v, o, lse, dq, dk, dv, options)


def launch_packed_backward(kernel, deterministic, do, qkv, o, lse, num_heads, options):
    """dqkv [B, T, 3C], contiguous."""
    head_dim = qkv.shape[2] // (3 * num_heads)
    tensors = qkv, o
    if uses_one_pass("flash_attention_packed", kernel, deterministic, tensors, head_dim, qkv.shape[1], options):
        do = _as_copied(do)
        return hopper_one_pass._launch_packed_one_pass_backward(do, qkv, o, lse, num_heads, options)
    if uses_hopper("flash_attention_packed", "backward", kernel, (qkv, o), head_dim, options):
        return hopper_backward._launch_packed_hopper_backward(_as_copied(do), qkv, o, lse, num_heads, options)
    return backward._launch_packed_backward(do, qkv, o, lse, num_heads, options)


def _as_copied(do):
    """The gradient, whose memory is nobody's choice, as the copy engine can read it."""
    strides = [step for size, step in zip(do.shape[:-1], do.stride()) if size > 1]
    fits = do.data_ptr() % 16 == 0 and all(step > 0 and step % 8 == 0 for step in strides)
    return do if fits else do.clone(memory_format=torch.contiguous_format)


class PackedAttention:
    """flash_attention_packed, causal, for contiguous qkv [B, T, 3C] of one dtype on one device, each launch Bound.

    padded: whether kv_start or kv_end is given. Tensors are torch's own, at multiples of 16 bytes.
    partial: the shapes [K, P, N], one behind the other from partial_at on, of what backward leaves in its scratch for
    kernels/rows.py to add up: the gradient of the projection's bias.
    """

    def __init__(self, B, T, C, num_heads, dtype, scale, dropout_p, padded):
        D = C // num_heads
        self.size = num_heads, T
        qkv, rows = (3 * T * C, 3 * C, 1), (T * C, C, 1)  # strides
        can = hopper.refusal(dtype, D, padded, dropout_p != 0.0) is None
        portable = num_heads, dtype, dropout_p != 0.0, scale, True, dropout_p
        gluon = num_heads, dtype, scale, True, False
        self.forward_is_hopper = can and D in HOPPER_CHOSEN["forward"]
        self.backward_is_hopper = can and D in HOPPER_CHOSEN["backward"]
        module, options = (hopper, gluon) if self.forward_is_hopper else (forward, portable)
        self._forward = Bound(module._launch_packed, (B, T, 3 * C), qkv, *options)
        if self.backward_is_hopper:
            handed = hopper_backward.stats_size(B, num_heads, T)
            dq_rows, dkdv_rows = hopper_backward.partial_rows(D, T)
        else:
            handed = B * num_heads * T
            dq_rows, dkdv_rows = backward.partial_rows(dtype, D, T, dropout_p != 0.0)
        self.partial = (1, B * dq_rows, C), (1, B * dkdv_rows, 2 * C)
        self.partial_at = -(-handed // 4) * 4  # a multiple of 16 bytes
        module, options = (hopper_backward, gluon) if self.backward_is_hopper else (backward, portable)
        dkdv_at = self.partial_at + B * dq_rows * C
        self._dq = Bound(module._launch_packed_dq, (B, T, 3 * C), qkv, rows, rows, *options, self.partial_at)
        self._dkdv = Bound(module._launch_packed_dkdv, (B, T, 3 * C), qkv, rows, rows, *options, dkdv_at)

    def forward(self, place, qkv, o, lse, kv_start, kv_end, seed):
        """Writes o [B, T, C], and lse [B, H, T] at the beginning of a tensor."""
        if self.forward_is_hopper:
            self._forward(place, qkv, qkv, qkv, o, lse, None)
        else:
            self._forward(place, qkv, qkv, qkv, o, lse, kv_start, kv_end, None, seed)

    def backward(self, place, do, qkv, o, lse, scratch, kv_start, kv_end, seed):
        """dqkv [B, T, 3C]. scratch: fp32, overwritten to the end of the partial sums."""
        dqkv = torch.empty_like(qkv)
        if self.backward_is_hopper:
            self._dq(place, qkv, qkv, qkv, do, o, do, dqkv, lse, scratch, None, scratch)
            self._dkdv(place, qkv, qkv, qkv, do, dqkv, dqkv, scratch, None, scratch)
        else:
            tail = lse, scratch, kv_start, kv_end, None, seed, scratch
            self._dq(place, qkv, qkv, qkv, o, do, dqkv, *tail)
            self._dkdv(place, qkv, qkv, qkv, do, dqkv, dqkv, *tail)
        return dqkv
