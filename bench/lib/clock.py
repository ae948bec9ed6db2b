"""The clock: providers timed against each other, interleaved, so that a drifting clock meets all of them.

    timings = measure({name: make for those whose status is OK}, device)

Out-of-memory is the only error that becomes a value. A number that was not measured is None.
"""

import time

import numpy as np
import torch

from bench.lib.gate import OK

OUT_OF_MEMORY = "out of memory"


def attempt(function, *args):
    """(function(*args), OK), or (None, OUT_OF_MEMORY). Any other error is a bug and is raised."""
    try:
        return function(*args), OK
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None, OUT_OF_MEMORY


def _is_out_of_memory(error):
    # The CPU's allocator raises a plain RuntimeError.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


MAX_REPEATS = 200  # of a call in a block


class Clock:
    """Times calls on one device.

    cuda: device events around each call. Before each the L2 cache is overwritten, which also gives the host the time
    to run ahead; where it still cannot keep up, its gaps between launches are part of the time, as they are in a model.
    cpu: the wall clock; caches are as the call before left them.
    """

    def __init__(self, device):
        self.device = torch.device(device)
        if self.device.type == "cuda":
            l2_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size
            self.flush = torch.empty(max(4 * l2_bytes, 2**28), dtype=torch.int8, device=self.device)

    def times(self, call, repeats):
        """`repeats` times of call(), ms."""
        return (self._times_cuda if self.device.type == "cuda" else self._times_cpu)(call, repeats)

    def _times_cuda(self, call, repeats):
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, stop in events:
            self.flush.zero_()
            start.record()
            call()
            stop.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(stop) for start, stop in events]

    def _times_cpu(self, call, repeats):
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
        return times

    def block(self, make, budget_ms, is_warm=False):
        """Times of call = make(), as many as fit the budget, after an untimed call and a trial.

        A call longer than the budget is its own trial, timed once; is_warm: and without the untimed one before it.
        """
        call = make()
        for _ in range(1 if is_warm else 2):
            trial = self.times(call, 1)
        repeats = int(budget_ms / max(trial[0], 1e-3))
        return self.times(call, min(repeats, MAX_REPEATS)) or trial


def measure(makes, device, *, quick=False, clock=None, rounds=5, budget_ms=60.0, limit_s=None, is_warm=False):
    """Times providers against each other: {name: {"median_ms", "p20_ms", "p80_ms", "status"}}.

    makes: {name: make}; make() does what is not timed (the forward pass before a backward) and returns the call that is
    timed, without arguments. Providers take turns in blocks, and what make() built is freed after its block, so that no
    provider's memory counts against another's. One that runs out of memory has None for its times and that status.

    limit_s: after so many seconds no third or later round starts. is_warm: the caller has run each call once, so that
    those longer than budget_ms, the time of a block, need no untimed one.
    """
    clock = Clock(device) if clock is None else clock
    rounds, budget_ms = (2, 20.0) if quick else (rounds, budget_ms)
    times = {name: [] for name in makes}
    statuses = dict.fromkeys(makes, OK)
    start = time.perf_counter()
    for i in range(rounds):
        if i >= 2 and limit_s is not None and time.perf_counter() - start > limit_s:
            break
        for name, make in makes.items():
            if statuses[name] == OK:
                block, statuses[name] = attempt(clock.block, make, budget_ms, is_warm)
                times[name] += block or []
    return {name: summary(times[name] if statuses[name] == OK else []) | {"status": statuses[name]} for name in makes}


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
