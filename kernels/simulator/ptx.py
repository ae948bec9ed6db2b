"""Reads PTX: the text of one kernel becomes a list of instructions whose operands are resolved.

Only the shape of the language is known here (directives, scopes, labels, operands); what an instruction does stands in
`instructions/`. Names follow the PTX ISA manual.
"""

import re
from dataclasses import dataclass, field

import numpy as np

from .errors import SimulatorError

# The numpy type in which a register's bits are read as a PTX type. Types without a numpy equivalent are read as bits.
TYPES = {
    name: np.dtype(kind)
    for name, kind in {
        "pred": "?", "b8": "u1", "u8": "u1", "s8": "i1", "b16": "u2", "u16": "u2", "s16": "i2", "f16": "f2", "bf16":
        "u2", "b32": "u4", "u32": "u4", "s32": "i4", "f32": "f4", "f16x2": "u4", "bf16x2": "u4", "tf32": "u4",
        "b64": "u8", "u64": "u8", "s64": "i8", "f64": "f8", "f32x2": "u8",
    }.items()
}  # fmt: skip


@dataclass(frozen=True)
class Register:
    name: str
    index: int
    type: str


@dataclass(frozen=True)
class Immediate:
    """A literal: an int, or the bits of a float together with their width."""

    value: int
    float_bits: int = 0


@dataclass(frozen=True)
class Special:
    """A read-only register such as %tid.x."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """A name: a shared-memory array, a parameter, a label."""

    name: str


@dataclass(frozen=True)
class Address:
    """`[base + offset]`; the base is a Register, a Symbol or an Immediate."""

    base: object
    offset: int


@dataclass(frozen=True)
class Box:
    """`[map, {a, b, ...}]`: a place in a tensor that a tensor map describes, its coordinates innermost first."""

    map: object
    coordinates: tuple


@dataclass(frozen=True)
class Vector:
    """`{a, b, ...}`"""

    items: tuple


@dataclass(frozen=True)
class Pair:
    """`a|b`: a result and the predicate that says whether it is valid."""

    first: object
    second: object


@dataclass(eq=False)
class Instruction:
    """One instruction. `opcode` is its first word, `modifiers` the dotted rest: add.s32 -> "add", ("s32",)."""

    opcode: str
    modifiers: tuple
    operands: tuple
    predicate: Register | None
    negated: bool
    file: int
    line: int
    text: str
    callers: tuple = ()  # "file.py:12" of the calls that were inlined, innermost first
    index: int = -1
    targets: tuple = ()  # of a branch: the indices of the instructions it may go to

    @property
    def type(self):
        return self.modifiers[-1]

    @property
    def target(self):
        return self.targets[0] if self.targets else -1

    def has(self, *names):
        return any(name in self.modifiers for name in names)


@dataclass
class Parameter:
    name: str
    type: str  # "map": 128 bytes that describe a tensor


@dataclass
class Kernel:
    """A parsed kernel: `name`, `parameters`, `registers`, `instructions`, `block_size` (threads), `target`
    ("sm_90a")."""

    name: str
    parameters: list
    block_size: int
    target: str
    files: dict
    registers: list = field(default_factory=list)
    instructions: list = field(default_factory=list)
    labels: dict = field(default_factory=dict)
    symbols: dict = field(default_factory=dict)  # shared and local arrays: name -> byte offset
    tables: dict = field(default_factory=dict)  # the module's own arrays in global memory: name -> bytes
    local_bytes: int = 0
    max_registers: int | None = None  # of a thread, where the module says so

    @property
    def maps(self):
        """The names of the parameters that are tensor maps."""
        return [parameter.name for parameter in self.parameters if parameter.type == "map"]

    def where(self, instruction):
        """The Python line, and those that called it where it was inlined."""
        return ", called at ".join(
            (f"{self.files.get(instruction.file, '?')}:{instruction.line}", *instruction.callers)
        )


_TARGETS = re.compile(r"(\$?\w+):\s*\.branchtargets\s+([^;]*);")
_ENTRY = re.compile(r"\.entry\s+([\w$.]+)\s*\((.*?)\)(.*?)\{\n", re.S)
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)")
_CALLER = re.compile(r"@\[ ([^\s:]+:\d+)")
_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]*)"')
_LABEL = re.compile(r"^([$\w]+):\s*")
_GUARD = re.compile(r"^@(!?)\s*([%\w$]+)\s+")
_INTEGER = re.compile(r"^-?(0[xX][0-9a-fA-F]+|\d+)U?$")
_DECIMAL = re.compile(r"^-?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][+-]?\d+)?$")  # of double precision, as inline PTX has it
_TABLE = re.compile(r"\.global\s+(?:\.align\s+\d+\s+)?\.[bu]8\s+([\w$]+)\[\d+\]\s*=\s*\{([^}]*)\}")
_SPECIAL = re.compile(r"^%(n?tid|n?ctaid|n?clusterid|cluster_n?ctaid)\.[xyz]$|^%(laneid|n?warpid|n?smid|clock(64)?)$")


def parse(text):
    """The Kernel that a PTX module holds; Triton emits one per module. Raises SimulatorError where the text is none."""
    text = re.split(r"\n\t\.section", text)[0]
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    entry = _ENTRY.search(text)
    if entry is None:
        raise SimulatorError("parse: found no .entry; PTX of one kernel is required")
    name, parameters, directives = entry.groups()
    size = [int(n) for n in re.search(r"\.(?:reqntid|maxntid)\s+([\d, ]+)", directives)[1].split(",")]
    kernel = Kernel(
        name=name,
        parameters=[_parameter(p) for p in _split(parameters)],
        block_size=int(np.prod(size)),
        target=re.search(r"\.target\s+(\w+)", text)[1],
        files={int(number): path for number, path in _FILE.findall(text)},
    )
    most = re.search(r"\.maxnreg\s+(\d+)", directives)
    kernel.max_registers = int(most[1]) if most else None
    for symbol in re.findall(r"\.extern \.shared [^;]*?\b(\w+)\[\]", text[: entry.start()]):
        kernel.symbols[symbol] = 0
    for symbol, numbers in _TABLE.findall(text[: entry.start()]):
        kernel.tables[symbol] = bytes(int(number, 0) for number in numbers.split(","))
    _Body(kernel).read(text[entry.end() :])
    return kernel


def _parameter(text):
    array = re.match(r"\.param \.align \d+ \.b8 (\w+)\[128\]", text)
    if array:
        return Parameter(array[1], "map")
    words = text.split()
    return Parameter(words[-1], words[1][1:])


def _split(text):
    """Splits at the commas that stand outside brackets."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return parts + [last] if last else parts


