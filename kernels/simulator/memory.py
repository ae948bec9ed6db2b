"""Global memory with red zones, the shared memory of a batch of blocks, and what each thread has alone."""

import ctypes

import numpy as np

from .errors import Misaligned, OutOfBounds
from .operands import POISON, SHARED_BASE

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def _rows(memory, size, count):
    """The bytes as a table whose rows hold `count` elements of `size` bytes: one row per aligned vector access."""
    return memory.view(_UNSIGNED[size]).reshape(-1, count)


class GlobalMemory:
    """The storages of all tensors of a launch, copied side by side with red zones between them.

    Tensors that share a storage share it here too, so views and in-place updates behave as on a device. An access is
    checked against storages, not tensors: strides may lead a kernel anywhere within one.
    """

    BASE = 0x7F0000000000
    _RED_ZONE = 4096
    _ALIGNMENT = 256  # what a device allocator guarantees

    def __init__(self, tensors, tables=()):
        """tensors: {argument name: torch tensor on the CPU}. tables: {name: bytes} of the module itself."""
        self._storages, self.names, starts = [], [], {}
        at = self._RED_ZONE
        for name, tensor in tensors.items():
            storage = tensor.untyped_storage()
            key = storage.data_ptr()
            if key in starts and storage.nbytes():
                self.names[starts[key][0]] += f", {name}"
                continue
            # Keep the storage's own misalignment, if it has one, so that hints about alignment are judged truly.
            begin = at + key % 16
            starts[key] = (len(self._storages), begin)
            self._storages.append((storage, begin))
            self.names.append(name)
            at = -(-(begin + storage.nbytes() + self._RED_ZONE) // self._ALIGNMENT) * self._ALIGNMENT
        self._starts = starts
        ranges = [(begin, begin + storage.nbytes()) for storage, begin in self._storages]
        self.tables = {}  # name -> device address
        for name, content in dict(tables).items():
            self.names.append(name)
            self.tables[name] = self.BASE + at
            ranges.append((at, at + len(content)))
            at = -(-(at + len(content) + self._RED_ZONE) // self._ALIGNMENT) * self._ALIGNMENT
        self.bytes = np.full(at, POISON, np.uint8)
        self.begin, self.end = np.array(ranges or [(0, 0)], np.int64).T.copy()
        for storage, begin in self._storages:
            self.bytes[begin : begin + storage.nbytes()] = _host_bytes(storage)
        for name, content in dict(tables).items():
            begin = self.tables[name] - self.BASE
            self.bytes[begin : begin + len(content)] = np.frombuffer(content, np.uint8)

    def address(self, tensor):
        """The device address of a tensor's first element."""
        key = tensor.untyped_storage().data_ptr()
        return self.BASE + self._starts[key][1] + tensor.data_ptr() - key

    @property
    def storages(self):
        """[(storage of the host's, its offset here)]"""
        return self._storages

    def layout(self):
        """Where storages lie, without what they hold: see Layout."""
        return Layout({key: begin for key, (_, begin) in self._starts.items()})

    def write_back(self):
        """Copies every storage back to its tensors."""
        for storage, begin in self._storages:
            _host_bytes(storage)[:] = self.bytes[begin : begin + storage.nbytes()]

    def storage_of(self, address):
        """The number of the storage that the address lies in, None outside all."""
        offset = address - self.BASE
        at = int(np.searchsorted(self.begin, offset, "right")) - 1
        return at if at >= 0 and offset < self.end[at] else None

    def locate(self, team, addresses, size, threads=None, alignment=None):
        """Byte offsets of the accesses `addresses` (uint64, one per active thread), each checked. Raises KernelError.

        threads: the team's indices of the threads that access, or None where all do. alignment: `size` unless given.
        """
        alignment = alignment or size
        offsets = (addresses - np.uint64(self.BASE)).view(np.int64)
        if alignment > 1:
            odd = offsets & (alignment - 1)
            if np.count_nonzero(odd):
                at = int(np.flatnonzero(odd)[0])
                raise team.fault(
                    Misaligned, f"misaligned {alignment}-byte access to global memory at {self.describe(offsets[at])}",
                    at, threads, address=int(addresses[at]), tensor=self._nearest(offsets[at])[0],
                )  # fmt: skip
        first, last = int(offsets.min()), int(offsets.max()) + size
        inside = np.searchsorted(self.begin, first, "right") - 1
        if inside < 0 or last > self.end[inside]:
            home = np.searchsorted(self.begin, offsets, "right") - 1
            bad = (home < 0) | (offsets + size > self.end[np.maximum(home, 0)])
            if bad.any():
                at = int(np.flatnonzero(bad)[0])
                raise team.fault(
                    OutOfBounds, f"out-of-bounds {size}-byte access to global memory at {self.describe(offsets[at])}"
                    f", {int(bad.sum())} threads in all",
                    at, threads, address=int(addresses[at]), tensor=self._nearest(offsets[at])[0],
                )  # fmt: skip
        return offsets

    def _nearest(self, offset):
        """The storage closest to an offset: its name and the distance in bytes from its begin and from its end."""
        if not self.names:
            return None, 0, 0
        gap = np.maximum(np.maximum(self.begin - offset, offset - self.end + 1), 0)
        i = int(gap.argmin())
        return self.names[i], int(offset - self.begin[i]), int(offset - self.end[i])

    def describe(self, offset):
        """An offset in words: its address, and where in which tensor it lies."""
        name, after_begin, after_end = self._nearest(offset)
        address = f"{int(offset) + self.BASE:#x}"
        if name is None:
            return f"{address}; the kernel has no tensor"
        if after_begin < 0:
            return f"{address}, {-after_begin} bytes before {name}"
        if after_end >= 0:
            return f"{address}, {after_end} bytes past the end of {name}"
        return f"{address}, byte {after_begin} of {name}"

    def load(self, offsets, size, count):
        """(accesses, count) array of `size`-byte elements."""
        return _rows(self.bytes, size, count)[offsets // (size * count)]

    def store(self, offsets, values, size, count):
        _rows(self.bytes, size, count)[offsets // (size * count)] = values


class Layout:
    """The offsets of a GlobalMemory's storages, by their addresses on the host."""

    def __init__(self, begins):
        self._begins = begins

    def begin_of(self, storage):
        """The offset of a storage of the host's, None where it was not there."""
        return self._begins.get(storage.data_ptr())


def _host_bytes(storage):
    return np.frombuffer((ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr()), np.uint8)


class SharedMemory:
    """The shared memory of a batch of blocks, side by side. Offsets are into the whole, addresses into a block's."""

    def __init__(self, blocks, size):
        self.size = size
        self.stride = -(-max(size, 1) // 1024) * 1024
        self.bytes = np.full(blocks * self.stride, POISON, np.uint8)

    def locate(self, team, addresses, size, threads=None):
        """Byte offsets of the accesses at `addresses` (one per active thread), each checked. Raises KernelError."""
        local = addresses.astype(np.int64) - SHARED_BASE
        if size > 1 and (local & (size - 1)).any():
            at = int(np.flatnonzero(local & (size - 1))[0])
            what = f"misaligned {size}-byte access to shared memory at byte {int(local[at])}"
            raise team.fault(Misaligned, what, at, threads, address=int(addresses[at]))
        if local.min() < 0 or local.max() + size > self.size:
            at = int(np.flatnonzero((local < 0) | (local + size > self.size))[0])
            what = f"out-of-bounds {size}-byte access to shared memory at byte {int(local[at])} of {self.size}"
            raise team.fault(OutOfBounds, what, at, threads, address=int(addresses[at]))
        bases = team.shared_base
        return local + (bases if threads is None else bases[threads])

    def load(self, offsets, size, count):
        return _rows(self.bytes, size, count)[offsets // (size * count)]

    def store(self, offsets, values, size, count):
        _rows(self.bytes, size, count)[offsets // (size * count)] = values


class LocalMemory:
    """What each thread of a batch has for itself, side by side: arrays that it indexes, which no other can see."""

    def __init__(self, threads, size):
        self.size = size
        self.bytes = np.full(threads * size, POISON, np.uint8)

    def locate(self, team, addresses, size, threads=None):
        """Byte offsets of the accesses at `addresses` (one per active thread), each checked. Raises KernelError."""
        own = addresses.view(f"i{addresses.dtype.itemsize}").astype(np.int64) - SHARED_BASE
        for kind, bad, what in (
            (OutOfBounds, (own < 0) | (own + size > self.size), "out-of-bounds"),
            (Misaligned, own % size != 0, "misaligned"),
        ):
            if bad.any():
                at = int(np.flatnonzero(bad)[0])
                words = f"{what} {size}-byte access to local memory at byte {int(own[at])} of {self.size}"
                raise team.fault(kind, words, at, threads, address=int(addresses[at]))
        number = team.thread if threads is None else team.thread[threads]
        return number * self.size + own

    def load(self, offsets, size, count):
        """(accesses, count) array of `size`-byte elements."""
        return _rows(self.bytes, size, count)[offsets // (size * count)]

    def store(self, offsets, values, size, count):
        _rows(self.bytes, size, count)[offsets // (size * count)] = values
