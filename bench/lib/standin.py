"""Stands in for a GPU where there is none, so that every line that only a GPU would reach is executed before a visit.

install() makes this process believe in one GPU of compute capability 9.0: what is asked for on "cuda" is made on the
CPU, kernels run in Triton's interpreter, events read the wall clock, a graph is run once, when it is captured, and
memory is constant. Sizes shrink until all of it takes seconds. It shows that code runs; no figure from it means
anything, and the device's name says so.
"""

import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from model.attention import registry
from model.generation import graph

NAME = "stand-in for a GPU (rehearsal, no figure means anything)"
MEMORY = 80 * 2**30


class _OnCpu(TorchFunctionMode):
    """What asks for the GPU gets the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.device:  # a name, with nothing on it
            return function(*args, **(kwargs or {}))
        kwargs = {key: _on_cpu(value) for key, value in (kwargs or {}).items()}
        return function(*map(_on_cpu, args), **kwargs)


def _on_cpu(value):
    is_gpu = isinstance(value, (str, torch.device)) and str(value).split(":")[0] == "cuda"
    return torch.device("cpu") if is_gpu else value


class _Event:
    def __init__(self, enable_timing=False):
        self.at = None

    def record(self, stream=None):
        self.at = time.perf_counter()

    def query(self):
        return False

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


class _Stream:
    def __init__(self, device=None):
        self.device = device

    def wait_stream(self, stream):
        pass

    def synchronize(self):
        pass


class _Graph:
    def replay(self):
        pass


class _Again:
    """A captured decode step: the step itself, once more."""

    def __init__(self, step, device):
        step()
        self.replay = step


@contextmanager
def _graph(graph, stream=None, capture_error_mode="global"):
    yield


class _Generator(type):
    def __instancecheck__(cls, value):
        return isinstance(value, torch._C.Generator)

    def __call__(cls, device="cpu"):
        return torch._C.Generator("cpu")


PROPERTIES = SimpleNamespace(
    name=NAME, major=9, minor=0, total_memory=MEMORY, L2_cache_size=2**10, multi_processor_count=4
)
CUDA = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_name": lambda device=None: NAME,
    "get_device_properties": lambda device=None: PROPERTIES,
    "get_device_capability": lambda device=None: (9, 0),
    "mem_get_info": lambda device=None: (MEMORY, MEMORY),
    "synchronize": lambda device=None: None,
    "empty_cache": lambda: None,
    "reset_peak_memory_stats": lambda device=None: None,
    "memory_allocated": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 2**20,
    "manual_seed_all": lambda seed: None,
    "is_current_stream_capturing": lambda: False,
    "device": lambda device=None: nullcontext(),
    "stream": lambda stream=None: nullcontext(),
    "current_stream": lambda device=None: _Stream(device),
    "Stream": _Stream,
    "Event": _Event,
    "CUDAGraph": _Graph,
    "graph": _graph,
    "_sleep": lambda cycles: None,
}


def install():
    """Changes this process for good."""
    for name, value in CUDA.items():
        setattr(torch.cuda, name, value)
    torch.Generator = _Generator("Generator", (), {})
    torch.compile = lambda function, **_: function
    _OnCpu().__enter__()
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            utils=SimpleNamespace(get_device_properties=lambda device: {"max_shared_mem": 227 * 1024}),
        )
    )
    # On a CPU flex_attention takes no gradient.
    eager, flex = (registry._BACKENDS[name] for name in ("eager", "flex"))
    registry._BACKENDS["flex"] = replace(
        flex, forward=partial(eager.forward, return_weights=False), devices=("cuda", "cpu")
    )
    graph.DEVICES = ("cuda", "cpu")
    graph.capture = _Again
    _shrink()


def _profile(activities):
    return profile(activities=[ProfilerActivity.CPU])


def _shrink():
    """Sizes at which an interpreted kernel takes a moment."""
    from bench import ceilings, model_sweep, pointwise_sweep, training_sweep, transformers_sweep, tune
    from bench.lib import attention_cases, cli, clock, kernel_names, providers
    from model.config import PRESETS

    # The interpreter is refused as nothing to be timed, and rightly: nothing is timed here.
    cli.resolve_device = lambda name: torch.device("cpu" if name == "cpu" else "cuda")
    # Of a GPU that is not there a profiler complains at every operation, with the stack, for minutes.
    kernel_names.profile = _profile
    clock.BUFFER_BYTES = 2**12
    clock.MAX_REPEATS = 2
    for scenario, sizes in attention_cases.SIZES.items():
        lengths = {"decode": (48,), "lengths": (16, 33)}.get(scenario, (33,))
        sizes |= {("cuda", quick): (lengths, max(lengths)) for quick in (False, True)}
    attention_cases.HEAD_DIMS = (16,)
    attention_cases.DECODED = (1, 4)
    attention_cases.VALID_SHARES = (0.5,)
    pointwise_sweep.SIZES |= {("cuda", quick): (8, 4) for quick in (False, True)}
    pointwise_sweep.WIDTHS = (96,)
    pointwise_sweep.VOCABULARY = 97
    pointwise_sweep.COPY_BYTES = {"cuda": 2**12, "cpu": 2**12}
    ceilings.COPY_BYTES = {"cuda": 2**12, "cpu": 2**12}
    ceilings.MATMUL_N = {"cuda": 16, "cpu": 16}
    ceilings.SEQUENCE = 3
    tiny = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 97, "n_positions": 1024}
    PRESETS |= dict.fromkeys(PRESETS, tiny)
    tune.TOKENS, tune.ODD_T, tune.WIDTH = 17, 5, 64
    tune.TILES, tune.WARPS, tune.STAGES = {2: (64,)}, (4,), (1, 2)
    tune.FINALISTS, tune.MINUTE_S = 1, 600.0
    training_sweep.QUICK["cuda"] = ((1,), (16,))
    model_sweep.QUICK["cuda"] = {"training": ((1,), (16,)), "decoding": ((1,), (16,)), "inference": ((1, 2), (16,))}
    transformers_sweep.QUICK = tuple(case for case in transformers_sweep.QUICK if case[0][1] == 1)
    transformers_sweep.IMPORTS = {"ours": "import json", transformers_sweep.BASELINE: "import json"}
    providers.GATE_TOKENS, providers.NEW_TOKENS = 8, 3
