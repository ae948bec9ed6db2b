"""A pytest fixture for kernels of one's own: `pytest_plugins = ["kernels.simulator.fixtures"]` in conftest.py."""

import pytest

from .driver import simulate


@pytest.fixture
def simulated(request):
    """Inside the test, Triton kernels take CPU tensors and run under every check; the `Simulation` is the value.

    For sm_90 in lock step, or for request.param: an architecture, or (architecture, seed), as
    @pytest.mark.parametrize("simulated", ["sm_80", ("sm_90", 1)], indirect=True) gives it.
    """
    wanted = getattr(request, "param", "sm_90")
    arch, seed = wanted if isinstance(wanted, tuple) else (wanted, None)
    with simulate(arch, seed=seed) as gpu:
        yield gpu
