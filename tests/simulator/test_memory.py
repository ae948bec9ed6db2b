"""Global and shared memory: what is read and written, and what is refused."""

import numpy as np
import pytest
import torch

from kernels.simulator import Misaligned, OutOfBounds, SharedMemoryRace, Unimplemented
from simulator.snippets import launch, tensor

THREAD = "mov.u32 %r1, %tid.x;\nld.param.u64 %rd1, [p0];\nmov.u32 %r9, global_smem;\n"
X = np.arange(128, dtype=np.uint32)


@pytest.mark.parametrize(("vector", "names"), [(".v2", "{%r10, %r11}"), (".v4", "{%r10, %r11, %r12, %r13}")])
def test_vectors_keep_their_order(vector, names):
    source, out = tensor(X), tensor(np.zeros_like(X))
    size = 4 * int(vector[2])
    launch(
        f"{THREAD}ld.param.u64 %rd2, [p1];\nmad.wide.u32 %rd3, %r1, {size}, %rd1;\n"
        f"mad.wide.u32 %rd4, %r1, {size}, %rd2;\n"
        f"ld.global{vector}.b32 {names}, [%rd3];\nst.global{vector}.b32 [%rd4 + 0], {names};",
        [source, out],
    )
    moved = 32 * size
    assert torch.equal(out[:moved], source[:moved])
    assert not out[moved:].any()


def test_narrow_loads_extend_by_their_type():
    source, out = tensor(np.uint8([0x80] * 32)), tensor(np.zeros(64, np.uint32))
    launch(
        f"{THREAD}ld.param.u64 %rd2, [p1];\ncvt.u64.u32 %rd5, %r1;\nadd.s64 %rd3, %rd1, %rd5;\n"
        "mad.wide.u32 %rd4, %r1, 8, %rd2;\n"
        "ld.global.s8 %rs1, [%rd3];\nld.global.u8 %rs2, [%rd3];\ncvt.s32.s16 %r2, %rs1;\ncvt.u32.u16 %r3, %rs2;\n"
        "st.global.b32 [%rd4], %r2;\nst.global.b32 [%rd4+4], %r3;",
        [source, out],
    )
    assert out.numpy().view(np.int32).tolist() == [-128, 128] * 32


def test_shared_memory_that_no_one_wrote_is_nan():
    out = tensor(np.zeros(32, np.float32))
    launch(THREAD + "ld.shared.b32 %r2, [%r9];\nmad.wide.u32 %rd2, %r1, 4, %rd1;\nst.global.b32 [%rd2], %r2;", [out])
    assert np.isnan(out.numpy().view(np.float32)).all()


def test_out_of_bounds_names_tensor_thread_and_line():
    with pytest.raises(
        OutOfBounds, match=r"0 bytes past the end of t0.*snippet.py:1.*block \(0, 0, 0\), thread 16"
    ) as info:
        launch(THREAD + "mad.wide.u32 %rd2, %r1, 4, %rd1;\nld.global.b32 %r2, [%rd2];", [tensor(X[:16])])
    assert (info.value.thread, info.value.tensor, info.value.kernel) == (16, "t0", "snippet")


def test_out_of_bounds_before_the_tensor_and_between_tensors():
    for offset, words in ((-4, "4 bytes before t0"), (64, "0 bytes past the end of t0"), (4096, "before t1")):
        with pytest.raises(OutOfBounds, match=words):
            launch(THREAD + f"ld.global.b32 %r2, [%rd1+{offset}];", [tensor(X[:16]), tensor(X[:16])])


def test_threads_that_are_predicated_off_may_point_anywhere():
    source, out = tensor(X[:16] + 1), tensor(np.zeros(32, np.uint32))
    body = THREAD + "setp.lt.u32 %p1, %r1, 16;\nmad.wide.u32 %rd2, %r1, 4, %rd1;\n@%p1 ld.global.b32 %r2, [%rd2];\n"
    body += "ld.param.u64 %rd1, [p1];\nmad.wide.u32 %rd2, %r1, 4, %rd1;\n@%p1 st.global.b32 [%rd2], %r2;"
    launch(body, [source, out])
    assert out.numpy().view(np.uint32).tolist() == [*range(1, 17), *[0] * 16]


def test_misaligned():
    with pytest.raises(Misaligned, match="misaligned 16-byte access to global memory"):
        launch(THREAD + "ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd1+4];", [tensor(X)])
    with pytest.raises(Misaligned, match="misaligned 4-byte access to shared memory"):
        launch(THREAD + "ld.shared.b32 %r2, [%r9+2];", [tensor(X)])


def test_shared_out_of_bounds():
    with pytest.raises(OutOfBounds, match="shared memory at byte 64 of 64"):
        launch(THREAD + "ld.shared.b32 %r2, [%r9+64];", [tensor(X)], shared=64)


