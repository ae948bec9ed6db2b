"""Matrix instructions, one warp or warpgroup, against plain matrix products; and what wgmma must not be used for."""

import re

import numpy as np
import pytest
import torch

from kernels.simulator import AsyncHazard, Unimplemented
from simulator.snippets import launch, tensor

rng = np.random.default_rng(2)
THREAD = "mov.u32 %r1, %tid.x;\nmov.u32 %r9, global_smem;\n"


def to_bits(values, kind):
    """float32 -> the bit patterns of a PTX operand type, and the values that they stand for."""
    if kind == "tf32":
        bits = values.view(np.uint32) & np.uint32(0xFFFFE000)
        return bits, bits.view(np.float32)
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16), values.astype(np.float16).astype(np.float32)
    bits = (values.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def draw(rows, columns, kind):
    return to_bits(rng.standard_normal((rows, columns)).astype(np.float32), kind)


def load_words(register, parameter, count):
    """Each thread gets `count` words of its own from a table [thread][word]."""
    lines = [f"ld.param.u64 %rd1, [p{parameter}];", f"mad.wide.u32 %rd1, %r1, {4 * count}, %rd1;"]
    return "\n".join(lines + [f"ld.global.b32 %r{register + i}, [%rd1+{4 * i}];" for i in range(count)]) + "\n"


def store_words(register, parameter, count):
    lines = [f"ld.param.u64 %rd1, [p{parameter}];", f"mad.wide.u32 %rd1, %r1, {4 * count}, %rd1;"]
    return "\n".join(lines + [f"st.global.b32 [%rd1+{4 * i}], %r{register + i};" for i in range(count)]) + "\n"


def names(first, count):
    return "{" + ", ".join(f"%r{first + i}" for i in range(count)) + "}"


def fragment(bits, places):
    """[thread][register] words: places(lane, register) gives the (row, column) of the first element that it holds."""
    per_word = 4 // bits.itemsize
    words = np.zeros((32, len(places(0)), per_word), bits.dtype)
    for lane in range(32):
        for register, (row, column) in enumerate(places(lane)):
            words[lane, register] = bits[row, column : column + per_word]
    return words.view(np.uint32)[:, :, 0]


def d_of(words, rows=16):
    """The PTX manual's accumulator layout, spelled out: register 2h + e of lane 4g + t is row 8h + g, column 2t + e."""
    out = np.empty((rows, 8), np.float32)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for register in range(4):
            out[8 * (register // 2) + g, 2 * t + register % 2] = words[lane, register]
    return out


# The manual's figures for A and B, per shape: (row, column) of the first element of each register of lane 4g + t.
LAYOUTS = {
    ("m16n8k16", "bf16"): (
        lambda g, t: [(g, 2 * t), (g + 8, 2 * t), (g, 2 * t + 8), (g + 8, 2 * t + 8)],
        lambda g, t: [(g, 2 * t), (g, 2 * t + 8)],
    ),
    ("m16n8k8", "bf16"): (lambda g, t: [(g, 2 * t), (g + 8, 2 * t)], lambda g, t: [(g, 2 * t)]),
    ("m16n8k8", "tf32"): (
        lambda g, t: [(g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)],
        lambda g, t: [(g, t), (g, t + 4)],
    ),
    ("m16n8k4", "tf32"): (lambda g, t: [(g, t), (g + 8, t)], lambda g, t: [(g, t)]),
}
LAYOUTS["m16n8k16", "f16"] = LAYOUTS["m16n8k16", "bf16"]


@pytest.mark.parametrize(("shape", "kind"), LAYOUTS)
def test_mma(shape, kind):
    k = int(shape.split("k")[1])
    (a_bits, a), (b_bits, b) = draw(16, k, kind), draw(8, k, kind)
    a_places, b_places = LAYOUTS[shape, kind]
    a_words = fragment(a_bits, lambda lane: a_places(*divmod(lane, 4)))
    b_words = fragment(b_bits, lambda lane: b_places(*divmod(lane, 4)))
    c_words = rng.standard_normal((32, 4)).astype(np.float32)
    na, nb = a_words.shape[1], b_words.shape[1]
    out = tensor(np.zeros((32, 4), np.float32))
    run = launch(
        THREAD + load_words(10, 0, na) + load_words(20, 1, nb) + load_words(30, 2, 4)
        + f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {names(40, 4)}, {names(10, na)}, {names(20, nb)}, "
        f"{names(30, 4)};\n" + store_words(40, 3, 4),
        [tensor(a_words), tensor(b_words), tensor(c_words), out],
    )  # fmt: skip
    np.testing.assert_allclose(
        d_of(out.numpy().view(np.float32).reshape(32, 4)), a @ b.T + d_of(c_words), rtol=1e-5, atol=1e-5
    )
    assert run.counters.tensor_flops == 2 * 16 * 8 * k


TILES = rng.integers(0, 2**16, (4, 8, 8), np.uint16)
FILL = "".join(  # lane i copies row i of the tiles: 16 bytes
    ["ld.param.u64 %rd1, [p0];\nmad.wide.u32 %rd1, %r1, 16, %rd1;\nld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd1];\n"]
    + ["mad.lo.u32 %r8, %r1, 16, %r9;\nst.shared.v4.b32 [%r8], {%r2, %r3, %r4, %r5};\nbar.warp.sync -1;\n"]
)


@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(transposed):
    out = tensor(np.zeros((32, 4), np.uint32))
    suffix = ".trans" if transposed else ""
    load = f"ldmatrix.sync.aligned.m8n8.x4{suffix}.shared.b16 {names(10, 4)}, [%r8];\n"
    launch(THREAD + FILL + load + store_words(10, 1, 4), [tensor(TILES), out])
    got = out.numpy().view(np.uint16).reshape(32, 4, 2)
    for lane in range(32):
        for i in range(4):
            tile = TILES[i].T if transposed else TILES[i]
            np.testing.assert_array_equal(got[lane, i], tile[lane // 4, 2 * (lane % 4) :][:2])


@pytest.mark.parametrize("transposed", [False, True])
def test_stmatrix_undoes_ldmatrix(transposed):
    out = tensor(np.zeros((32, 4), np.uint32))
    suffix = ".trans" if transposed else ""
    body = f"ldmatrix.sync.aligned.m8n8.x4{suffix}.shared.b16 {names(10, 4)}, [%r8];\nadd.u32 %r7, %r8, 1024;\n"
    body += f"stmatrix.sync.aligned.m8n8.x4{suffix}.shared.b16 [%r7], {names(10, 4)};\n"
    body += f"ld.shared.v4.b32 {names(20, 4)}, [%r7];\n"
    launch(THREAD + FILL + body + store_words(20, 1, 4), [tensor(TILES), out])
    np.testing.assert_array_equal(out.numpy(), TILES.view(np.uint8).reshape(-1))


# wgmma

SWIZZLE = {128: 1, 64: 2, 32: 3}


def shared_image(bits, k_major, width, atom_stride_k, atom_stride_mn):
    """Bytes of an operand [mn, k] in atoms of 8 x `width` bytes, each chunk of 16 bytes moved by the manual's XOR."""
    size = bits.itemsize
    image = np.zeros(16384, np.uint8)
    for mn in range(bits.shape[0]):
        for k in range(bits.shape[1]):
            if k_major:
                at = mn // 8 * atom_stride_mn + mn % 8 * width + k * size
            else:
                per = width // size
                at = mn // per * atom_stride_mn + k // 8 * atom_stride_k + k % 8 * width + mn % per * size
            at ^= at >> 3 & (width - 16)
            image[at : at + size] = bits[mn, k : k + 1].view(np.uint8)
    return image


def descriptor(offset, width, leading, stride):
    # Shared memory starts 1024 bytes into the address space; the instruction adds the base register's own value.
    return (offset >> 4) | (leading >> 4) << 16 | (stride >> 4) << 32 | SWIZZLE[width] << 62


def fill_shared(parameter, to, threads=128):
    """All threads copy 16384 bytes from a tensor to shared memory at `to`."""
    lines = [f"ld.param.u64 %rd1, [p{parameter}];", "mad.wide.u32 %rd1, %r1, 16, %rd1;"]
    lines += [f"mad.lo.u32 %r8, %r1, 16, {to};", "add.u32 %r8, %r8, %r9;"]
    for i in range(16384 // (16 * threads)):
        lines += [f"ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%rd1+{16 * threads * i}];"]
        lines += [f"st.shared.v4.b32 [%r8+{16 * threads * i}], {{%r2, %r3, %r4, %r5}};"]
    return "\n".join(lines) + "\n"


def set_descriptor(register, value):
    return (
        f"shr.u32 %r6, %r9, 4;\ncvt.u64.u32 %rd{register}, %r6;\nmov.b64 %rd9, {value};\n"
        f"add.s64 %rd{register}, %rd{register}, %rd9;\n"
    )


ZERO = "".join(f"mov.b32 %r{100 + i}, 0;\n" for i in range(16))
FENCE, COMMIT, WAIT = (
    "wgmma.fence.sync.aligned;\n",
    "wgmma.commit_group.sync.aligned;\n",
    "wgmma.wait_group.sync.aligned 0;\n",
)
PROXY, BARRIER = "fence.proxy.async.shared::cta;\n", "bar.sync 0;\n"


def wgmma(kind, k, transposes="", scale=1):
    name = f"wgmma.mma_async.sync.aligned.m64n32k{k}.f32.{kind}.{kind}"
    return f"{name} {names(100, 16)}, %rd10, %rd11, {scale}, 1, 1{transposes};\n"


def unpack_accumulator(words):
    """Register 4j + 2h + e of lane 4g + t of warp w is row 16w + 8h + g, column 8j + 2t + e."""
    out = np.empty((64, 32), np.float32)
    for thread in range(128):
        w, g, t = thread // 32, thread % 32 // 4, thread % 4
        for q in range(16):
            out[16 * w + 8 * (q // 2 % 2) + g, 8 * (q // 4) + 2 * t + q % 2] = words[thread, q]
    return out


def operands(kind, a_k_major, b_k_major, width, k):
    """Shared images and descriptors of a 64 x k A and a 32 x k B, and their product."""
    (a_bits, a), (b_bits, b) = draw(64, k, kind), draw(32, k, kind)
    images, descriptors = [], []
    for bits, k_major, offset in ((a_bits, a_k_major, 0), (b_bits, b_k_major, 16384)):
        stride_k, stride_mn = (0, 8 * width) if k_major else (8 * width, 16 * width)
        images.append(tensor(shared_image(bits, k_major, width, stride_k, stride_mn)))
        stride, leading = (stride_mn, 0) if k_major else (stride_k, stride_mn)
        descriptors.append(descriptor(offset, width, leading, stride))
    return images, descriptors, a @ b.T


def prepare(descriptors):
    """Both operands in shared memory, their descriptors in %rd10 and %rd11, a zero accumulator."""
    return (
        THREAD
        + fill_shared(0, 0)
        + fill_shared(1, 16384)
        + set_descriptor(10, descriptors[0])
        + set_descriptor(11, descriptors[1])
        + ZERO
    )


@pytest.mark.parametrize("width", [128, 64, 32])
@pytest.mark.parametrize(
    ("kind", "a_k_major", "b_k_major"),
    [("bf16", True, True), ("bf16", True, False), ("f16", False, True), ("bf16", False, False), ("tf32", True, True)],
)
@pytest.mark.parametrize("seed", [None, 5])
def test_wgmma(kind, a_k_major, b_k_major, width, seed):
    k = 8 if kind == "tf32" else 16
    images, descriptors, product = operands(kind, a_k_major, b_k_major, width, k)
    transposes = "" if kind == "tf32" else f", {int(not a_k_major)}, {int(not b_k_major)}"
    out = tensor(np.zeros((128, 16), np.float32))
    step = wgmma(kind, k, transposes)
    body = prepare(descriptors) + PROXY + BARRIER + FENCE + step + step + COMMIT + WAIT + store_words(100, 2, 16)
    run = launch(body, [*images, out], threads=128, shared=32768, seed=seed)
    got = unpack_accumulator(out.numpy().view(np.float32).reshape(128, 16))
    np.testing.assert_allclose(got, 2 * product, rtol=1e-5, atol=1e-5)
    assert run.counters.tensor_flops == 2 * (2 * 64 * 32 * k)


def test_wgmma_ignores_the_accumulator_where_scale_d_is_zero():
    images, descriptors, product = operands("bf16", True, True, 128, 16)
    out = tensor(np.zeros((128, 16), np.float32))
    step = wgmma("bf16", 16, ", 0, 0", scale=0)
    body = prepare(descriptors).replace("mov.b32 %r100, 0;", "mov.b32 %r100, 0f7FC00000;")
    launch(
        body + PROXY + BARRIER + FENCE + step + COMMIT + WAIT + store_words(100, 2, 16),
        [*images, out],
        threads=128,
        shared=32768,
    )
    np.testing.assert_allclose(
        unpack_accumulator(out.numpy().view(np.float32).reshape(128, 16)), product, rtol=1e-5, atol=1e-5
    )


HAZARDS = {
    "accumulator read before the wait": (
        "",
        "add.f32 %r7, %r100, %r100;",
        r"reads %r100 while the wgmma .* its wait is missing",
    ),
    "accumulator overwritten before the wait": ("", "mov.b32 %r103, 0;", r"overwrites %r103 while the wgmma"),
    "operand overwritten before the wait": (
        "",
        BARRIER + "st.shared.b32 [%r9], %r1;",
        "overwrites shared memory that a wgmma",
    ),
    "operand overwritten after the wait without a barrier": (
        WAIT,
        "st.shared.b32 [%r9+16384], 1;",
        "race: overwrites what several",
    ),
}


@pytest.mark.parametrize("name", HAZARDS)
@pytest.mark.parametrize("seed", [None, 5])
def test_wgmma_is_asynchronous(name, seed):
    wait, harm, message = HAZARDS[name]
    images, descriptors, _ = operands("bf16", True, True, 128, 16)
    body = prepare(descriptors) + PROXY + BARRIER + FENCE + wgmma("bf16", 16, ", 0, 0") + COMMIT + wait + harm
    with pytest.raises(Exception, match=message):
        launch(body, images, threads=128, shared=32768, seed=seed)
    healed = body.replace(COMMIT + wait, COMMIT + WAIT + BARRIER).replace("[%r9], %r1", "[%r9], 1")
    launch(healed, images, threads=128, shared=32768, seed=seed)


def test_an_older_group_may_be_waited_for_alone():
    images, descriptors, _ = operands("bf16", True, True, 128, 16)
    other = wgmma("bf16", 16, ", 0, 0").replace(names(100, 16), names(200, 16))
    body = prepare(descriptors) + ZERO.replace("%r1", "%r2") + PROXY + BARRIER + FENCE
    body += wgmma("bf16", 16, ", 0, 0") + COMMIT + other + COMMIT + "wgmma.wait_group.sync.aligned 1;\n"
    launch(body + "mov.b32 %r7, %r100;", images, threads=128, shared=32768)
    with pytest.raises(AsyncHazard, match="reads %r200"):
        launch(body + "mov.b32 %r7, %r200;", images, threads=128, shared=32768)


@pytest.mark.parametrize(
    ("missing", "message"),
    [(PROXY, "no fence.proxy.async between"), (BARRIER, "reads what warp"), (FENCE, "since the last wgmma.fence")],
    ids=["proxy fence", "barrier", "wgmma.fence"],
)
def test_what_wgmma_needs_before_it(missing, message):
    images, descriptors, _ = operands("bf16", True, True, 128, 16)
    body = prepare(descriptors) + PROXY + BARRIER + FENCE + wgmma("bf16", 16, ", 0, 0") + COMMIT + WAIT
    with pytest.raises(Exception, match=message):
        launch(body.replace(missing, ""), images, threads=128, shared=32768)


def test_the_reader_may_fence_after_the_barrier_instead():
    images, descriptors, product = operands("bf16", True, True, 128, 16)
    out = tensor(np.zeros((128, 16), np.float32))
    body = prepare(descriptors) + BARRIER + PROXY + FENCE + wgmma("bf16", 16, ", 0, 0") + COMMIT + WAIT
    launch(body + store_words(100, 2, 16), [*images, out], threads=128, shared=32768)
    got = unpack_accumulator(out.numpy().view(np.float32).reshape(128, 16))
    np.testing.assert_allclose(got, product, rtol=1e-5, atol=1e-5)


def test_copied_operands_need_the_fence_too_unless_the_compiler_never_writes_it():
    images, descriptors, _ = operands("bf16", True, True, 128, 16)
    copies = fill_shared(0, 0) + fill_shared(1, 16384)
    copies = re.sub(r"ld\.global[^;]*, (\[[^]]*\]);\nst\.shared\.v4\.b32 (\[[^]]*\])[^;]*;", copy_of, copies)
    body = prepare(descriptors).replace(fill_shared(0, 0) + fill_shared(1, 16384), copies) + "cp.async.wait_all;\n"
    body += BARRIER + FENCE + wgmma("bf16", 16, ", 0, 0") + COMMIT + WAIT
    with pytest.raises(AsyncHazard, match=r"what `cp.async.* wrote, with no fence.proxy.async"):
        launch(body, images, threads=128, shared=32768)
    launch(body, images, threads=128, shared=32768, copies_need_fence=False)


def copy_of(load_and_store):
    return f"cp.async.cg.shared.global {load_and_store[2]}, {load_and_store[1]}, 16;"


def test_forms_that_no_kernel_needs_yet_are_refused():
    images, descriptors, _ = operands("bf16", True, True, 128, 16)
    with pytest.raises(Unimplemented, match="e4m3"):
        launch(prepare(descriptors) + wgmma("bf16", 16).replace("bf16.bf16", "e4m3.e4m3"), images, threads=128)


# cp.async

COPY = "ld.param.u64 %rd1, [p0];\nmad.wide.u32 %rd1, %r1, 16, %rd1;\nmad.lo.u32 %r8, %r1, 16, %r9;\n"
COPY += "cp.async.cg.shared.global [%r8], [%rd1], 16, {size};\ncp.async.commit_group;\n"
READ = "xor.b32 %r2, %r1, 32;\nmad.lo.u32 %r2, %r2, 16, %r9;\nld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r2];\n"
DATA = rng.integers(0, 2**32, (64, 4), np.uint32)


@pytest.mark.parametrize("seed", [None, 1])
def test_cp_async(seed):
    out = tensor(np.zeros((64, 4), np.uint32))
    body = THREAD + COPY.format(size=16) + "cp.async.wait_group 0;\n" + BARRIER + READ + store_words(10, 1, 4)
    launch(body, [tensor(DATA), out], threads=64, seed=seed)
    np.testing.assert_array_equal(out.numpy().view(np.uint32).reshape(64, 4), DATA[np.arange(64) ^ 32])


def test_cp_async_fills_what_it_does_not_read_with_zeros():
    for size in (0, 8):
        out = tensor(np.ones((64, 4), np.uint32))
        body = THREAD + COPY.format(size=size) + "cp.async.wait_all;\n" + BARRIER + READ + store_words(10, 1, 4)
        launch(body, [tensor(DATA), out], threads=64)
        expected = np.where(np.arange(4) < size // 4, DATA[np.arange(64) ^ 32], 0)
        np.testing.assert_array_equal(out.numpy().view(np.uint32).reshape(64, 4), expected)


def test_cp_async_does_not_read_out_of_bounds_where_it_reads_nothing():
    out = tensor(np.ones((64, 4), np.uint32))
    body = THREAD + COPY.format(size=0) + "cp.async.wait_all;\n" + BARRIER + READ + store_words(10, 1, 4)
    launch(body, [tensor(DATA[:1]), out], threads=64)
    assert not out.any()


@pytest.mark.parametrize(
    ("wait", "message"),
    [
        ("", "still fills: its wait is missing"),
        ("cp.async.wait_group 1;\n" + BARRIER, "still fills: its wait is missing"),
        ("cp.async.wait_group 0;\n", r"race: reads what warp \d wrote"),
        (BARRIER + "cp.async.wait_group 0;\n", r"race: reads what warp \d wrote"),
    ],
    ids=["no wait", "too weak", "no barrier", "barrier before the wait"],
)
def test_copies_need_a_wait_and_then_a_barrier(wait, message):
    with pytest.raises(Exception, match=message):
        launch(THREAD + COPY.format(size=16) + wait + READ, [tensor(DATA)], threads=64)


def test_the_owner_too_must_wait():
    own = "ld.shared.v4.b32 {%r10, %r11, %r12, %r13}, [%r8];\n"
    with pytest.raises(AsyncHazard, match="still fills"):
        launch(THREAD + COPY.format(size=16) + own, [tensor(DATA)], threads=64)
    launch(THREAD + COPY.format(size=16) + "cp.async.wait_group 0;\n" + own, [tensor(DATA)], threads=64)


def test_torch_and_the_simulator_agree_on_bf16_bits():
    values = torch.randn(64)
    bits, _ = to_bits(values.bfloat16().float().numpy(), "bf16")
    np.testing.assert_array_equal(bits, values.bfloat16().view(torch.int16).numpy().view(np.uint16))
