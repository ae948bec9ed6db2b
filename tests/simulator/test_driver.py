"""`simulate`: a driver that comes and goes and leaves nothing behind."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import driver

from kernels.simulator import OutOfBounds, SimulatorError, simulate
from simulator import kernels


@triton.jit
def out_of_bounds(x_ptr):
    tl.store(x_ptr + 4096 + tl.arange(0, 64), tl.arange(0, 64))


@triton.jit
def many_arguments(y_ptr, scaled_ptr, pair, flag, big, negative, scale, none_ptr, ONE: tl.constexpr):
    total = pair[0] + pair[1] + big + negative
    if flag:
        total += 1
    if none_ptr is not None:
        total += 1000
    tl.store(y_ptr, total + ONE)
    tl.store(scaled_ptr, scale * pair[1])


def copied():
    x, y = torch.randn(100), torch.zeros(100)
    kernels.copy[(1,)](x, y, 100, 128)
    return torch.equal(x, y)


def test_the_previous_driver_comes_back():
    before = driver._active
    with simulate("sm_90"):
        assert driver.active.get_active_torch_device() == torch.device("cpu")
        assert driver.active.get_current_target().arch == 90
        with simulate("sm_80"):
            assert driver.active.get_current_target().arch == 80
            assert copied()
        assert driver.active.get_current_target().arch == 90
        assert copied()
    assert driver._active is before


def test_it_comes_back_after_an_error():
    before = driver._active
    with pytest.raises(OutOfBounds, match="past the end of x_ptr"), simulate("sm_90"):
        out_of_bounds[(1,)](torch.zeros(64, dtype=torch.int32))
    assert driver._active is before
    with simulate("sm_90"):
        assert copied()


def test_chips_do_not_share_compiled_kernels():
    texts = {}
    for arch in ("sm_80", "sm_90", "sm_80"):
        with simulate(arch) as gpu:
            assert copied()
        texts.setdefault(arch, set()).add(gpu.launches[0].program.kernel.target)
    assert texts == {"sm_80": {"sm_80"}, "sm_90": {"sm_90a"}}


def test_what_the_driver_says_of_the_chip():
    with simulate("sm_90"):
        interface = driver.active.get_device_interface()
        assert driver.active.utils.get_device_properties(interface.current_device())["multiprocessor_count"] == 132
        assert interface.get_device_properties().multi_processor_count == 132
        with pytest.raises(SimulatorError, match="measures no time"):
            driver.active.get_benchmarker()


def test_launches_are_listed():
    with simulate("sm_90") as gpu:
        copied()
        copied()
    assert [(launch.kernel, launch.grid) for launch in gpu.launches] == [("copy", (1, 1, 1))] * 2


def test_arguments_of_each_kind():
    y, scaled = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    with simulate("sm_90"):
        many_arguments[(1,)](y, scaled, (3, 40), True, 2**40, -5, 0.75, None, 1)
    assert y.item() == 3 + 40 + 2**40 - 5 + 1 + 1
    assert scaled.item() == 30


def test_views_of_one_storage_stay_views():
    buffer = torch.arange(256.0)
    with simulate("sm_90"):
        kernels.copy[(1,)](buffer[:64], buffer[128:192], 64, 64)
    assert torch.equal(buffer[128:192], torch.arange(64.0))
    assert torch.equal(buffer[192:], torch.arange(192.0, 256.0))


def test_an_unaligned_view_is_compiled_as_one():
    x, y = torch.randn(65)[1:], torch.zeros(64)
    with simulate("sm_90"):
        kernels.copy[(1,)](x, y, 64, 64)
    assert torch.equal(x, y)


def test_errors_that_users_can_make():
    with pytest.raises(SimulatorError, match="no chip 'sm_70'; one of sm_80"), simulate("sm_70"):
        pass
    with simulate("sm_90"), pytest.raises(SimulatorError, match="y_ptr is a tensor on meta; the simulator takes CPU"):
        kernels.copy[(1,)](torch.zeros(4), torch.zeros(4, device="meta"), 4, 4)


def test_it_refuses_the_interpreter():
    code = "from kernels.simulator import simulate\nwith simulate('sm_90'): pass"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "TRITON_INTERPRET=1 is set" in done.stderr


@triton.jit
def _mark(x_ptr):
    tl.store(x_ptr + tl.program_id(1), 1.0)


def test_a_grid_that_no_gpu_takes_is_refused():
    with (
        simulate("sm_90"),
        pytest.raises(SimulatorError, match=r"_mark: grid \(1, 65536, 1\) has 65536 blocks along y"),
    ):
        _mark[(1, 65536)](torch.zeros(65536))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_a_kernel_has_its_registers(arch):
    """Launch code that sizes a grid by occupancy divides by them."""
    with simulate(arch):
        kernel = _mark[(1,)](torch.zeros(1))
    assert 0 < kernel.n_regs <= 32


def test_one_thread_simulates_at_a_time():
    def enter():
        with simulate("sm_80"):
            return copied()

    before = driver._active
    with ThreadPoolExecutor(1) as other:
        with simulate("sm_90") as gpu:
            with pytest.raises(SimulatorError, match="another thread is inside"):
                other.submit(enter).result()
            with pytest.raises(SimulatorError, match="copy: launched by a thread that did not enter `simulate`"):
                other.submit(copied).result()
            assert copied()
            assert len(gpu.launches) == 1
        assert driver._active is before
        assert other.submit(enter).result()
    assert driver._active is before
