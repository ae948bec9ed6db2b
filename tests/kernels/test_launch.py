"""The short way to a launch: a remembered launch is the launch that Triton would make, and whoever must see it does.

Everything is compared with the long way (nothing remembered; through torch's dispatcher). GELU stands for the ops where
any op will do, since it compiles fastest.
"""

import importlib
import threading

import pytest
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from kernels import add_layer_norm, bias_gelu, cross_entropy, flash_attention, flash_attention_packed, gelu, launch
from kernels.checks import once
from kernels.library import define_op, is_plain, needs_graph
from kernels.simulator import simulate

gelu_file = importlib.import_module("kernels.gelu")  # the package holds the function by this name
F16 = torch.float16


@pytest.fixture
def through_triton(monkeypatch):
    """The kernels launched through Triton's own JIT, by name."""
    seen, run = [], JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda self, *a, **k: seen.append(self.__name__) or run(self, *a, **k))
    launch.forget()
    yield seen
    launch.forget()


# What is remembered


def packed(B=1, T=9, H=2, D=16, dtype=F16, shift=0, row=0, **options):
    """A call of flash_attention_packed; shift moves the tensor by elements, row widens its rows."""
    generator = torch.Generator().manual_seed(1)
    width = 3 * H * D
    buffer = torch.randn(B * T * (width + row) + shift, generator=generator).to(dtype)
    qkv = buffer[shift:].view(B, T, width + row)[:, :, :width]
    return lambda: flash_attention_packed(qkv, H, **options)


def rows(M=3, N=24, dtype=F16, shift=0):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(M * N + shift, generator=generator).to(dtype)[shift:].view(M, N)
    bias = torch.randn(N, generator=generator).to(dtype)
    return lambda: bias_gelu(x, bias)


def norm(M=3, N=24, dtype=F16, eps=1e-5, residual_row=0, **options):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(M, N, generator=generator).to(dtype)
    residual = torch.randn(M, N + residual_row, generator=generator).to(dtype)[:, :N]
    weight, bias = torch.randn(2, N, generator=generator).to(dtype)
    return lambda: add_layer_norm(x, residual, weight, bias, eps, **options)


def loss(M=3, V=40, dtype=F16, shift=0, weights=False, **options):
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(M * V + shift, generator=generator).to(dtype)[shift:].view(M, V)
    class_weight = torch.rand(V, generator=generator).to(dtype) if weights else None
    return lambda: cross_entropy(logits, torch.arange(M), class_weight=class_weight, **options)


def bounds(*values):
    return torch.tensor(values, dtype=torch.int32)


SEED = torch.tensor([7])
PROPERTIES = {
    "packed": packed(),
    "batch": packed(B=2),
    "length": packed(T=16),
    "heads": packed(H=1, D=32),
    "dtype": packed(dtype=torch.float32),
    "alignment": packed(shift=1),
    "strides": packed(row=8),
    "causal": packed(causal=False),
    "scale": packed(scale=1.0),
    "start": packed(kv_start=bounds(2)),
    "end": packed(kv_end=bounds(5)),
    "both": packed(kv_start=bounds(2), kv_end=bounds(5)),
    "dropout": packed(dropout_p=0.25, dropout_seed=SEED),
    "rate": packed(dropout_p=0.5, dropout_seed=SEED),
    "gelu": rows(),
    "gelu, rows": rows(M=16),
    "gelu, one row": rows(M=1),
    "gelu, width": rows(N=16),
    "gelu, dtype": rows(dtype=torch.float32),
    "gelu, alignment": rows(shift=1),
    "loss": loss(),
    "loss, sum": loss(reduction="sum"),
    "loss, rows": loss(reduction="none"),
    "loss, vocabulary": loss(V=41),
    "loss, alignment": loss(shift=1),
    "loss, weights": loss(weights=True),
    "loss, ignored": loss(ignore_index=1),
    "loss, smoothing": loss(label_smoothing=0.1),
    "loss, smoother": loss(label_smoothing=0.2),
    "norm": norm(),
    "norm, eps": norm(eps=1.0),
    "norm, eps as an integer": norm(eps=1),
    "norm, strides": norm(residual_row=8),
    "norm, dropout": norm(dropout_p=0.25, dropout_seed=SEED),
}


