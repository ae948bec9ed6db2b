"""bench/environment.py prints a line for each thing that a bug report needs."""

import torch

from bench.environment import main


def test_it_says_what_there_is(capsys):
    assert main() == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    said = {name.strip(): value.strip() for name, value in lines.items()}
    assert said["torch"] == torch.__version__
    assert said["flash_attn"] == "not installed"
    assert {"device", "triton", "python", "commit", "sources"} <= said.keys()
    assert "sdpa" in said["attention backends"]
