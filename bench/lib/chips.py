"""Published figures of the chips, from which `kernel_report.py` derives bounds. None of them was measured here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Rates are per multiprocessor and clock unless they say otherwise.

    clock: Hz at which the datasheet's tensor peak is reached. tensor: dense bf16 or fp16 FLOPs, multiply and add
    counted as two. fma: fp32 multiply-adds. special: results of the exponential unit. issue: warp instructions.
    shared: bytes. l2: bytes per clock of the whole chip. hbm: bytes per second. The rest limits resident blocks.
    """

    name: str
    multiprocessors: int
    clock: float
    tensor: int
    fma: int
    special: int
    issue: int
    shared: int
    l2: int
    hbm: float
    registers: int
    shared_memory: int
    threads: int
    blocks: int


_A100, _H100 = "A100 whitepaper and datasheet (SXM, 80 GB)", "H100 whitepaper and datasheet (SXM5)"
_GUIDE = "CUDA C++ Programming Guide, throughput of arithmetic instructions"
_LIMITS = "CUDA C++ Programming Guide, technical specifications per compute capability"

CHIPS = {
    "sm_80": Chip(
        name="A100 SXM 80 GB",
        multiprocessors=108,
        clock=1.41e9,
        tensor=2048,
        fma=64,
        special=16,
        issue=4,
        shared=128,
        l2=5120,
        hbm=2.039e12,
        registers=65536,
        shared_memory=164 * 1024,
        threads=2048,
        blocks=32,
    ),
    "sm_90": Chip(
        name="H100 SXM",
        multiprocessors=132,
        clock=1.83e9,
        tensor=4096,
        fma=128,
        special=16,
        issue=4,
        shared=128,
        l2=5120,
        hbm=3.35e12,
        registers=65536,
        shared_memory=228 * 1024,
        threads=2048,
        blocks=32,
    ),
}

SOURCES = {
    "multiprocessors": (_A100, _H100),
    "clock": (_A100, "the H100 datasheet's 989.4 TFLOP/s over multiprocessors times tensor"),
    "tensor": (_A100, _H100),
    "fma": (_GUIDE, _GUIDE),
    "special": (_GUIDE, _GUIDE),
    "issue": ("four schedulers, one instruction a clock each: " + _A100, _H100),
    "shared": (_GUIDE, _GUIDE),
    "l2": (_A100, "NVIDIA publishes none; the A100's is assumed"),
    "hbm": (_A100, _H100),
    "registers": (_LIMITS, _LIMITS),
    "shared_memory": (_LIMITS, _LIMITS),
    "threads": (_LIMITS, _LIMITS),
    "blocks": (_LIMITS, _LIMITS),
}


def bounds(chip, counters, least_bytes):
    """Seconds that each resource of a whole chip would need for what a launch did, if nothing else held it up.

    counters: kernels.simulator's. Instructions are PTX instructions without moves and parameter loads, which mostly
    vanish in the machine code: an estimate. The others are the launch's own counts over the published rate.
    """
    machine = chip.multiprocessors * chip.clock
    executed = counters.instructions
    issued = sum(n for name, n in executed.items() if name not in ("move", "param_ld"))
    sectors = counters.sectors_read + counters.sectors_written
    return {
        "matrix units": counters.tensor_flops / (machine * chip.tensor),
        "fp32 units": 32 * executed.get("float", 0) / (machine * chip.fma),
        "exponential unit": 32 * executed.get("special", 0) / (machine * chip.special),
        "issue slots": issued / (machine * chip.issue),
        "shared memory": counters.shared_wavefronts * 128 / (machine * chip.shared),
        "L2": 32 * sectors / (chip.clock * chip.l2),
        "HBM": least_bytes / chip.hbm,
    }


def resident_blocks(chip, registers, shared, num_warps):
    """How many blocks of a kernel one multiprocessor holds at a time, and what limits it."""
    # Registers are given out to warps in units of 256, shared memory with 1 KiB reserved for each block.
    per_warp = -(-max(registers, 1) * 32 // 256) * 256
    limits = {
        "registers": chip.registers // per_warp // num_warps,
        "shared memory": chip.shared_memory // (-(-shared // 128) * 128 + 1024),
        "threads": chip.threads // (32 * num_warps),
        "blocks": chip.blocks,
    }
    limit = min(limits, key=limits.get)
    return limits[limit], limit
