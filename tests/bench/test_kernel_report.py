"""The kernel report: bounds by hand, what it says of a known kernel, and what it compares."""

import json
from types import SimpleNamespace

import pytest
import torch
from simulator import kernels

from bench import kernel_report
from bench.lib.chips import CHIPS, SOURCES, bounds, resident_blocks
from bench.lib.kernel_cases import CASES, Work
from bench.lib.sass import class_of


def make_copy():
    x, y = torch.randn(4096), torch.empty(4096)
    return lambda: kernels.copy[(4,)](x, y, 4096, 1024), {"copy": Work(4096, 8 * 4096)}


def make_attention():
    q = torch.randn(3, 1, 128, 64).bfloat16()
    o = torch.empty(1, 128, 64).bfloat16()
    return (
        lambda: kernels.attention[(2, 1)](q[0], q[1], q[2], o, 0.2, 128, 64, 64, 64),
        {"attention": Work(128 * 64, 4 * 2 * 128 * 64)},
    )


@pytest.fixture
def cases(monkeypatch):
    monkeypatch.setattr(kernel_report, "CASES", {"copy 4096": make_copy, "attention T128": make_attention})


def test_bounds_by_hand():
    counters = SimpleNamespace(
        instructions={"float": 4, "special": 2, "move": 100, "mma": 2},
        tensor_flops=132 * 4096,
        sectors_read=100,
        sectors_written=60,
        shared_wavefronts=132,
    )
    clock = 1 / 1.83e9
    seconds = bounds(CHIPS["sm_90"], counters, least_bytes=3350)
    assert seconds["matrix units"] == pytest.approx(clock)
    assert seconds["fp32 units"] == pytest.approx(clock * 4 * 32 / (132 * 128))
    assert seconds["exponential unit"] == pytest.approx(clock * 2 * 32 / (132 * 16))
    assert seconds["issue slots"] == pytest.approx(clock * 8 / (132 * 4))
    assert seconds["shared memory"] == pytest.approx(clock)
    assert seconds["L2"] == pytest.approx(clock * 160 * 32 / 5120)
    assert seconds["HBM"] == pytest.approx(1e-9)


def test_peaks_are_the_datasheets():
    for arch, peak in (("sm_80", 312e12), ("sm_90", 989e12)):
        chip = CHIPS[arch]
        assert chip.multiprocessors * chip.clock * chip.tensor == pytest.approx(peak, rel=1e-3)
    assert all(len(SOURCES[name]) == len(CHIPS) for name in SOURCES)


def test_resident_blocks():
    chip = CHIPS["sm_90"]
    assert resident_blocks(chip, 32, 0, 4) == (16, "registers")
    assert resident_blocks(chip, 255, 0, 8) == (1, "registers")
    assert resident_blocks(chip, 64, 100 * 1024, 4) == (2, "shared memory")
    assert resident_blocks(chip, 16, 0, 32) == (2, "threads")
    assert resident_blocks(chip, 16, 0, 1) == (32, "blocks")


def test_machine_instructions_by_class():
    expected = {
        "HGMMA.64x64x16": "mma",
        "HMMA.16816.F32.BF16": "mma",
        "MUFU.EX2": "special",
        "FFMA": "float",
        "LDGSTS.E.BYPASS.128": "copy",
        "LDG.E.128": "global",
        "STL": "spill",
        "BAR.SYNC": "barrier",
        "IMAD": "integer",
        "F2FP.BF16.F32.PACK_AB": "convert",
    }
    assert {name: class_of(name) for name in expected} == expected


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_rows(cases, arch):
    copy, attention = kernel_report.report(arch)
    assert (copy["global_bytes"], copy["least_bytes"]) == (8 * 4096, 8 * 4096)
    assert copy["sectors_per_request"] == 16
    assert copy["main_loop"] == {}
    assert copy["per_output"]["global_ld"] == 1 / 4  # four elements a load
    assert copy["spilled_bytes"] == attention["spilled_bytes"] == 0
    assert attention["main_loop"]["mma"] > 0
    assert attention["tensor_flops"] == 3 * 2 * (2 * 64 * 64 * 64)
    assert 0 < attention["registers"] <= 255


def test_against_an_earlier_report(cases, tmp_path, capsys):
    file = tmp_path / "report.json"
    kernel_report.main(["--arch", "sm_90", "--kernel", "copy", "--json", str(file)])
    assert "model, not a measurement" in capsys.readouterr().out
    assert [row["kernel"] for row in json.loads(file.read_text())["rows"]] == ["copy"]
    kernel_report.main(["--arch", "sm_90", "--kernel", "copy", "--against", str(file)])
    assert "no difference" in capsys.readouterr().out
    saved = json.loads(file.read_text())
    saved["rows"][0]["global_bytes"] *= 2
    file.write_text(json.dumps(saved))
    kernel_report.main(["--arch", "sm_90", "--kernel", "copy", "--against", str(file)])
    assert "copy, copy 4096: global_bytes 65,536 -> 32,768 (-50.0%)" in capsys.readouterr().out


def test_errors_are_found_before_any_work(cases, tmp_path, capsys, monkeypatch):
    work = kernel_report.report
    monkeypatch.setattr(kernel_report, "report", lambda arch, name: work(arch, name) if name else pytest.fail("worked"))
    for arguments, message in (
        (["--kernel", "nonesuch"], "no such kernel; cases are copy 4096, attention T128"),
        (["--json", "/proc/report.json"], "--json: the directory /proc: "),
        (["--json", str(tmp_path)], "it is a directory; a file is required"),
        (["--against", str(tmp_path / "missing.json")], "a file that --json wrote is required"),
    ):
        with pytest.raises(SystemExit, match="2"):
            kernel_report.main(arguments)
        assert message in capsys.readouterr().err


def test_a_case_that_names_a_kernel_it_does_not_launch(monkeypatch):
    monkeypatch.setattr(kernel_report, "CASES", {"wrong": lambda: (make_copy()[0], {"other": Work(1, 1)})})
    with pytest.raises(ValueError, match=r"wrong: launches \['copy'\], not other"):
        kernel_report.report("sm_90")


def test_each_case_has_work():
    for make in CASES.values():
        _, work = make()
        assert all(needed.outputs > 0 and needed.least_bytes > 0 for needed in work.values())
