"""What a simulated kernel can do wrong. Each error says where: kernel, Python line, instruction, block and thread."""


class SimulatorError(RuntimeError):
    """Base of all errors of the simulator."""


class KernelError(SimulatorError):
    """A fault of the kernel that runs. `describe` fills in the place; fields that do not apply stay None."""

    def __init__(self, what, *, thread=None, block=None, address=None, tensor=None):
        super().__init__(what)
        self.what = what
        self.thread, self.block = thread, block
        self.address, self.tensor = address, tensor
        self.kernel = self.line = self.instruction = None

    def locate(self, kernel, instruction):
        """Adds the kernel and the instruction, once: the innermost caller that knows them wins."""
        if self.instruction is None:
            self.kernel, self.line, self.instruction = kernel.name, kernel.where(instruction), instruction.text
        return self

    def __str__(self):
        place = [] if self.line is None else [f"at {self.line}"]
        if self.block is not None:
            place.append(f"block {tuple(int(i) for i in self.block)}")
        if self.thread is not None:
            place.append(f"thread {int(self.thread)}")
        if self.instruction is not None:
            place.append(f"in `{self.instruction}`")
        return f"{self.kernel or 'kernel'}: {self.what}" + (f" ({', '.join(place)})" if place else "")


class OutOfBounds(KernelError):
    """An access outside every tensor, or outside the block's shared memory."""


class Misaligned(KernelError):
    """An access whose address is no multiple of its size."""


class SharedMemoryRace(KernelError):
    """Two warps touch the same shared memory, one of them writing, with no barrier between."""


class GlobalMemoryRace(KernelError):
    """Two warps touch the same global memory, one of them with an ordinary store, and nothing orders the two."""


class DependentLaunchRace(GlobalMemoryRace):
    """A kernel launched ahead touches, before its wait, what a kernel before it wrote, or writes what that one read."""


class EndlessWait(KernelError):
    """Blocks go on and on: they wait for what nobody will write."""


class GridTooLarge(KernelError):
    """A cooperative grid has more blocks than the chip holds at a time."""


class BarrierDeadlock(KernelError):
    """Threads wait at a barrier that the others of their block never reach."""


class AsyncHazard(KernelError):
    """Asynchronous data, or what an asynchronous instruction still uses, was touched before its wait or fence."""


class Unimplemented(KernelError):
    """An instruction, or a form of one, that the simulator does not know. It never guesses."""
