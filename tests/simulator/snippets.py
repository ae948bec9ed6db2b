"""Runs a few lines of PTX, so that each instruction can be tested alone."""

import numpy as np
import torch

from kernels.simulator.machine import Launch, Program
from kernels.simulator.memory import GlobalMemory
from kernels.simulator.ptx import TYPES, parse

_PREFIX = {1: "rs", 2: "rs", 4: "r", 8: "rd"}


def module(body, parameters, threads):
    """PTX of a kernel with u64 parameters p0, p1, ...: registers %p, %rs, %r, %rd of 64 each are declared."""
    names = ",\n".join(f".param .u64 p{i}" for i in range(parameters))
    return f"""
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry snippet(
{names}
)
.reqntid {threads}
{{
.reg .pred %p<64>; .reg .b16 %rs<64>; .reg .b32 %r<512>; .reg .b64 %rd<64>;
.loc 1 1 1
{body}
ret;
}}
.file 1 "snippet.py"
"""


def launch(body, tensors, *, threads=32, blocks=1, shared=4096, seed=None, copies_need_fence=True):
    """Runs `body` with the tensors' addresses as parameters; returns the Launch. The tensors are updated in place."""
    memory = GlobalMemory({f"t{i}": tensor for i, tensor in enumerate(tensors)})
    program = Program(parse(module(body, len(tensors), threads)), shared, copies_need_fence)
    schedule = None if seed is None else np.random.default_rng(seed)
    run = Launch(program, (blocks, 1, 1), [memory.address(t) for t in tensors], memory, schedule).run()
    memory.write_back()
    return run


def tensor(values):
    """A numpy array as a torch tensor of bytes."""
    return torch.from_numpy(np.ascontiguousarray(values).view(np.uint8).reshape(-1).copy())


def elementwise(instruction, sources, result):
    """What `instruction` makes of the arrays, one thread per element.

    instruction: with {d} for its destination and {a}, {b}, {c}, ... for its sources. sources: numpy arrays of one
    length; bool arrays become predicates. result: a PTX type. Returns an array of that type's numpy equivalent.
    """
    count = len(sources[0])
    threads = -(-count // 32) * 32
    lines, names = ["mov.u32 %r500, %tid.x;", f"setp.lt.u32 %p60, %r500, {count};"], {}
    for i, values in enumerate(sources):
        size, is_predicate = values.dtype.itemsize, values.dtype == bool
        register = f"%{_PREFIX[size]}{40 + i}"
        lines += [f"ld.param.u64 %rd1, [p{i}];", f"mad.wide.u32 %rd1, %r500, {size}, %rd1;"]
        lines += [f"@%p60 ld.global.b{8 * size} {register}, [%rd1];"]
        names["abcdef"[i]] = register
        if is_predicate:
            lines += [f"setp.ne.u16 %p{40 + i}, {register}, 0;"]
            names["abcdef"[i]] = f"%p{40 + i}"
    dtype = TYPES[result]
    size = dtype.itemsize
    names["d"] = "%p50" if result == "pred" else f"%{_PREFIX[size]}50"
    lines += [instruction.format(**names) + ";"]
    if result == "pred":
        lines += ["selp.b16 %rs50, 1, 0, %p50;"]
    lines += [f"ld.param.u64 %rd1, [p{len(sources)}];", f"mad.wide.u32 %rd1, %r500, {size}, %rd1;"]
    lines += [f"@%p60 st.global.b{8 * size} [%rd1], %{_PREFIX[size]}50;"]
    out = torch.zeros(count * size, dtype=torch.uint8)
    launch("\n".join(lines), [tensor(values) for values in sources] + [out], threads=threads)
    return out.numpy().view(dtype)
