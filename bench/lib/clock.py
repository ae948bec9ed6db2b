"""The clock: providers timed against each other, interleaved, so that a drifting clock meets all of them.

    timings = measure({name: make for those whose status is OK}, device)

A provider's error is its status, in the error's words, and spares the others. A number that was not measured is None.
"""

import time
from typing import NamedTuple

import numpy as np
import torch
import torch._functorch.config

from bench.lib.errors import in_words
from bench.lib.gate import OK

# A backward pass is timed again and again, so what torch.compile makes of one must not give its buffers away.
torch._functorch.config.donated_buffer = False

OUT_OF_MEMORY = "out of memory"
# What measure gives of each provider besides its status.
TIMES = ("median_ms", "p20_ms", "p80_ms", "host_us", "host_behind", "graph_ms", "graph_note")


class DeviceLost(RuntimeError):
    """After an error the GPU answers nothing more in this process: whatever follows would fail for no fault of its own.

    provider: who brought it about, or None. `str` of it is the status of that provider.
    """

    def __init__(self, status, provider=None):
        super().__init__(status)
        self.provider = provider


def attempt(function, *args, provider=None):
    """(function(*args), OK), or (None, the error in a few words). DeviceLost if the GPU does not survive the error."""
    try:
        return function(*args), OK
    except DeviceLost:
        raise
    except Exception as error:
        status = OUT_OF_MEMORY if _is_out_of_memory(error) else in_words(error)
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            raise DeviceLost(status, provider) from None
    return None, status


def _is_out_of_memory(error):
    # The CPU's allocator raises a plain RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


MAX_REPEATS = 100  # of a call in a block
BUDGET_MS = {"cuda": 30.0, "cpu": 60.0}  # of a block
BUFFER_BYTES = 2**28  # at least, of what is read between calls
CYCLES_PER_US = 2000  # no GPU's clock is faster: a spin takes at least the time that it is meant to take
MAX_SPIN_US = 5000.0
GRAPH_BELOW_MS = 1.0  # longer calls hide their launches


class Block(NamedTuple):
    """What one turn of a provider gave: times in ms, the least host time of a call, the share that outran the host."""

    times: list
    host_us: float | None = None
    behind: float = 0.0


