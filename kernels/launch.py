"""Launching a kernel for the price of a dictionary look-up: what a call needs is worked out once and remembered.

Triton binds, specialises and looks up every argument at every launch, which takes the host longer than a small kernel
takes the device. A Launcher does that once for each key. The danger is a key that forgets something:

- whatever a launch depends on beside its tensors is given to plan(*key), and plan may use nothing else but the chip, so
  that the key is complete by construction. (configs.py is part of the program; what changes its table calls forget.)
- of the tensors the key holds device, dtype and which are None. Triton also compiles for a pointer's alignment: only
  launches whose pointers are all multiples of 16 are remembered, any other goes through Triton itself.
- so does a launch of tensors on several devices, and every launch while somebody watches launches (hooks, debug,
  instrumentation) or kernels are interpreted.
"""

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime import driver

from kernels.library import INTERPRETED

MOST = 1024  # entries that a Launcher remembers; a program whose sizes change with every call starts again there

_memories = []
_runtime, _compilation = triton.knobs.runtime, triton.knobs.compilation


def forget():
    """Drops all that is remembered; whoever changes configs.py's tables in a running process calls it."""
    for known in _memories:
        known.clear()


def forgotten(known):
    """The dictionary `known`, which forget() empties from now on."""
    _memories.append(known)
    return known


def watched():
    """Whether hooks or settings are in force that Triton applies launch by launch, whatever the kernel."""
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    return bool(
        getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
        or _runtime.debug
        or _compilation.instrumentation_mode
        or _runtime.add_stages_inspection_hook
    )


class Launcher:
    """Launches a @triton.jit kernel: launcher(tensors, *key), tensors being its pointers in their order, some None.

    plan(*key) gives (grid, numbers, options, offsets): the grid; the arguments behind the pointers; the constexprs and
    the compiler's options by name; {index of a pointer: offset in elements along its tensor's last axis}. A fifth value
    may follow, {index of a pointer: what makes of a tensor, or of a Place, the descriptor that the kernel takes there}.
    key holds hashable values, each of one type at its place (1, 1.0 and True are equal as keys, but not for Triton).
    A call returns the device and what was remembered of its launch, or None where it went through Triton.
    """

    def __init__(self, kernel, plan):
        self.kernel, self.plan, self.known = kernel, plan, forgotten({})

    def __call__(self, tensors, *key):
        if INTERPRETED:
            return self._through_triton(tensors, key, None)
        active = driver.active
        device, index = active.get_current_device(), tensors[0].get_device()
        if index >= 0 and index != device:
            with torch.cuda.device(index):
                return self(tensors, *key)
        bits, elsewhere, pointers, dtypes = 0, 0, [], []
        for tensor in tensors:
            if tensor is None:
                pointers.append(None)
                dtypes.append(None)
            else:
                pointer = tensor.data_ptr()
                bits |= pointer
                elsewhere |= tensor.get_device() ^ index
                pointers.append(pointer)
                dtypes.append(tensor.dtype)
        full_key = (device, index, *dtypes, key)
        if bits & 15 or elsewhere or self.kernel.pre_run_hooks or watched():
            return self._through_triton(tensors, key, None)
        launch = self.known.get(full_key)
        if launch is None:
            return self._through_triton(tensors, key, full_key)
        _run(launch, tensors, pointers, active.get_current_stream(device))
        return device, launch

    def _through_triton(self, tensors, key, full_key):
        """What it launches is remembered under full_key, unless that is None."""
        grid, numbers, options, offsets, *descriptors = self.plan(*key)
        descriptors = tuple(descriptors[0].items()) if descriptors else ()
        pointers = _views(tensors, offsets)
        for i, describe in descriptors:
            pointers[i] = describe(pointers[i])
        compiled = self.kernel[grid](*pointers, *numbers, **options)
        if full_key is None or not isinstance(compiled, CompiledKernel):
            return
        if len(self.known) >= MOST:
            self.known.clear()
        names = self.kernel.arg_names[len(tensors) + len(numbers) :]
        self.known[full_key] = (
            compiled.run,
            compiled.function,
            compiled.packed_metadata,
            *(*grid, 1, 1)[:3],
            [(i, offset * tensors[i].element_size()) for i, offset in offsets.items()],
            (*numbers, *(options[name] for name in names)),
            # The simulator takes tensors, whose bounds it checks; a GPU takes addresses.
            offsets if getattr(driver.active, "takes_tensors", False) else None,
            descriptors,
        )


def here():
    """(device, stream) of the launches that this thread makes next, or None while somebody watches launches.

    Asking takes the host a tenth of a launch: a list of launches asks once, and hands it to each Bound.
    """
    if INTERPRETED or watched():
        return None
    active = driver.active
    device = active.get_current_device()
    return device, active.get_current_stream(device)


class Bound:
    """launcher(tensors, *key) of one key, for tensors that have their device, dtypes and absences in common.

    The caller vouches for that: they are not looked at again. bound(here(), *tensors) is launcher(tensors, *key)
    wherever the launch is not remembered, an address is not a multiple of 16, or somebody watches. It outlives no
    forget().
    """

    __slots__ = ("kernel", "key", "known", "launcher")

    def __init__(self, launcher, *key):
        self.launcher, self.kernel, self.key, self.known = launcher, launcher.kernel, key, _NOTHING

    def __call__(self, place, *tensors):
        pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        bits = 0
        for pointer in pointers:
            if pointer:
                bits |= pointer
        device, launch = self.known
        if place is None or bits & 15 or place[0] != device or self.kernel.pre_run_hooks:
            self.known = self.launcher(tensors, *self.key) or _NOTHING
        else:
            _run(launch, tensors, pointers, place[1])


_NOTHING = (None, None)


def _run(launch, tensors, pointers, stream):
    run, function, metadata, x, y, z, byte_offsets, rest, offsets, descriptors = launch
    if offsets is not None:
        pointers = _views(tensors, offsets)
    else:
        for i, offset in byte_offsets:
            pointers[i] += offset
    for i, describe in descriptors:
        pointers[i] = describe(pointers[i] if offsets is not None else Place(pointers[i]))
    run(x, y, z, stream, function, metadata, None, None, None, *pointers, *rest)


class Place:
    """An address where a descriptor wants a tensor."""

    __slots__ = ("address",)

    def __init__(self, address):
        self.address = address

    def data_ptr(self):
        return self.address


def _views(tensors, offsets):
    """The tensors, each from its offset on."""
    return [t[..., offsets[i] :] if i in offsets else t for i, t in enumerate(tensors)]
