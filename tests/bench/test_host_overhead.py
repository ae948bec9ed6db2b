"""host_overhead.py: nothing is launched, what it counts is what it should be, and every case gives rows. No time is
asserted: other processes share the CPU."""

import json

import pytest
import torch
from triton.runtime import driver

from bench import host_overhead
from bench.lib.no_launch import launching_nothing
from kernels import gelu
from kernels.simulator import simulate

# (launches, allocations) of ours. Fewer is better; more has to be explained here.
OURS = {
    ("attention", "inference"): (1, 2),  # o and its log-sum-exp
    ("attention", "forward"): (1, 2),
    ("attention", "backward"): (2, 2),  # dq, then dk and dv; dqkv and delta
    ("add_layer_norm", "inference"): (1, 4),  # y, total, mean, rstd
    ("add_layer_norm", "forward"): (1, 4),
    ("add_layer_norm", "backward"): (2, 3),  # with the column sums; dx, partial sums, both vectors' gradients
    ("bias_gelu", "inference"): (1, 1),
    ("bias_gelu", "forward"): (1, 1),
    ("bias_gelu", "backward"): (2, 3),
}


@pytest.mark.parametrize(("op", "mode"), OURS, ids=str)
def test_launches_and_allocations_of_the_ops(op, mode):
    with launching_nothing() as launches:
        call = host_overhead.op_calls(op, mode)["triton"]
        assert host_overhead.counts(call, launches) == OURS[op, mode]


# Launches of two layers: so many for each, and the rest.
STEPS = {"training": 2 * 22 + 19, "inference": 2 * 8 + 4, "decode": 2 * 10 + 4}


@pytest.mark.parametrize("mode", STEPS)
def test_a_step_launches_less_than_transformers(mode):
    with launching_nothing() as launches:
        calls = host_overhead.model_calls(2, mode)
        (ours, our_blocks), (theirs, their_blocks) = (host_overhead.counts(call, launches) for call in calls.values())
    assert list(calls) == ["triton", "transformers-sdpa"]
    assert ours == STEPS[mode]
    assert ours < {"training": 0.6, "inference": 0.45, "decode": 0.55}[mode] * theirs
    assert our_blocks < 0.55 * their_blocks


def test_nothing_is_launched_and_the_simulator_is_not_disturbed():
    x = torch.randn(3, 24)
    before = driver._active
    with launching_nothing() as launches:
        for _ in range(3):
            gelu(x)
        assert launches.names == ["_gelu_forward_kernel"] * 3
    assert driver._active is before
    with simulate("sm_90") as gpu:
        y = gelu(x)
    assert len(gpu.launches) == 1
    torch.testing.assert_close(y, torch.nn.functional.gelu(x, approximate="tanh"))


def test_the_command_writes_its_rows_and_its_chart(tmp_path, monkeypatch, capsys):
    short = [("bias_gelu", "forward", None), ("model", "inference", 2)]
    monkeypatch.setattr(host_overhead, "cases", lambda quick: iter(short))
    host_overhead.main(["--quick", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "host_overhead_quick.json").read_text())["rows"]
    assert {(row["what"], row["provider"]) for row in rows} == {
        ("bias_gelu", "triton"),
        ("bias_gelu", "torch"),
        ("model", "triton"),
        ("model", "transformers-sdpa"),
    }
    assert all(row["host_us"] > 0 for row in rows)
    assert [row["of_peer"] for row in rows if row["provider"] in host_overhead.PEERS] == [1.0, 1.0]
    assert (tmp_path / "host_overhead_quick.png").exists()
    assert "of_peer" in capsys.readouterr().out
