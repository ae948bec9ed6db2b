"""llm.c's model .bin: 256 int32 and then every parameter, in fp32 or bf16, one kind after the other over all layers.

The header holds 20240326, the version (3: fp32, 5: bf16), positions, vocabulary, layers, heads, channels, and the
vocabulary padded to a multiple of 128, which is how many rows the embedding has there.
"""

from pathlib import Path

import numpy as np
import torch

from model.checkpoints.formats import Weights, own_vocabulary

FILE = "model.bin"
MAGIC, HEADER = 20240326, 256
_VERSIONS = {3: torch.float32, 5: torch.bfloat16}
_LINEAR = ("c_attn", "c_proj", "c_fc")


def is_one(path):
    path = Path(path) / FILE if Path(path).is_dir() else Path(path)
    return path.is_file() and path.suffix == ".bin" and np.fromfile(path, "<i4", 1).tolist() == [MAGIC]


def parameters(T, V, L, C):
    """(name, shape) in the file's order; of a layer's tensors {i} stands for its number, and L of them follow."""
    h = "transformer.h.{i}."
    return (
        ("transformer.wte.weight", (V, C)),
        ("transformer.wpe.weight", (T, C)),
        (h + "ln_1.weight", (L, C)),
        (h + "ln_1.bias", (L, C)),
        (h + "attn.c_attn.weight", (L, 3 * C, C)),
        (h + "attn.c_attn.bias", (L, 3 * C)),
        (h + "attn.c_proj.weight", (L, C, C)),
        (h + "attn.c_proj.bias", (L, C)),
        (h + "ln_2.weight", (L, C)),
        (h + "ln_2.bias", (L, C)),
        (h + "mlp.c_fc.weight", (L, 4 * C, C)),
        (h + "mlp.c_fc.bias", (L, 4 * C)),
        (h + "mlp.c_proj.weight", (L, C, 4 * C)),
        (h + "mlp.c_proj.bias", (L, C)),
        ("transformer.ln_f.weight", (C,)),
        ("transformer.ln_f.bias", (C,)),
    )


def read(path):
    """Raises ValueError where the header or the size is not what it must be."""
    path = Path(path) / FILE if Path(path).is_dir() else Path(path)
    header = np.fromfile(path, "<i4", HEADER)
    if len(header) < HEADER or header[0] != MAGIC:
        raise ValueError(f"{path} is no model of llm.c: its header must begin with {MAGIC}")
    version, T, V, L, H, C, padded = (int(n) for n in header[1:8])
    if version not in _VERSIONS:
        raise ValueError(f"{path} has version {version}; 3, of fp32, and 5, of bf16, are read")
    if min(T, V, L, H, C) < 1 or padded < V or max(T, padded, C) > 1 << 24 or L > 1 << 12:
        raise ValueError(f"{path}: positions {T}, vocabulary {V} of {padded}, layers {L}, heads {H}, channels {C}")
    dtype, plan = _VERSIONS[version], parameters(T, padded, L, C)
    size = 4 * HEADER + dtype.itemsize * sum(int(np.prod(shape, dtype=np.int64)) for _, shape in plan)
    if path.stat().st_size != size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; with its header it must have {size}: it is damaged")
    flat = np.memmap(path, np.uint8, "c", offset=4 * HEADER)
    tensors, at = {}, 0
    for name, shape in plan:
        count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        values = torch.from_numpy(flat[at : at + count]).view(dtype).view(shape)
        at += count
        for i in range(L if "{i}" in name else 1):
            tensor = values[i] if "{i}" in name else values
            is_linear = name.endswith(".weight") and name.split(".")[-2] in _LINEAR
            tensors[name.format(i=i)] = tensor.t().contiguous() if is_linear else tensor.clone()
    tensors["transformer.wte.weight"] = own_vocabulary(tensors["transformer.wte.weight"], V)
    config = {"n_layer": L, "n_head": H, "n_embd": C, "n_positions": T, "vocab_size": V}
    config["dtype"] = str(dtype).removeprefix("torch.")
    if V <= 50256:
        config |= {"bos_token_id": None, "eos_token_id": None}
    return Weights(config, tensors, [f"vocabulary: {padded} rows cut to {V}"] if padded != V else [])


def write(model):
    """model.bin, in bf16 if the model is, else in fp32. Raises ValueError for what llm.c cannot compute."""
    config = model.config
    if config.inner_dim != 4 * config.n_embd or not config.tie_word_embeddings:
        raise ValueError("llmc: a model of llm.c has n_inner = 4 n_embd and a tied head; this model has not")
    if config.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
        raise ValueError(f"llmc: llm.c computes GELU by tanh; this model has {config.activation_function}")
    dtype = torch.bfloat16 if model.dtype == torch.bfloat16 else torch.float32
    V, L, C = config.vocab_size, config.n_layer, config.n_embd
    padded = -(-V // 128) * 128
    header = np.zeros(HEADER, "<i4")
    version = next(version for version, kind in _VERSIONS.items() if kind == dtype)
    header[:8] = MAGIC, version, config.n_positions, V, L, config.n_head, C, padded
    state = model.state_dict()

    def save(file):
        file.write(header.tobytes())
        for name, _ in parameters(config.n_positions, padded, L, C):
            for i in range(L if "{i}" in name else 1):
                tensor = state[name.format(i=i)].detach().cpu()
                if name.endswith(".weight") and name.split(".")[-2] in _LINEAR:
                    tensor = tensor.t()
                if name == "transformer.wte.weight":
                    tensor = torch.nn.functional.pad(tensor, (0, 0, 0, padded - V))
                file.write(tensor.to(dtype).contiguous().view(torch.uint8).numpy().tobytes())

    return FILE, save, [f"vocabulary: {V} rows, zeros up to {padded}"] if padded != V else []
