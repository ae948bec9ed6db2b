"""nanoGPT's ckpt.pt: {"model": state dict, "model_args": {...}, ...}, torch's pickle, read without running code.

Linear weights are [out, in] there and [in, out] here; without biases ours are zeros; its GELU is the exact one.
"""

import re
from pathlib import Path

import torch

from model.checkpoints.formats import Weights, own_vocabulary

FILE = "ckpt.pt"
_LINEAR = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
_COMPILED = re.compile(r"^(_orig_mod\.|module\.)+")  # what torch.compile and DistributedDataParallel put before names
_PADDED = range(50258, 50305)  # GPT-2's vocabulary, rounded up


def is_one(path):
    return _file(path).is_file() and _file(path).suffix in (".pt", ".pth")


def _file(path):
    return Path(path) / FILE if Path(path).is_dir() else Path(path)


def read(path):
    """Raises ValueError where the file is damaged, holds code, or is no checkpoint of nanoGPT."""
    path = _file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path}: it cannot be read: {type(error).__name__}: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict) or not {"model", "model_args"} <= content.keys():
        raise ValueError(f'{path} is no checkpoint of nanoGPT: a dict with "model" and "model_args" is required')
    args, state = content["model_args"], content["model"]
    needed = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    if (
        not isinstance(args, dict)
        or not isinstance(state, dict)
        or not all(isinstance(args.get(n), int) for n in needed)
    ):
        raise ValueError(f"{path}: model_args must have the integers {', '.join(needed)}")
    tensors, notes, dropped = {}, ["activation: nanoGPT's exact GELU"], 0
    for name, tensor in state.items():
        name = _COMPILED.sub("", str(name))
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{path}: {name} is {type(tensor).__name__}; a tensor is required")
        if name == "lm_head.weight" or name.endswith((".attn.bias", ".attn.masked_bias")):
            dropped += 1
            continue
        if name.endswith(_LINEAR):
            if tensor.dim() != 2:
                raise ValueError(f"{path}: {name} has {tensor.dim()} dimensions; 2 are required")
            tensor = tensor.t().contiguous()
        tensors[name] = tensor
    notes.append(f"dropped: the tied head and masks, {dropped} tensors")
    V, C = args["vocab_size"], args["n_embd"]
    if V in _PADDED and "transformer.wte.weight" in tensors:
        notes.append(f"vocabulary: {V} rows cut to GPT-2's 50257")
        tensors["transformer.wte.weight"], V = own_vocabulary(tensors["transformer.wte.weight"], 50257), 50257
    if not args.get("bias", True):
        notes.append("biases: none there, zeros here")
        for i in range(args["n_layer"]):
            for part, width in (("ln_1", C), ("ln_2", C), ("attn.c_attn", 3 * C), ("attn.c_proj", C)):
                tensors[f"transformer.h.{i}.{part}.bias"] = torch.zeros(width)
            tensors[f"transformer.h.{i}.mlp.c_fc.bias"] = torch.zeros(4 * C)
            tensors[f"transformer.h.{i}.mlp.c_proj.bias"] = torch.zeros(C)
        tensors["transformer.ln_f.bias"] = torch.zeros(C)
    dropout = args.get("dropout", 0.0)
    config = {"n_layer": args["n_layer"], "n_head": args["n_head"], "n_embd": C, "n_positions": args["block_size"]}
    config |= {"vocab_size": V, "activation_function": "gelu"}
    config |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), dropout)
    if V <= 50256:
        config |= {"bos_token_id": None, "eos_token_id": None}
    return Weights(config, tensors, notes)


def write(model):
    """ckpt.pt, which nanoGPT's train.py resumes and sample.py reads. Raises ValueError for what it has no place for."""
    config = model.config
    if config.inner_dim != 4 * config.n_embd or not config.tie_word_embeddings:
        raise ValueError("nanogpt: a GPT of nanoGPT has n_inner = 4 n_embd and a tied head; this model has not")
    notes = []
    if config.activation_function != "gelu":
        notes.append(f"activation: nanoGPT will compute the exact GELU; this model has {config.activation_function}")
    state = {}
    for name, tensor in model.state_dict().items():
        state[name] = tensor.t().contiguous() if name.endswith(_LINEAR) else tensor
    args = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd, "bias": True}
    args |= {"block_size": config.n_positions, "vocab_size": config.vocab_size, "dropout": config.resid_pdrop}
    content = {"model": state, "model_args": args, "iter_num": 0, "best_val_loss": 1e9, "config": {}}
    return FILE, lambda file: torch.save(content, file), notes