def test_a_fault_leaves_the_tensors_as_they_were():
    x = tensor(X[:16])
    with pytest.raises(OutOfBounds):
        launch(THREAD + "st.global.b32 [%rd1], 7;\nld.global.b32 %r2, [%rd1+4096];", [x])
    assert torch.equal(x, tensor(X[:16]))


@pytest.mark.parametrize("text", ["tcgen05.alloc.cta_group::1.sync.aligned.b32 [%r1], 32",
                                  "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r1}, {%r1}, {%r1}, {%r1}",
                                  "add.rz.f32 %r1, %r1, %r1", "dp4a.u32.u32 %r1, %r1, %r1, %r1",
                                  "max.xorsign.abs.f32 %r1, %r1, %r1"],
)  # fmt: skip
def test_what_is_not_known_is_refused_with_its_text(text):
    with pytest.raises(Unimplemented, match=text.split()[0].replace(".", r"\.")):
        launch(text + ";", [])


# Races

WRITE_OWN = "shl.b32 %r2, %r1, 2;\nadd.u32 %r2, %r2, %r9;\nst.shared.b32 [%r2], %r1;\n"
READ_NEIGHBOUR = "xor.b32 %r3, %r1, 32;\nshl.b32 %r3, %r3, 2;\nadd.u32 %r3, %r3, %r9;\nld.shared.b32 %r4, [%r3];\n"
OUT = "mad.wide.u32 %rd2, %r1, 4, %rd1;\nst.global.b32 [%rd2], %r4;\n"
BARRIER = "bar.sync 0;\n"


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_exchange_between_warps(seed):
    out = tensor(np.zeros(64, np.uint32))
    launch(THREAD + WRITE_OWN + BARRIER + READ_NEIGHBOUR + OUT, [out], threads=64, seed=seed)
    assert out.numpy().view(np.uint32).tolist() == [i ^ 32 for i in range(64)]


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_read_after_write_race_names_both_sides(seed):
    with pytest.raises(SharedMemoryRace, match=r"(reads what warp \d wrote|overwrites what warp \d read)") as info:
        launch(THREAD + WRITE_OWN + READ_NEIGHBOUR + OUT, [tensor(np.zeros(64, np.uint32))], threads=64, seed=seed)
    assert "st.shared.b32" in str(info.value)
    assert "ld.shared.b32" in str(info.value)


@pytest.mark.parametrize("seed", [None, 0])
def test_write_after_read_race(seed):
    with pytest.raises(SharedMemoryRace, match=r"overwrites what|reads what"):
        launch(THREAD + WRITE_OWN + BARRIER + READ_NEIGHBOUR + WRITE_OWN, [tensor(X)], threads=64, seed=seed)


def test_write_after_several_warps_read():
    body = THREAD + "ld.shared.b32 %r4, [%r9];\nsetp.eq.u32 %p1, %r1, 0;\n@%p1 st.shared.b32 [%r9], %r1;"
    with pytest.raises(SharedMemoryRace, match="overwrites what several warps read"):
        launch(body, [tensor(X)], threads=64)
    launch(body, [tensor(X)], threads=32)  # one warp is ordered by its program


def test_two_warps_may_write_one_value_but_not_two():
    launch(THREAD + "st.shared.b32 [%r9], 5;", [tensor(X)], threads=64)
    with pytest.raises(SharedMemoryRace, match=r"writes what warp \d writes too"):
        launch(THREAD + "st.shared.b32 [%r9], %r1;", [tensor(X)], threads=64)


def test_a_barrier_of_one_block_does_not_order_another():
    out = tensor(np.zeros(128, np.uint32))
    body = THREAD + "mov.u32 %r20, %ctaid.x;\n" + WRITE_OWN + BARRIER + READ_NEIGHBOUR
    body += "mad.lo.u32 %r21, %r20, 64, %r1;\nadd.u32 %r4, %r4, %r20;\n"
    body += "mad.wide.u32 %rd2, %r21, 4, %rd1;\nst.global.b32 [%rd2], %r4;"
    launch(body, [out], threads=64, blocks=2)
    assert out.numpy().view(np.uint32).tolist() == [(i ^ 32) + b for b in range(2) for i in range(64)]


# Atomics


@pytest.mark.parametrize(
    ("operation", "value", "start", "expected"),
    [
        ("add.u32", "%r1", 5, 5 + sum(range(64))),
        ("min.u32", "%r1", 5, 0),
        ("max.u32", "%r1", 5, 63),
        ("min.s32", "%r1", 2**32 - 5, 2**32 - 5),
        ("and.b32", "%r1", 7, 0),
        ("or.b32", "%r1", 64, 127),
        ("xor.b32", "%r1", 1, 1),
        ("inc.u32", "40", 0, 64 - 41),
        ("dec.u32", "40", 0, 41 - 64 + 41),
    ],
)
def test_reductions(operation, value, start, expected):
    cell = tensor(np.uint32([start]))
    launch(
        THREAD + f"red.global.gpu.relaxed.{operation} [%rd1], {value};".replace("gpu.relaxed", "relaxed.gpu"),
        [cell],
        threads=64,
    )
    assert cell.numpy().view(np.uint32)[0] == expected