class Clock:
    """Times calls on one device.

    cuda: device events around each call, and before each a read of a buffer larger than L2, so that no call finds its
    inputs there. (Were the buffer written, its lines would be written back during the call.) With `ahead` the device
    then spins for as long as the host needs to issue the call, so that no gap between launches is in the time: it is
    the device's own. Without it such gaps count, as they do in a model. Either way host_us says what the host needs.
    cpu: the wall clock; caches are as the call before left them.
    """

    def __init__(self, device, ahead=True):
        self.device, self.ahead = torch.device(device), ahead
        if self.device.type == "cuda":
            l2_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size
            self.buffer = torch.ones(max(4 * l2_bytes, BUFFER_BYTES) // 4, device=self.device)
            self.sink = torch.empty((), device=self.device)

    def times(self, call, repeats, spin_us=0.0):
        """A Block of `repeats` times of call()."""
        if self.device.type == "cuda":
            return self._times_cuda(call, repeats, spin_us)
        return self._times_cpu(call, repeats)

    def _times_cuda(self, call, repeats, spin_us):
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        hosts, behind = [], 0
        torch.cuda.synchronize(self.device)
        for start, stop in events:
            torch.sum(self.buffer, 0, out=self.sink)
            if spin_us:
                torch.cuda._sleep(int(spin_us * CYCLES_PER_US))
            start.record()
            began = time.perf_counter()
            call()
            hosts.append((time.perf_counter() - began) * 1e6)
            stop.record()
            behind += start.query()  # the device has begun before all of the call was issued
        torch.cuda.synchronize(self.device)
        return Block([start.elapsed_time(stop) for start, stop in events], min(hosts, default=None), behind / repeats)

    def _times_cpu(self, call, repeats):
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
        return Block(times)

    def block(self, make, budget_ms, is_warm=False):
        """The Block of call = make(), as many calls as fit the budget, after an untimed one and a trial.

        A call longer than the budget is its own trial, timed once; is_warm: and without the untimed one before it.
        """
        call = make()
        for _ in range(1 if is_warm else 2):
            trial = self.times(call, 1)
        spin_us = min(20 + 1.25 * trial.host_us, MAX_SPIN_US) if self.ahead and trial.host_us is not None else 0.0
        repeats = min(int(budget_ms / max(trial.times[0] + spin_us * 1e-3, 1e-3)), MAX_REPEATS)
        if repeats < 1 and not spin_us:
            return trial
        return self.times(call, max(repeats, 1), spin_us)


def captured(make, device):
    """The replay of a CUDA graph of call = make(). Raises what the call or its capture raises.

    make() too runs on the stream of the capture, since a backward pass goes to the stream of its forward pass.
    """
    current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        call = make()
        for _ in range(2):  # what is made at a first call is made outside of the capture
            call()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        call()
    current.wait_stream(side)
    return graph.replay


def measure(
    makes,
    device,
    *,
    quick=False,
    clock=None,
    rounds=5,
    budget_ms=None,
    limit_s=None,
    is_warm=False,
    ahead=True,
    graphs=True,
):
    """Times providers against each other: {name: {each of TIMES, "status"}}.

    makes: {name: make}; make() does what is not timed (the forward pass before a backward) and returns the call that is
    timed, without arguments. Providers take turns in blocks, and what make() built is freed after its block, so that no
    provider's memory counts against another's. One that fails has None for its times and its error for a status.

    limit_s: after so many seconds no third or later round starts. is_warm: the caller has run each call once, so that
    those longer than budget_ms, the time of a block, need no untimed one. ahead: as Clock has it. On a GPU, `graphs`
    times short calls as CUDA graphs too: graph_ms is the median, graph_note why there is none.
    """
    clock = Clock(device, ahead) if clock is None else clock
    budget_ms = BUDGET_MS[torch.device(device).type] if budget_ms is None else budget_ms
    rounds, budget_ms = (2, 20.0) if quick else (rounds, budget_ms)
    blocks = {name: [] for name in makes}
    statuses = dict.fromkeys(makes, OK)
    start = time.perf_counter()
    for i in range(rounds):
        if i >= 2 and limit_s is not None and time.perf_counter() - start > limit_s:
            break
        for name, make in makes.items():
            if statuses[name] == OK:
                block, statuses[name] = attempt(clock.block, make, budget_ms, is_warm, provider=name)
                blocks[name] += [block] if block else []
    timings = {name: timing(blocks[name] if statuses[name] == OK else []) for name in makes}
    if graphs and torch.device(device).type == "cuda":
        for name, make in makes.items():
            median = timings[name]["median_ms"]
            if median is not None and median < GRAPH_BELOW_MS:
                timings[name] |= _graph_timing(clock, make, device, min(budget_ms, 30.0), name)
    return {name: timings[name] | {"status": statuses[name]} for name in makes}


def _graph_timing(clock, make, device, budget_ms, name):
    replay, status = attempt(captured, make, device, provider=name)
    if status == OK:
        block, status = attempt(clock.block, lambda: replay, budget_ms, provider=name)
    if status != OK:
        return {"graph_ms": None, "graph_note": f"not captured: {status}"}
    return {"graph_ms": float(np.median(block.times)), "graph_note": None}


def timing(blocks):
    """TIMES of a provider's Blocks."""
    hosts = [block.host_us for block in blocks if block.host_us is not None]
    return {
        **summary([time for block in blocks for time in block.times]),
        "host_us": float(np.median(hosts)) if hosts else None,
        "host_behind": float(np.mean([block.behind for block in blocks])) if hosts else None,
        "graph_ms": None,
        "graph_note": None,
    }


def summary(times):
    """The median and the 20th and 80th percentiles of times in ms, or None for each where there are none."""
    median, p20, p80 = np.percentile(times, (50, 20, 80)).tolist() if len(times) else (None, None, None)
    return {"median_ms": median, "p20_ms": p20, "p80_ms": p80}


def peak_memory_mb(call, device):
    """The most memory allocated at once during call() above what was allocated before it, in MB of 2**20 bytes.

    None on a CPU, where it is not measured (and nothing is called).
    """
    if torch.device(device).type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20