def tensors(result):
    return result if isinstance(result, tuple) else (result,)


def test_varying_any_property_after_a_launch_is_remembered_gives_what_a_fresh_process_gives(through_triton):
    """Each call alone, nothing remembered; then all of them, twice, with everything remembered that can be."""
    fresh = {}
    with simulate("sm_90") as gpu:
        for name, call in PROPERTIES.items():
            launch.forget()
            fresh[name] = tensors(call()), gpu.launches[-1].cubin, gpu.launches[-1].grid
        launch.forget()
        for again in range(2):
            for name, call in PROPERTIES.items():
                through_triton.clear()
                result, (expected, cubin, grid) = tensors(call()), fresh[name]
                assert all(map(torch.equal, result, expected)), name
                assert (gpu.launches[-1].cubin, gpu.launches[-1].grid) == (cubin, grid), name
                if again and "alignment" not in name:
                    assert not through_triton, name


def test_backward_and_decode_are_remembered_and_stay_what_they_were(through_triton):
    qkv, do = torch.randn(1, 9, 96).half().requires_grad_(), torch.randn(1, 9, 32).half()
    q, cache = torch.randn(1, 2, 1, 16).half(), torch.randn(2, 1, 2, 20, 16).half()
    x, bias, dy = (
        torch.randn(3, 24).half().requires_grad_(),
        torch.randn(24).half().requires_grad_(),
        torch.randn(3, 24),
    )

    def step():
        (dqkv,) = torch.autograd.grad(flash_attention_packed(qkv, 2), qkv, do)
        dx, dbias = torch.autograd.grad(bias_gelu(x, bias), (x, bias), dy)
        return dqkv, dx, dbias, flash_attention(q, *cache)

    with simulate("sm_90"):
        first = step()
        assert through_triton
        through_triton.clear()
        assert all(map(torch.equal, step(), first))
        assert not through_triton


def test_chips_do_not_share_what_is_remembered(through_triton):
    x, launched = torch.randn(3, 24), []
    for _ in range(2):
        for arch in ("sm_80", "sm_90"):
            with simulate(arch) as gpu:
                gelu(x)
                launched.append(gpu.launches[0].program.kernel.target)
    assert launched == ["sm_80", "sm_90a"] * 2
    assert len(through_triton) == 2


def test_a_table_that_is_changed_is_forgotten():
    x = torch.randn(3, 24)
    with simulate("sm_90"):
        gelu(x)
        assert gelu_file._launch_forward.known
        launch.forget()
        assert not gelu_file._launch_forward.known


def test_a_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(launch, "MOST", 2)
    launch.forget()
    with simulate("sm_90"):
        for M in (2, 3, 4, 5):
            gelu(torch.randn(M, 24))
            assert len(gelu_file._launch_forward.known) <= 2


