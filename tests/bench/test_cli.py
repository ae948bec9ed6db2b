"""What every command refuses before it works."""

import os
import stat

import pytest
import torch

from bench.lib.cli import UsageError, output_directory, resolve_device


def test_a_directory_that_cannot_be_written_is_found_before_work(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--out .*file/below: Not a directory; a directory that can be"):
        output_directory(tmp_path / "file" / "below")
    with pytest.raises(UsageError, match=r"--out /proc: .*; a directory that can be written is required"):
        output_directory("/proc")  # it is there, and nobody can write to it
    made = output_directory(tmp_path / "a" / "b")
    assert stat.S_ISDIR(made.stat().st_mode)
    assert os.listdir(made) == []


def test_the_interpreter_is_never_timed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(UsageError, match="the interpreter is never timed"):
        resolve_device("auto")
    assert resolve_device("cpu") == torch.device("cpu")
