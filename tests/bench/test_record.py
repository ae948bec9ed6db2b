"""The record: the environment, JSON rows, tables."""

import json
import os

import pytest
import torch

from bench.lib.record import cell, environment_of, save, table


def test_the_environment_says_where_a_number_is_from():
    record = environment_of("cpu", "python bench/x.py --quick")
    assert record["torch"] == torch.__version__
    assert record["device"] == record["cpu"]
    assert record["threads"] == torch.get_num_threads()
    assert record["command"] == "python bench/x.py --quick"
    assert record["date"].endswith("+00:00")
    assert record["commit"] is None or len(record["commit"]) == 40
    json.dumps(record, allow_nan=False)


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path):
    path = save(tmp_path / "x.json", {"device": "d"}, [{"T": 1}])
    with pytest.raises(ValueError, match="Out of range float"):
        save(path, {}, [{"T": float("nan")}])
    assert json.loads(path.read_text()) == {"environment": {"device": "d"}, "rows": [{"T": 1}]}
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_table_is_aligned_and_says_what_was_not_measured():
    rows = [{"name": "a", "ms": 12.3456, "ok": True}, {"name": "longer", "ms": None, "ok": False}]
    assert table(rows, ("name", "ms", "ok")).splitlines() == [
        "name              ms   ok",
        "------  ------------  ---",
        "a              12.35  yes",
        "longer  not measured   no",
    ]


@pytest.mark.parametrize(
    ("value", "text"), [(1.23e-7, "1.2e-07"), (0.0, "0.000"), (12345.6, "12346"), (128, "128"), (0.01234, "0.01234")]
)
def test_cells(value, text):
    assert cell(value) == text