class _Body:
    """Reads the lines between a kernel's braces. Inline assembly opens scopes of its own: names resolve inside out."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.scopes = [{}]  # per open brace: name -> Register
        self.labels = [{}]  # per open brace: name -> index of an instruction
        self.tables = {}  # of brx: name -> labels
        self.branches = []  # (instruction, labels, the label scopes that were open)
        self.file, self.line, self.callers = 0, 0, ()

    def read(self, body):
        self.tables = {name: re.split(r"[,\s]+", labels.strip()) for name, labels in _TARGETS.findall(body)}
        body = _TARGETS.sub("", body)
        for raw in body.split("\n"):
            line, _, comment = raw.partition("//")
            line = line.strip()
            location = _LOC.match(line)
            if location:
                self.file, self.line = int(location[1]), int(location[2])
                self.callers = tuple(_CALLER.findall(comment))
            elif line:
                self._statements(line)
        for instruction, labels, scopes in self.branches:
            instruction.targets = tuple(self._place(label, scopes, instruction) for label in labels)
        self.kernel.labels = self.labels[0]

    def _place(self, label, scopes, instruction):
        found = [scope[label] for scope in scopes if label in scope]
        if not found:
            raise SimulatorError(f"{self.kernel.name}: no label {label} for `{instruction.text}`")
        return found[-1]

    def _statements(self, line):
        while line := line.strip():
            label = _LABEL.match(line)
            if line[0] == "{":
                self.scopes.append({})
                self.labels.append({})
                line = line[1:]
            elif line[0] == "}":
                if len(self.scopes) > 1:
                    self.scopes.pop()
                    self.labels.pop()
                line = line[1:]
            elif label:
                self.labels[-1][label[1]] = len(self.kernel.instructions)
                line = line[label.end() :]
            else:
                statement, semicolon, line = line.partition(";")
                if semicolon and statement.strip():
                    self._statement(statement.strip())

    def _statement(self, text):
        if text.startswith(".reg"):
            self._declare(text)
        elif text.startswith(".local"):
            array = re.match(r"\.local\s+(?:\.align\s+\d+\s+)?\.b8\s+(\w+)\[(\d+)\]", text)
            self.kernel.symbols[array[1]] = self.kernel.local_bytes
            self.kernel.local_bytes += -(-int(array[2]) // 16) * 16
        elif not text.startswith("."):  # .pragma and other directives change no result
            self._instruction(text)

    def _declare(self, text):
        _, kind, names = text.split(None, 2)
        for name in names.split(","):
            many = re.match(r"([%\w$]+)<(\d+)>", name.strip())
            for declared in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]:
                register = Register(declared, len(self.kernel.registers), kind[1:])
                self.kernel.registers.append(register)
                self.scopes[-1][declared] = register

    def _instruction(self, text):
        guard = _GUARD.match(text)
        rest = text[guard.end() :] if guard else text
        name, _, arguments = rest.replace("\t", " ").partition(" ")
        opcode, *modifiers = name.split(".")
        modifiers = tuple(m.partition("::")[0] if m.startswith("shared::") else m for m in modifiers)
        instruction = Instruction(
            opcode=opcode,
            modifiers=modifiers,
            operands=() if opcode == "bra" else tuple(self._operand(a) for a in _split(arguments)),
            predicate=self._register(guard[2]) if guard else None,
            negated=bool(guard and guard[1]),
            file=self.file,
            line=self.line,
            callers=self.callers,
            text=re.sub(r"\s+", " ", text),
            index=len(self.kernel.instructions),
        )
        if opcode == "bra":
            self.branches.append((instruction, [arguments.strip()], list(self.labels)))
        if opcode == "brx":
            table = instruction.operands[1].name
            if table not in self.tables:
                raise SimulatorError(f"{self.kernel.name}: no .branchtargets {table} for `{instruction.text}`")
            self.branches.append((instruction, self.tables[table], list(self.labels)))
        self.kernel.instructions.append(instruction)

    def _register(self, name):
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        raise SimulatorError(f"{self.kernel.name}: register {name} is not declared")

    def _operand(self, text):
        text = text.strip()
        if text[0] == "{":
            return Vector(tuple(self._operand(item) for item in _split(text[1:-1])))
        if text[0] == "[":
            return self._address(text[1:-1])
        if "|" in text:
            first, second = text.split("|")
            return Pair(self._operand(first), self._operand(second))
        if _INTEGER.match(text):
            return Immediate(int(text.rstrip("U"), 0))
        if re.match(r"0[fF][0-9a-fA-F]{8}$", text):
            return Immediate(int(text[2:], 16), 32)
        if re.match(r"0[dD][0-9a-fA-F]{16}$", text):
            return Immediate(int(text[2:], 16), 64)
        if _DECIMAL.match(text):
            return Immediate(int(np.float64(text).view(np.uint64)), 64)
        if _SPECIAL.match(text):
            return Special(text[1:])
        for scope in reversed(self.scopes):
            if text in scope:
                return scope[text]
        return Symbol(text)

    def _address(self, text):
        if "{" in text:
            base, coordinates = _split(text)
            return Box(self._operand(base), self._operand(coordinates).items)
        base, sign, offset = re.match(r"\s*([%\w$]+)\s*(?:([+-])\s*(-?\w+))?\s*$", text).groups()
        value = int(offset, 0) if offset else 0
        return Address(self._operand(base), -value if sign == "-" else value)
