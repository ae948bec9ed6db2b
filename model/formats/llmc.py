"""llm.c's .bin files, both ways, and its debug states (github.com/karpathy/llm.c, train_gpt2.py, write_tensors).

256 int32: 20240326, version (3: fp32, 5: bf16), n_positions, vocab_size, n_layer, n_head, n_embd, rows of wte, which is
padded to a multiple of 128. Then wte, wpe, each tensor of the blocks for all layers, and ln_f; linear layers [out, in].
A debug state: 20240327, version 2, B, T; then x and y [B, T] int32, logits [B, T, V], the loss, and each gradient in
the order of the weights, fp32. All of it little-endian.
"""

from dataclasses import dataclass

import torch

from model.formats.found import BLOCK, Found, check_plain, config_of, is_linear

MAGIC, STATE_MAGIC = 20240326, 20240327
HEADER = 256
DTYPES = {3: torch.float32, 5: torch.bfloat16}
_PADDED_TO = 128


def is_llmc(path):
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return int.from_bytes(file.read(4), "little") in (MAGIC, STATE_MAGIC)


def _layout(config, rows):
    """(name, shape in the file) of each tensor, in the file's order; `rows` of wte, padding among them."""
    C = config.n_embd
    shapes: dict[str, tuple[int, ...]] = {}
    for name in BLOCK:
        if name.endswith("c_attn.weight"):
            shapes[name] = (3 * C, C)
        elif name.endswith("c_fc.weight"):
            shapes[name] = (4 * C, C)
        elif name.startswith("mlp.c_proj.w"):
            shapes[name] = (C, 4 * C)
        elif name.endswith("c_proj.weight"):
            shapes[name] = (C, C)
        else:
            shapes[name] = ({"attn.c_attn.bias": 3, "mlp.c_fc.bias": 4}.get(name, 1) * C,)
    yield "transformer.wte.weight", (rows, C)
    yield "transformer.wpe.weight", (config.n_positions, C)
    for name, shape in shapes.items():
        yield from ((f"transformer.h.{layer}.{name}", shape) for layer in range(config.n_layer))
    yield "transformer.ln_f.weight", (C,)
    yield "transformer.ln_f.bias", (C,)


def _header(path):
    with open(path, "rb") as file:
        content = file.read(4 * HEADER)
    if len(content) < 4 * HEADER:
        raise ValueError(f"convert: {path} has {len(content)} bytes; llm.c's header alone has {4 * HEADER}")
    return torch.frombuffer(bytearray(content), dtype=torch.int32).tolist()


def _map(path, dtype, offset, layout):
    """{name: view} of tensors that lie one after another from the byte `offset` to the file's end."""
    layout = list(layout)
    sizes = [torch.Size(shape).numel() for _, shape in layout]
    length, item = path.stat().st_size, dtype.itemsize
    if length != offset + sum(sizes) * item:
        end = offset
        for (name, _), size in zip(layout, sizes):
            end += size * item
            if length < end:
                raise ValueError(f"convert: {path} ends at byte {length}, within {name}, which reaches to {end}")
        raise ValueError(f"convert: {path} has {length} bytes; its header describes {end}")
    numbers = torch.from_file(str(path), size=length // item, dtype=dtype)
    parts = numbers[offset // item :].split(sizes)
    return {name: part.view(shape) for (name, shape), part in zip(layout, parts)}


def read(path):
    """The Found of a model's .bin. Raises ValueError for another magic or version, and for a wrong length."""
    header = _header(path)
    if header[0] == STATE_MAGIC:
        raise ValueError(f"convert: {path} is a debug state, without weights; model.formats.llmc.read_state reads it")
    if header[0] != MAGIC or header[1] not in DTYPES:
        raise ValueError(f"convert: {path} has magic {header[0]}, version {header[1]}; {MAGIC} and 3 or 5 are required")
    sizes = dict(zip(("n_positions", "vocab_size", "n_layer", "n_head", "n_embd"), header[2:7]))
    rows = header[7]
    config = config_of(**sizes)
    if rows < config.vocab_size:
        raise ValueError(f"convert: {path} has {rows} rows of wte for a vocabulary of {config.vocab_size}")
    stored = _map(path, DTYPES[header[1]], 4 * HEADER, _layout(config, rows))
    found = Found(config, {}, {name: name for name in stored})
    found.tensors = {name: tensor.t() if is_linear(name) else tensor for name, tensor in stored.items()}
    found.tensors["transformer.wte.weight"] = stored["transformer.wte.weight"][: config.vocab_size]
    if rows > config.vocab_size:
        found.notes.append(f"{rows - config.vocab_size} rows of wte are padding; cut")
    return found


def chunks(model):
    """The bytes of the .bin of a GPT2, tensor by tensor, in fp32, or bf16 where the model is."""
    config, state = model.config, model.state_dict()
    check_plain(config, "llm.c", ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"))
    version = 5 if model.dtype == torch.bfloat16 else 3
    rows = -(-config.vocab_size // _PADDED_TO) * _PADDED_TO
    header = torch.zeros(HEADER, dtype=torch.int32)
    header[:8] = torch.tensor(
        [MAGIC, version, config.n_positions, config.vocab_size, config.n_layer, config.n_head, config.n_embd, rows]
    )
    yield header.numpy().data
    for name, shape in _layout(config, rows):
        tensor = state[name].t() if is_linear(name) else state[name]
        if tensor.shape[0] < shape[0]:
            tensor = torch.nn.functional.pad(tensor, (0, 0, 0, shape[0] - tensor.shape[0]))
        yield tensor.to("cpu", DTYPES[version]).contiguous().reshape(-1).view(torch.uint8).numpy().data


@dataclass
class DebugState:
    """x, y [B, T] int32; logits [B, T, V]; loss []; gradients {our names: as our parameters lie}."""

    x: torch.Tensor
    y: torch.Tensor
    logits: torch.Tensor
    loss: torch.Tensor
    gradients: dict


def read_state(path, config):
    """The DebugState that llm.c's train_gpt2.py wrote for a model of this config."""
    header = _header(path)
    if header[0] != STATE_MAGIC or header[1] != 2:
        raise ValueError(
            f"convert: {path} has magic {header[0]}, version {header[1]}; {STATE_MAGIC} and 2 are required"
        )
    B, T = header[2:4]
    if B < 1 or T < 1:
        raise ValueError(f"convert: {path} has B {B} and T {T}; each must be at least 1")
    rows = -(-config.vocab_size // _PADDED_TO) * _PADDED_TO
    first = [("x", (B, T)), ("y", (B, T)), ("logits", (B, T, config.vocab_size)), ("loss", ())]
    stored = _map(path, torch.float32, 4 * HEADER, [*first, *_layout(config, rows)])
    x, y, logits, loss = (stored.pop(name) for name, _ in first)
    gradients = {name: tensor.t() if is_linear(name) else tensor for name, tensor in stored.items()}
    gradients["transformer.wte.weight"] = stored["transformer.wte.weight"][: config.vocab_size]
    return DebugState(x.view(torch.int32), y.view(torch.int32), logits, loss, gradients)
