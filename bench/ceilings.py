"""What this machine can do at best: a large copy, a large matrix product, the time of a launch.

    python bench/ceilings.py

copy        reads and writes 512 MiB (on a CPU 32), in 10^9 bytes a second.
matmul      a square product of 8192 (on a CPU 512) in each dtype, in TFLOP/s: 2 N^3 operations.
launch      what the host needs to issue one operation on one element (aten), and one of our kernels, in microseconds.
sequence    a hundred such operations in a row, the device's time for each: how short a kernel can usefully be.

What a kernel reaches is to be held against these figures of the same machine in the same run, not against a datasheet.
"""

import sys
from pathlib import Path

import torch

if not __package__:  # run by its path: the checkout is found from there
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.lib.cli import Parser
from bench.lib.clock import TIMES, measure
from bench.lib.lanes import DTYPES
from bench.lib.record import Record
from kernels import gelu

COLUMNS = ("what", "dtype", "size", "value", "unit", "median_ms", "p20_ms", "p80_ms", "host_us", "graph_ms", "status")
COPY_BYTES = {"cuda": 2**29, "cpu": 2**25}
MATMUL_N = {"cuda": 8192, "cpu": 512}
SEQUENCE = 100


def copy_rows(args):
    size = COPY_BYTES[args.device.type]
    x = torch.empty(size, dtype=torch.int8, device=args.device)
    y = torch.empty_like(x)
    return rows_of(args, "copy", "int8", size, lambda: y.copy_(x), lambda ms, _: 2 * size / ms / 1e6, "GB/s")


def matmul_rows(args, dtype):
    N = MATMUL_N[args.device.type]
    a, b = (torch.randn(N, N, device=args.device, dtype=DTYPES[dtype]) for _ in range(2))
    c = torch.empty_like(a)
    call = lambda: torch.mm(a, b, out=c)  # noqa: E731
    return rows_of(args, "matmul", dtype, N, call, lambda ms, _: 2 * N**3 / ms / 1e9, "TFLOP/s")


def launch_rows(args):
    x = torch.zeros(1, device=args.device)
    wide = torch.zeros(1, 768, device=args.device, dtype=torch.float16)

    def sequence():
        for _ in range(SEQUENCE):
            x.add_(1)

    def host_us(ms, host_us):
        return ms * 1e3 if host_us is None else host_us

    rows = rows_of(args, "launch, aten", "float32", 1, lambda: x.add_(1), host_us, "us of the host")
    if args.device.type == "cuda":
        rows += rows_of(args, "launch, our GELU", "float16", 768, lambda: gelu(wide), host_us, "us of the host")
    return rows + rows_of(args, "sequence", "float32", SEQUENCE, sequence, lambda ms, _: ms * 1e3 / SEQUENCE, "us each")


def rows_of(args, what, dtype, size, call, value, unit):
    """The row of one figure; value(ms, host_us) makes it of the median time."""
    timing = measure({what: lambda: call}, args.device, quick=args.quick)[what]
    known = timing["median_ms"] is not None
    figure = value(timing["median_ms"], timing["host_us"]) if known else None
    head = {"what": what, "dtype": dtype, "size": size, "value": figure, "unit": unit}
    return [head | dict.fromkeys(TIMES) | timing | {"lane": "gpu" if args.device.type == "cuda" else "cpu"}]


def main(argv=None):
    args = Parser("bench/ceilings.py", __doc__).parse_args(argv)
    cases = {"copy": (copy_rows, args), "launch": (launch_rows, args)}
    cases |= {f"matmul {dtype}": (matmul_rows, args, dtype) for dtype in DTYPES}
    with Record(args, columns=COLUMNS, title=args.environment["device"], charts=False) as record:
        for case in record.missing(cases, "ceilings"):
            record.add_from(case, *cases[case])


if __name__ == "__main__":
    sys.exit(main())
