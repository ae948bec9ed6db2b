"""Compiles what the stages of a visit need, on every core, so that no measurement waits for a compiler.

    python bench/compile_ahead.py --stages lengths pointwise

Each bench lists its calls (`ahead`); each call is made once, on the GPU, in one of the worker processes. Triton and
inductor keep what they compiled on disk, where the stages find it: the same call makes the same request.
"""

import importlib
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch

if not __package__:  # run by its path: the checkout is found from there
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.lib.cli import Parser, positive
from bench.lib.clock import attempt
from bench.lib.record import Record
from bench.lib.stages import COMPILED, STAGES

COLUMNS = ("what", "seconds", "status")


def units(commands):
    """[(label, call)] of all commands, (module, arguments) each: what differs first, then what is like it.

    Calls that share kernels share a label. Were they made at once, each would compile the same.
    """
    listed, seen = [], {}
    for module, arguments in commands:
        for label, call in importlib.import_module(module).ahead(arguments):
            seen[label] = seen.get(label, 0) + 1
            listed.append((seen[label], len(listed), label, call))
    return [(label, call) for _, _, label, call in sorted(listed, key=lambda unit: unit[:2])]


_units: list = []  # of this process


def _begin(commands):
    torch.set_num_threads(1)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # the workers are as many as the cores already
    if os.environ.get("BENCH_STAND_IN"):
        from bench.lib import standin

        standin.install()
    _units[:] = units(commands)


def _make(index):
    """(index, seconds, status) of one call."""
    start = time.perf_counter()

    def call():
        _units[index][1]()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the workers share the GPU's memory

    _, status = attempt(call)
    return index, time.perf_counter() - start, status


def parser():
    result = Parser("bench/compile_ahead.py", __doc__, devices=("cuda",))
    known = [stage.name for stage in STAGES if stage.module in COMPILED]
    result.add_argument("--stages", nargs="*", default=known, metavar="STAGE", help=f"of {', '.join(known)}")
    result.add_argument("--workers", type=positive, default=len(os.sched_getaffinity(0)), help="default: the cores")
    return result


def main(argv=None):
    args = parser().parse_args(argv)
    shared = ["--device", "cuda", "--no-charts", "--out", str(args.out), *(["--quick"] if args.quick else [])]
    commands = [
        (stage.module, [*stage.sized(bool(os.environ.get("BENCH_STAND_IN"))), *shared])
        for stage in STAGES
        if stage.name in args.stages and stage.module in COMPILED
    ]
    labels = [label for label, _ in units(commands)]
    workers = min(args.workers, max(1, len(labels)))
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin, initargs=(commands,))
    with Record(args, columns=COLUMNS, charts=False) as record:
        try:
            for future in as_completed([pool.submit(_make, i) for i in range(len(labels))]):
                index, seconds, status = future.result()
                record.add(f"{index}: {labels[index]}", [{"what": labels[index], "seconds": seconds, "status": status}])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


if __name__ == "__main__":
    sys.exit(main())
