"""Reads a compiled kernel (a cubin) with the tools inside the triton package: no GPU, no CUDA toolkit."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"

# Machine instructions by class: the part of the name before its first dot.
_CLASSES = {
    "mma": r"HGMMA|HMMA|IMMA|QGMMA|DMMA",
    "special": r"MUFU",
    "float": r"FFMA2?|FMUL2?|FADD2?|FMNMX|FSETP|FSEL|FCHK|HADD2|HMUL2|HFMA2|HMNMX2",
    "convert": r"F2FP|F2F|I2F\w*|F2I",
    "global": r"LDG|STG|LD|ST",
    "copy": r"LDGSTS|LDGDEPBAR|UBLKCP|UTMA\w*",
    "shared": r"LDS|STS|LDSM|STSM|MATCH",
    "atomic": r"RED|REDG|ATOM|ATOMG|ATOMS",
    "spill": r"LDL|STL",
    "shuffle": r"SHFL|VOTE|VOTEU|REDUX|MOVM",
    "barrier": r"BAR|WARPSYNC|WARPGROUP|DEPBAR|SYNCS|FENCE|MEMBAR|BSSY|BSYNC|R2UR|ERRBAR",
    "branch": r"BRA|EXIT|RET|CALL|BREAK|NANOSLEEP",
    "move": r"MOV|UMOV|CS2R|S2R|S2UR|SEL|USEL|PRMT|NOP",
}
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;")


@dataclass(frozen=True)
class MachineCode:
    """registers per thread; spilled bytes per thread; instructions in all; names of the main loop's, with counts."""

    registers: int
    spilled: int
    instructions: int
    loop_names: dict

    @property
    def loop(self):
        """The main loop's instructions by class."""
        classes = Counter()
        for name, count in self.loop_names.items():
            classes[class_of(name)] += count
        return dict(classes)


def inspect(cubin, name):
    """The MachineCode of kernel `name`.

    Its main loop is the largest one; or, where loops multiply matrices, the smallest of these: the form of attention's
    loop without a mask, which most tiles go through.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        listing = _tool("nvdisasm", "-c", file.name)
    registers, stack = re.search(rf"Function {name}:\s*REG:(\d+) STACK:(\d+)", usage).groups()
    names, loops = _loops(listing, name)
    with_mma = [loop for loop in loops if any(class_of(n) == "mma" for n in names[slice(*loop)])]
    innermost = [
        a for a in with_mma or loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in with_mma or loops)
    ]
    choose = min if with_mma else max
    start, end = choose(innermost, key=lambda loop: loop[1] - loop[0], default=(0, 0))
    stems = Counter(instruction.partition(".")[0] for instruction in names[start:end])
    return MachineCode(int(registers), int(stack), len(names), dict(stems))


def class_of(name):
    """The class of a machine instruction; what no class names is integer arithmetic."""
    stem = name.partition(".")[0]
    return next((label for label, pattern in _CLASSES.items() if re.fullmatch(pattern, stem)), "integer")


def _tool(name, *arguments):
    return subprocess.run([_TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def _loops(listing, name):
    """The kernel's instruction names, and the (start, end) of each backward branch."""
    names, labels, branches = [], {}, []
    for line in listing[listing.index(f".text.{name},") :].split("\n")[1:]:
        label, found = re.match(r"^(\.L_x_\d+):", line), _INSTRUCTION.match(line)
        if re.match(r"\s*\.section\s", line):
            break
        if label:
            labels[label[1]] = len(names)
        elif found:
            target = re.search(r"\.L_x_\d+", found[2])
            if found[1].startswith("BRA") and target:
                branches.append((target[0], len(names)))
            names.append(found[1])
    while names and names[-1].startswith(("NOP", "BRA")):  # padding after the end
        names.pop()
    loops = [(labels[t], at + 1) for t, at in branches if labels.get(t, len(names)) < at < len(names)]
    # A range with EXIT in it is code that was moved out of line and jumps back.
    return names, [loop for loop in loops if not any(n.startswith("EXIT") for n in names[slice(*loop)])]
