"""Counts the bytes of live tensors, on any device: on "meta" what a step would take, without computing it.

It is a count, not a measurement: what an operation allocates inside itself and frees before it returns is not in it,
nor are layouts without a storage of their own (oneDNN's packed weights).
"""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensor storages that operations returned and that are still alive.

    held: tensors that were there before; views of them are not counted.
    """

    def __init__(self, held=()):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {tensor.untyped_storage()._cdata for tensor in held}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage):
        key = storage._cdata
        if key in self.seen:
            return
        self.seen.add(key)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, key, storage.nbytes())

    def forget(self, key, size):
        self.seen.discard(key)
        self.now -= size
