"""Weights as the decode kernels read them: [out, in], in the model's dtype or in int8, each kind layer behind layer.

In int8 each output has a scale of its own, the largest magnitude of its weights over 127, and a weight is the nearest
multiple of it: off by at most half a scale. The kernels sum the integers times the activations in fp32 and multiply
once, so that the only error that int8 brings is that of the rounded weights.
"""

from typing import NamedTuple

import torch

WEIGHTS = ("model", "int8")
LARGEST = 127
ALIGN = 16  # elements, of which each matrix and vector begins at a multiple: the addresses are multiples of 16 bytes


class Packed(NamedTuple):
    """A matrix: weight [N, K] in the model's dtype, or in int8 with scale [N] fp32."""

    weight: torch.Tensor
    scale: torch.Tensor | None = None

    def write(self, weight):
        """Packs weight [N, K], a view of any strides, into this memory."""
        if self.scale is None:
            self.weight.copy_(weight)
            return
        integers, scale = to_int8(weight)
        self.weight.copy_(integers)
        self.scale.copy_(scale)


def pack(weight, weights="model"):
    """Packed memory for weight [N, K], a view of any strides, and what it holds. weights: "model" or "int8"."""
    if weights == "model":
        packed = Packed(weight.new_empty(weight.shape))
    elif weights == "int8":
        scale = weight.new_empty(len(weight), dtype=torch.float32)
        packed = Packed(weight.new_empty(weight.shape, dtype=torch.int8), scale)
    else:
        raise ValueError(f"pack: weights is {weights!r}; it must be {' or '.join(map(repr, WEIGHTS))}")
    packed.write(weight)
    return packed


class Stack:
    """The matrices [N, K] of one kind, of L layers: weight [L, >= N K] and, in int8, scale [L, >= N]; aligned."""

    def __init__(self, L, N, K, dtype, device, weights):
        self.shape = N, K
        in_int8 = weights == "int8"
        self.weight = _aligned(L, N * K, torch.int8 if in_int8 else dtype, device)
        self.scale = _aligned(L, N, torch.float32, device) if in_int8 else None

    def layer(self, i):
        """Layer i's matrix, a view."""
        N, K = self.shape
        return Packed(self.weight[i, : N * K].view(N, K), None if self.scale is None else self.scale[i, :N])


class Weights:
    """All that a decode step reads of a model but its embeddings: for L layers of width C and inner width N.

    qkv, out, fc and proj are Stacks; their biases, and ln_1 and ln_2 [L, 2, >= C], weight and bias, lie as those do, in
    the model's dtype. ln_f [1, 2, >= C]. head: a Packed [V, C], the model's own where that has the form that is read.
    """

    def __init__(self, L, C, N, head, weights):
        if weights not in WEIGHTS:
            raise ValueError(f"pack: weights is {weights!r}; it must be {' or '.join(map(repr, WEIGHTS))}")
        dtype, device = head.dtype, head.device
        self.L, self.C = L, C
        shapes = {"qkv": (3 * C, C), "out": (C, C), "fc": (N, C), "proj": (C, N)}
        self.stacks = {name: Stack(L, *shape, dtype, device, weights) for name, shape in shapes.items()}
        self.biases = {name: _aligned(L, shape[0], dtype, device) for name, shape in shapes.items()}
        self.ln_1, self.ln_2, self.ln_f = (_aligned(2 * n, C, dtype, device).unflatten(0, (n, 2)) for n in (L, L, 1))
        self.head = Packed(head) if weights == "model" else pack(head, weights)

    @property
    def layers(self):
        """For each layer (ln_1, qkv, out, ln_2, fc, proj) as decode_step takes them, views."""
        return [tuple(map(self._part, ("ln_1", "qkv", "out", "ln_2", "fc", "proj"), [i] * 6)) for i in range(self.L)]

    def _part(self, name, i):
        if name.startswith("ln"):
            return tuple(getattr(self, name)[i, :, : self.C])
        return self.stacks[name].layer(i), self.biases[name][i, : self.stacks[name].shape[0]]

    @property
    def final_norm(self):
        return tuple(self.ln_f[0, :, : self.C])

    def write(self, layers, final_norm, head):
        """Packs these, in the form of `layers` but with matrices [N, K] of any strides, into this memory."""
        for i, parts in enumerate(layers):
            for name, (matrix, _) in zip(("qkv", "out", "fc", "proj"), (*parts[1:3], *parts[4:])):
                self.stacks[name].layer(i).write(matrix)
        by_kind = list(zip(*layers))
        for held, norms in ((self.ln_1, by_kind[0]), (self.ln_2, by_kind[3]), (self.ln_f, [final_norm])):
            held[..., : self.C].copy_(torch.stack([torch.stack(pair) for pair in norms]))
        for name, pairs in zip(("qkv", "out", "fc", "proj"), (*by_kind[1:3], *by_kind[4:])):
            self.biases[name][:, : self.stacks[name].shape[0]].copy_(torch.stack([bias for _, bias in pairs]))
        if self.head.scale is not None:
            self.head.write(head)


def _aligned(count, size, dtype, device):
    """Memory [count, >= size], zero, in which each of `count` begins at a multiple of ALIGN elements."""
    return torch.zeros(count, -(-size // ALIGN) * ALIGN, dtype=dtype, device=device)


def to_int8(weight):
    """weight [N, K] as integers [N, K] int8 and scale [N] fp32. A row with NaN or infinity has such a scale too."""
    weight = weight.float()
    scale = weight.abs().amax(1) / LARGEST  # [N]
    integers = (weight / scale.where(scale > 0, 1.0)[:, None]).round()
    return integers.nan_to_num(0.0).clamp(-LARGEST, LARGEST).to(torch.int8), scale


def from_int8(integers, scale):
    """The weights [N, K] fp32 that they stand for."""
    return integers.float() * scale[:, None]
