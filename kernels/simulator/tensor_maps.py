"""Tensor maps: what the host tells the copy engine (TMA) of a tensor, and where the bytes of a box lie on either side.

PTX ISA, "Tensors" and "Swizzling Modes"; CUDA driver API, cuTensorMapEncodeTiled. Axes are in the host's order, the
innermost last.
"""

from dataclasses import dataclass, replace

import numpy as np

from .errors import KernelError, Unimplemented

CHUNK = 16  # bytes: swizzles move pieces of this size
_SPANS = {0: 0, 1: 32, 2: 64, 3: 128}  # bytes of a row over which the driver's swizzle modes permute chunks


_KINDS = {"torch.float32": "f32", "torch.float16": "f16", "torch.bfloat16": "bf16", "torch.int32": "s32"}


@dataclass(frozen=True)
class TensorMap:
    """One descriptor. `tensor` becomes `address` when a launch places it; strides in bytes; box in elements."""

    tensor: object
    shape: tuple
    strides: tuple
    box: tuple
    element: int
    span: int  # of the swizzle; 0: none
    address: int = 0
    kind: str = "b8"  # the PTX type of an element, where it is one that can be added

    @classmethod
    def of(cls, descriptor, metadata):
        """From Triton's host-side descriptor and what its compiler says of that argument."""
        element = metadata["elem_size"]
        if metadata["fp4_padded"] or descriptor.padding != "zero" or getattr(descriptor, "round_f32_to_tf32", False):
            raise Unimplemented("tensor descriptors that pad with NaN, round to tf32 or hold fp4")
        strides = tuple(int(step) * element for step in descriptor.strides)
        box = tuple(metadata["block_size"])
        shape, span = tuple(map(int, descriptor.shape)), _SPANS[metadata["swizzle"]]
        kind = _KINDS.get(str(descriptor.base.dtype), "b8")
        made = cls(descriptor.base, shape, strides, box, element, span, kind=kind)
        made.check()
        return made

    def check(self):
        """What the driver refuses."""
        if any(step <= 0 or step % 16 or step >= 1 << 40 for step in self.strides[:-1]):
            raise KernelError(f"tensor map: strides {self.strides} bytes; positive multiples of 16 are required")
        if self.strides[-1] != self.element or any(not 0 < size <= 256 for size in self.box):
            raise KernelError(f"tensor map: box {self.box}, innermost stride {self.strides[-1]} bytes")
        if self.row_bytes % CHUNK or (self.span and self.row_bytes != self.span):
            raise Unimplemented(f"a box whose rows have {self.row_bytes} bytes, with a swizzle of {self.span}")

    def placed(self, address):
        if address % 16:
            raise KernelError(f"tensor map: address {address:#x}; a multiple of 16 is required")
        return replace(self, tensor=None, address=address)

    @property
    def row_bytes(self):
        return self.box[-1] * self.element

    @property
    def bytes(self):
        return int(np.prod(self.box)) * self.element

    def source(self, coordinates):
        """(addresses of the box's 16-byte chunks, which of them lie in the tensor). coordinates: innermost last."""
        inside, address = np.ones(1, bool), np.full(1, self.address, np.int64)
        for first, size, extent, step in zip(coordinates[:-1], self.box[:-1], self.shape[:-1], self.strides[:-1]):
            place = int(first) + np.arange(size)
            inside = (inside[:, None] & (place >= 0) & (place < extent)).reshape(-1)
            address = (address[:, None] + place * step).reshape(-1)
        begin = int(coordinates[-1]) * self.element + np.arange(0, self.row_bytes, CHUNK)
        end = self.shape[-1] * self.element
        if ((begin < 0) & (begin > -CHUNK)).any() or ((begin < end) & (begin + CHUNK > end)).any():
            raise Unimplemented("a box whose row ends within 16 bytes of the tensor")
        inside = (inside[:, None] & (begin >= 0) & (begin < end)).reshape(-1)
        return (address[:, None] + begin).reshape(-1), inside

    def destination(self, start):
        """Where the chunks go, in the same order, for a box that begins at byte `start` of shared memory."""
        rows, per_row = self.bytes // self.row_bytes, self.row_bytes // CHUNK
        row, chunk = np.arange(rows)[:, None], np.arange(per_row)[None, :]
        if self.span:
            # Lines of 128 bytes, counted from a multiple of 1024: each permutes its rows' chunks by its own number.
            line = (start + row * self.row_bytes) // 128
            chunk = chunk ^ (line % (self.span // CHUNK))
        return (start + row * self.row_bytes + chunk * CHUNK).reshape(-1)
