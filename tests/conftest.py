"""Chooses the lanes that this process can run; `tests/lanes.py` says what a lane is."""

import os

import pytest
import torch


def _marks(config):
    return config.getoption("markexpr", default="") or ""


def pytest_configure(config):
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # the workers share the cores
    # Triton reads the variable when a kernel is decorated, so it is set before any test module imports kernels.
    if _marks(config).strip() == "interpret":
        os.environ["TRITON_INTERPRET"] = "1"
    if "gpu" in _marks(config) and "not gpu" not in _marks(config) and not torch.cuda.is_available():
        raise pytest.UsageError("pytest -m gpu needs a GPU; torch.cuda.is_available() is False on this machine")


def pytest_collection_modifyitems(config, items):
    """Deselects what another process runs: interpreted and compiled kernels cannot share one."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    kept, dropped = [], []
    for item in items:
        is_interpret = item.get_closest_marker("interpret") is not None
        needs_gpu = item.get_closest_marker("gpu") is not None
        runs_here = is_interpret == interpreted and (not needs_gpu or torch.cuda.is_available())
        (kept if runs_here else dropped).append(item)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


def pytest_fixture_setup(fixturedef):
    """What a module's tests share is built from the same seed whichever of them runs first."""
    if fixturedef.scope != "function":
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def lane(request):
    """The lane under test, entered: inside it kernels accept tensors of `lane.device`."""
    from lanes import LANES

    with LANES[request.param].enter() as entered:
        yield entered
