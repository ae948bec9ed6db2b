"""Instructions by which the threads of a warp look at each other."""

import numpy as np
import pytest

from simulator.snippets import elementwise

LANE = np.arange(32, dtype=np.uint32)
X = np.random.default_rng(1).integers(0, 2**32, 64, np.uint32)


def warps(values):
    return np.asarray(values).reshape(-1, 32)


@pytest.mark.parametrize(
    ("mode", "b", "c", "source"),
    [
        ("bfly", 5, 31, [i ^ 5 for i in range(32)]),
        ("down", 3, 31, [i + 3 if i + 3 < 32 else i for i in range(32)]),
        ("up", 3, 0, [i - 3 if i >= 3 else i for i in range(32)]),
        ("idx", 7, 31, [7] * 32),
        ("bfly", 4, 0x1807, [i ^ 4 for i in range(32)]),  # segments of eight lanes
        ("down", 3, 0x1807, [i + 3 if i % 8 + 3 < 8 else i for i in range(32)]),
        ("idx", 2, 0x1807, [i // 8 * 8 + 2 for i in range(32)]),
    ],
)
def test_shfl(mode, b, c, source):
    got = elementwise(f"shfl.sync.{mode}.b32 {{d}}, {{a}}, {b}, {c}, -1", [X], "b32")
    np.testing.assert_array_equal(warps(got), warps(X)[:, source])


def test_shfl_says_which_lanes_had_a_source():
    got = elementwise("shfl.sync.down.b32 %r1|{d}, {a}, 3, 31, -1", [X], "pred")
    np.testing.assert_array_equal(warps(got), np.broadcast_to(LANE < 29, (2, 32)))


def test_vote():
    p = X % 3 == 0
    ballots = [sum(1 << i for i in range(32) if row[i]) for row in warps(p)]
    np.testing.assert_array_equal(elementwise("vote.sync.ballot.b32 {d}, {a}, -1", [p], "b32"), np.repeat(ballots, 32))
    one = np.arange(64) == 40
    np.testing.assert_array_equal(elementwise("vote.sync.any.pred {d}, {a}, -1", [one], "pred"), np.repeat([0, 1], 32))
    np.testing.assert_array_equal(elementwise("vote.sync.all.pred {d}, {a}, -1", [~one], "pred"), np.repeat([1, 0], 32))


def test_match():
    values = X % 3
    expected = [sum(1 << j for j in range(32) if row[j] == row[i]) for row in warps(values) for i in range(32)]
    np.testing.assert_array_equal(elementwise("match.any.sync.b32 {d}, {a}, -1", [values], "b32"), expected)


@pytest.mark.parametrize(
    ("name", "kind", "reduce"),
    [("add", "s32", np.sum), ("min", "s32", np.min), ("max", "u32", np.max), ("xor", "b32", np.bitwise_xor.reduce),
     ("and", "b32", np.bitwise_and.reduce), ("or", "b32", np.bitwise_or.reduce)],
)  # fmt: skip
def test_redux(name, kind, reduce):
    typed = X.view(np.int32) if kind == "s32" else X
    got = elementwise(f"redux.sync.{name}.{kind} {{d}}, {{a}}, -1", [X], kind)
    np.testing.assert_array_equal(got, np.repeat([reduce(row).astype(typed.dtype) for row in warps(typed)], 32))


def test_elect_chooses_one_lane():
    got = elementwise("elect.sync %r1|{d}, -1;\nmov.b32 %r2, {a}", [X], "pred")
    np.testing.assert_array_equal(warps(got).sum(1), 1)


def test_movmatrix_transposes():
    tile = np.arange(64, dtype=np.uint16).reshape(8, 8)
    got = elementwise("movmatrix.sync.aligned.m8n8.trans.b16 {d}, {a}", [tile.view(np.uint32).reshape(-1)], "b32")
    np.testing.assert_array_equal(got.view(np.uint16).reshape(8, 8), tile.T)