def test_a_bound_launch_is_its_launchers(through_triton):
    """Whatever changes between two calls: the address, the chip, who watches."""
    buffer, bias = torch.randn(3 * 24 + 1).half(), torch.randn(24).half()
    aligned, shifted = buffer[:-1].view(3, 24), buffer[1:].view(3, 24)
    bound = launch.Bound(gelu_file._launch_forward, 3, 24, 24)

    def call(x, arch="sm_90"):
        """The bits of bias_gelu, and how often Triton launched beside the simulator."""
        through_triton.clear()
        y = torch.full_like(x, torch.nan)
        with simulate(arch) as gpu:
            bound(launch.here(), x, bias, y)
            count = len(through_triton)
            assert len(gpu.launches) == 1
            assert torch.equal(y, bias_gelu(x, bias))
        return count

    assert [call(aligned) for _ in range(3)] == [1, 0, 0]
    assert [call(x) for x in (shifted, aligned, shifted, aligned)] == [1, 0, 1, 0]
    assert [call(aligned, arch) for arch in ("sm_80", "sm_90", "sm_80", "sm_90")] == [1, 0, 0, 0]
    seen = []
    gelu_file._launch_forward.kernel.pre_run_hooks.append(lambda *arguments, **options: seen.append(1))
    try:
        call(aligned)
    finally:
        gelu_file._launch_forward.kernel.pre_run_hooks.pop()
    assert len(seen) == 2  # bound, and bias_gelu
    assert call(aligned) == 0


def test_what_is_forgotten_with_the_launches():
    known = launch.forgotten({"a": 1})
    launch.forget()
    assert not known


# Checks


def test_a_check_is_made_once_for_a_geometry_and_always_where_a_value_is_no_number():
    made = []
    check = once(lambda tensors, value: made.append(value))
    x = torch.zeros(2, 3)
    check((x, None), 1)
    check((torch.ones(2, 3), None), 1)
    assert made == [1]
    for tensor, value in ((x, True), (x, 1.0), (x.double(), 1), (x.t(), 1), (torch.zeros(3, 2), 1)):
        made.clear()
        check((tensor, None), value)
        assert len(made) == 1
    made.clear()
    for _ in range(2):
        check((x, None), torch.tensor(1))
    assert len(made) == 2


def test_an_error_comes_again():
    x = torch.zeros(2, 3, dtype=torch.float64)
    for _ in range(2):
        with pytest.raises(TypeError, match="gelu: x is float64"):
            gelu(x)


# Who must see a call


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


class FunctionNames(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(getattr(function, "__name__", str(function)))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(3, 24)


@pytest.fixture
def y(x):
    """gelu(x) the long way, through the dispatcher; the short way is remembered as well."""
    with simulate("sm_90"):
        gelu(x), gelu(x)
        launch.forget()
        long = gelu_file.gelu_forward.overload(x)
        assert torch.equal(gelu(x), long)
        yield long


def test_dispatch_modes_see_the_op(x, y):
    with Names() as mode:
        assert torch.equal(gelu(x), y)
    assert "gelu_forward" in mode.names


def test_function_modes_see_the_op(x, y):
    with FunctionNames() as mode:
        assert torch.equal(gelu(x), y)
    assert any("gelu_forward" in name for name in mode.names)


def test_the_profiler_names_the_op(x, y):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gelu(x)
    assert "gpt2::gelu_forward" in {event.key for event in profile.key_averages()}


def test_fake_tensors_launch_nothing(x, y, through_triton):
    with FakeTensorMode() as mode:
        fake = gelu(mode.from_tensor(x))
    assert (fake.shape, fake.dtype) == (y.shape, y.dtype)
    assert not through_triton


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_tracing_records_the_op(x, y, mode):
    graph = make_fx(lambda x: gelu(x) + 1, tracing_mode=mode)(x)
    assert any("gelu_forward" in str(node.target) for node in graph.graph.nodes)
    assert torch.equal(graph(x), y + 1)


def test_export_records_the_op(x, y):
    class Model(torch.nn.Module):
        def forward(self, x):
            return gelu(x) + 1

    program = torch.export.export(Model(), (x,))
    assert any("gelu_forward" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("gradients", [False, True])
def test_compile_traces_the_op_without_a_graph_break(x, y, gradients):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: gelu(x) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x.requires_grad_(gradients)), y + 1)


def test_subclasses_reach_the_dispatcher(x, y):
    seen = []

    class Tagged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return super().__torch_function__(function, types, args, kwargs)

    result = gelu(x.as_subclass(Tagged))
    assert isinstance(result, Tagged)
    assert torch.equal(result.as_subclass(torch.Tensor), y)
    assert any("gelu_forward" in name for name in seen)


