"""What a case is, how it runs in the simulator, and the row that it gives.

A module of this folder registers the cases of one package:

    @case("liger-kernel", "ReLU squared", "7 x 770")
    def relu_squared(randn):
        from liger_kernel.ops.relu_squared import LigerReLUSquaredFunction
        return {"x": randn(7, 770)}, LigerReLUSquaredFunction.apply, lambda x: x.relu() ** 2

The function imports the package, for that may look at the GPU, and returns inputs, their function and the same in plain
PyTorch. Both are called with the inputs in the case's dtype, plain PyTorch in float64 as well, where it is the oracle.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

from bench.lib.gate import OK
from kernels.simulator import KernelError, Unimplemented, simulate
from kernels.simulator.gpu_names import gpu_names

ULPS = 4  # beyond three times plain PyTorch's error, in units in the last place of the largest value


@dataclass(frozen=True)
class Case:
    """One call of somebody else's function, forward and (where `gradients`) backward."""

    package: str
    name: str
    shape: str
    dtype: torch.dtype
    make: object  # make(randn) -> inputs by name, theirs, plain
    gradients: bool

    def __str__(self):
        return f"{self.package}: {self.name}, {self.shape}, {str(self.dtype).removeprefix('torch.')}"


CASES: list[Case] = []


def case(package, name, shape, dtype=torch.bfloat16, gradients=True):
    """Registers make(randn), which returns ({name: input}, theirs, plain)."""

    def register(make):
        CASES.append(Case(package, name, shape, dtype, make, gradients))
        return make

    return register


VERSIONS: dict[str, Callable] = {}  # {what is no installed package: a function that gives its version, or None}


def version_of(package):
    """The installed version, or None."""
    if package in VERSIONS:
        return VERSIONS[package]()
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def results_of(function, inputs, dtype, upstream, gradients):
    """Tensors by name: what function(*inputs in dtype) returns, and the gradients of its floating inputs."""
    floating = [name for name, x in inputs.items() if x.is_floating_point()]
    inputs = {name: x.to(dtype, copy=True) if name in floating else x for name, x in inputs.items()}
    for name in floating if gradients else ():
        inputs[name].requires_grad_()
    outputs = function(*inputs.values())
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    made = {f"output {i}" if len(outputs) > 1 else "output": x.detach() for i, x in enumerate(outputs)}
    if gradients:
        torch.autograd.backward(outputs, [g.to(x.dtype).reshape(x.shape) for g, x in zip(upstream, outputs)])
        made |= {f"d{name}": inputs[name].grad for name in floating}
    return made


def judged(actual, baseline, oracle, eps):
    """The largest error of any result over its largest value, plain PyTorch's error there, and OK or what failed."""
    worst, beside, status = 0.0, 0.0, OK
    for name, exact in oracle.items():
        if actual[name] is None or actual[name].shape != exact.shape:
            return None, None, f"failed: {name} has another shape"
        scale = exact.abs().max().item() or 1.0
        error, plain = ((x[name].double() - exact).abs().max().item() / scale for x in (actual, baseline))
        if not error <= 3 * plain + ULPS * eps:  # NaN too
            status = f"failed: error of {name} is {error:.1e} of its largest value, plain PyTorch's {plain:.1e}"
        if error > worst:
            worst, beside = error, plain
    return worst, beside, status


def _compare(case, randn):
    """What `judged` says of theirs beside plain PyTorch on the case's inputs."""
    inputs, theirs, plain = case.make(randn)
    oracle = results_of(plain, inputs, torch.float64, [], gradients=False)
    upstream = [torch.randn(x.shape).to(case.dtype).double() for x in oracle.values()]
    if case.gradients:
        oracle = results_of(plain, inputs, torch.float64, upstream, gradients=True)
    baseline = results_of(plain, inputs, case.dtype, upstream, case.gradients)
    actual = results_of(theirs, inputs, case.dtype, upstream, case.gradients)
    return judged(actual, baseline, oracle, torch.finfo(case.dtype).eps)


def run_case(case, arch, seed=None):
    """The row of a case on a simulated `arch`; a kernel's fault or an unknown instruction is its status."""
    torch.manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape).to(case.dtype)

    row = {
        "package": case.package,
        "version": version_of(case.package),
        "kernel": case.name,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "gradients": case.gradients,
        "arch": arch,
        "seed": seed,
    }
    error = plain_error = None
    with simulate(arch, seed=seed) as gpu, gpu_names(arch, first_configuration=True) as skipped:
        try:
            error, plain_error, status = _compare(case, randn)
        except Unimplemented as fault:
            status = f"not simulated: {fault}"
        except KernelError as fault:
            status = f"{type(fault).__name__}: {fault}"
        except Exception as wrong:  # of the package: another version, or what it takes a CPU for
            status = f"failed: {type(wrong).__name__}: {wrong}"
    launches = [launch for launch in gpu.launches if launch not in skipped.trials]
    counters = [launch.counters for launch in launches]
    return row | {
        "status": status,
        "error": error,
        "plain_error": plain_error,
        "kernels": sorted({launch.program.kernel.name for launch in launches}),
        "launches": len(launches),
        "instructions": sum(sum(c.instructions.values()) for c in counters),
        "global_bytes": sum(int(c.global_read + c.global_written + c.global_atomic) for c in counters),
        "bank_conflicts": sum(int(c.bank_conflicts) for c in counters),
        "tensor_flops": sum(int(c.tensor_flops) for c in counters),
    }