def test_atomics_return_what_was_there_each_value_once():
    cell, out = tensor(np.uint32([0])), tensor(np.zeros(64, np.uint32))
    launch(
        THREAD + "ld.param.u64 %rd2, [p1];\nmad.wide.u32 %rd2, %r1, 4, %rd2;\n"
        "atom.global.acq_rel.gpu.add.u32 %r4, [%rd1], 2;\n"
        "st.global.b32 [%rd2], %r4;",
        [cell, out],
        threads=64,
    )
    assert sorted(out.numpy().view(np.uint32)) == list(range(0, 128, 2))


def test_compare_and_swap_succeeds_once():
    cell, out = tensor(np.uint32([7])), tensor(np.zeros(64, np.uint32))
    launch(
        THREAD + "ld.param.u64 %rd2, [p1];\nmad.wide.u32 %rd2, %r1, 4, %rd2;\nadd.u32 %r5, %r1, 100;\n"
        "atom.global.cas.b32 %r4, [%rd1], 7, %r5;\nst.global.b32 [%rd2], %r4;",
        [cell, out],
        threads=64,
    )
    seen = out.numpy().view(np.uint32)
    assert (seen == 7).sum() == 1
    assert cell.numpy().view(np.uint32)[0] == 100 + int(np.flatnonzero(seen == 7)[0])


def test_float_atomics():
    cells = tensor(np.float32([0, 0, 0, 0]))
    launch(THREAD + "red.global.add.v4.f32 [%rd1], {0f3F800000, 0f40000000, 0f40400000, 0f3F000000};", [cells])
    assert cells.numpy().view(np.float32).tolist() == [32, 64, 96, 16]
    halves = tensor(np.float16([0.5, 1]))
    launch(THREAD + "mov.b32 %r2, 0x3C003800;\nred.global.add.noftz.f16x2 [%rd1], %r2;", [halves])
    assert halves.numpy().view(np.float16).tolist() == [16.5, 33]


def test_shared_atomics_do_not_race_with_each_other_but_with_reads():
    body = (
        THREAD
        + "setp.eq.u32 %p1, %r1, 0;\n@%p1 st.shared.b32 [%r9], 0;\n"
        + BARRIER
        + "atom.shared.add.u32 %r4, [%r9], 1;\n"
    )
    out = tensor(np.zeros(64, np.uint32))
    launch(body + BARRIER + "ld.shared.b32 %r4, [%r9];\n" + OUT, [out], threads=64)
    assert (out.numpy().view(np.uint32) == 64).all()
    with pytest.raises(SharedMemoryRace, match="an atomic"):
        launch(body + "ld.shared.b32 %r4, [%r9];\n" + OUT, [out], threads=64)


LOCAL = ".local .align 4 .b8 depot[16];\n.reg .b64 %own;\nmov.b64 %own, depot;\n"
PLACE = "mad.wide.u32 %rd3, %r1, 4, %rd1;\n"


@pytest.mark.parametrize("seed", [None, 3])
def test_each_thread_has_local_memory_of_its_own(seed):
    """Also in a branch that half of the threads take, and after it."""
    out = tensor(np.zeros(128, np.uint32))
    body = (
        f"{LOCAL}{THREAD}{PLACE}st.local.b32 [%own+8], %r1;\nsetp.lt.u32 %p1, %r1, 40;\n@%p1 bra $L;\n"
        "cvt.u32.u64 %r3, %own;\nst.local.b32 [%r3+8], 7;\n$L:\nbar.sync 0;\nld.local.b32 %r2, [%own+8];\n"
        "st.global.b32 [%rd3], %r2;"
    )
    launch(body, [out], threads=128, seed=seed)
    assert out.numpy().view(np.uint32).tolist() == [*range(40)] + [7] * 88


@pytest.mark.parametrize(
    ("access", "error", "words"),
    [
        ("ld.local.b32 %r2, [%own+16]", OutOfBounds, "out-of-bounds 4-byte access to local memory at byte 16 of 16"),
        ("ld.local.b32 %r2, [%own+-4]", OutOfBounds, "at byte -4 of 16"),
        ("st.local.b32 [%own+2], %r1", Misaligned, "misaligned 4-byte access to local memory at byte 2"),
    ],
)
def test_local_memory_ends_where_it_was_declared(access, error, words):
    with pytest.raises(error, match=words):
        launch(f"{LOCAL}{THREAD}{access};", [tensor(np.zeros(32, np.uint32))])