def test_transforms_are_no_short_way(x, y):
    kinds = [frozenset((torch.Tensor,))]
    assert is_plain((x,), kinds)

    def inside(z):
        assert not is_plain((z,), kinds)
        assert needs_graph(z)
        return z

    torch.func.vmap(inside)(x)
    torch.func.grad(lambda z: inside(z).sum())(x)
    torch.func.jvp(inside, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        assert needs_graph(torch.autograd.forward_ad.make_dual(x, x))


@pytest.mark.parametrize(
    "make",
    [
        lambda x: torch._neg_view(x),
        lambda x: torch.complex(x, x).conj().imag,
        lambda x: torch._efficientzerotensor(x.shape),
        lambda x: x.to_sparse(),
        lambda x: x.to("meta"),
        lambda x: 1,
        lambda x: None,
    ],
    ids=["negative", "conjugate", "zero", "sparse", "meta", "number", "none"],
)
def test_peculiar_tensors_are_no_short_way(x, make):
    assert not is_plain((make(x),), [frozenset((torch.Tensor,))])


def test_a_number_of_another_type_goes_to_the_dispatcher():
    """1, 1.0 and True are one key of a dictionary; the schema makes of each what it says."""
    seen = []

    def implementation(x, a, b):
        seen.append((a, b))
        return x.clone()

    schema = "test_launch_types(Tensor x, float a, bool b) -> Tensor"
    op = define_op(schema, implementation, lambda x, a, b: torch.empty_like(x))
    for a in (1.0, 1):
        op(torch.zeros(1), a, True)
    assert [(type(a), type(b)) for a, b in seen] == [(float, bool)] * 2
    with pytest.raises((RuntimeError, TypeError)):
        op(torch.zeros(1), 1.0)


@pytest.mark.parametrize(
    "context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu"), torch.enable_grad]
)
def test_grad_modes_and_autocast_change_nothing(x, y, context):
    with context():
        assert torch.equal(gelu(x), y)


def test_launch_hooks_see_every_launch(x, y):
    gelu(x)
    seen = []
    hook = lambda metadata: seen.append(metadata.get()["name"])  # noqa: E731
    triton.knobs.runtime.launch_enter_hook.add(hook)
    try:
        assert torch.equal(gelu(x), y)
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(hook)
    assert seen == ["_gelu_forward_kernel"]
    kernel = gelu_file._gelu_forward_kernel
    kernel.add_pre_run_hook(lambda *arguments, **options: seen.append("before"))
    try:
        assert torch.equal(gelu(x), y)
    finally:
        kernel.pre_run_hooks.clear()
    assert seen[1:] == ["before"]


def test_threads_share_what_is_remembered(x):
    with simulate("sm_90"):
        expected = {M: gelu(x[:M]) for M in (1, 2, 3)}
    launch.forget()
    lock, equal = threading.Lock(), []  # one thread simulates at a time

    def work(M):
        with lock, simulate("sm_90"):
            equal.extend(torch.equal(gelu(x[:M]), expected[M]) for _ in range(5))

    threads = [threading.Thread(target=work, args=(M,)) for M in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == [True] * 15
    assert len(gelu_file._launch_forward.known) == 3


def test_tensors_on_several_devices_are_not_taken_as_one(through_triton):
    """A remembered launch hands over addresses, which nobody would look at again."""

    class Elsewhere(torch.Tensor):
        def get_device(self):
            return 3

    x, y = torch.randn(3, 24), torch.empty(3, 24)
    with simulate("sm_90"):
        for _ in range(2):
            gelu_file._launch_forward((x, None, y), 3, 24, 24)
        assert len(through_triton) == 1
        gelu_file._launch_forward((x, None, y.as_subclass(Elsewhere)), 3, 24, 24)
        assert len(through_triton) == 2
