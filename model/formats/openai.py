"""OpenAI's original checkpoints, both ways (github.com/openai/gpt-2, src/model.py): model.ckpt.* and hparams.json.

Tensors are model/wte [V, C], model/wpe [T, C], model/ln_f/{g,b} and, for layer 0, model/h0/ln_1/g and the like; linear
layers are [1, in, out]. The head is wte. encoder.json and vocab.bpe beside them are the tokenizer's.
"""

import json

import torch

from model.checkpoints.atomic import write_new_file
from model.checkpoints.files import listed, read_json_object
from model.formats.found import Found, check_plain, config_of, names
from model.formats.tensor_bundle import data_path, index_bytes, read_bundle, tensor_bytes

HPARAMS = {
    "n_vocab": "vocab_size",
    "n_ctx": "n_positions",
    "n_embd": "n_embd",
    "n_layer": "n_layer",
    "n_head": "n_head",
}
TOKENIZER = ("encoder.json", "vocab.bpe")
_PREFIX = "model.ckpt"


def is_openai(directory):
    return directory.is_dir() and (directory / "hparams.json").is_file() and bool(list(directory.glob("*.index")))


def openai_name(name):
    """What OpenAI calls a tensor of ours."""
    parts = name.removeprefix("transformer.").split(".")
    last = parts.pop()
    if parts[0] == "h":
        parts[:2] = ["h" + parts[1]]
    if parts[-1].startswith("ln_"):
        parts.append({"weight": "g", "bias": "b"}[last])
    elif parts[-1].startswith("c_"):
        parts.append({"weight": "w", "bias": "b"}[last])
    return "/".join(["model", *parts])


def read(directory, progress=lambda name: None):
    """The Found of a directory."""
    path = directory / "hparams.json"
    hparams = read_json_object(path)
    lacking = [name for name in HPARAMS if name not in hparams]
    if lacking:
        raise ValueError(f"convert: {path} lacks {', '.join(lacking)}")
    try:
        config = config_of(**{ours: hparams[theirs] for theirs, ours in HPARAMS.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"convert: {path}: {error}") from error
    stored = read_bundle(_index(directory), progress)
    found = Found(config, {})
    for name in names(config):
        theirs = openai_name(name)
        if theirs in stored:
            tensor = stored.pop(theirs)
            if theirs.endswith("/w") and tensor.dim() == 3 and tensor.shape[0] == 1:
                tensor = tensor[0]
            found.tensors[name], found.renamed[name] = tensor, theirs
    unknown = [name for name in stored if name.startswith("model/")]
    if unknown:
        raise ValueError(f"convert: {directory} has also {listed(unknown)}, of which hparams.json says nothing")
    found.dropped = list(stored)  # an optimizer's, a step's
    return found


def _index(directory):
    """The checkpoint's index: the one that the file `checkpoint` names, or the only one."""
    indices = sorted(directory.glob("*.index"))
    if len(indices) > 1:
        state = directory / "checkpoint"
        text = state.read_text(encoding="utf-8", errors="replace") if state.is_file() else ""
        named = [path for path in indices if f'model_checkpoint_path: "{path.name.removesuffix(".index")}"' in text]
        if len(named) != 1:
            raise ValueError(f"convert: {directory} has {len(indices)} .index files; its file 'checkpoint' names none")
        return named[0]
    return indices[0]


def write(model, directory):
    """Writes hparams.json and model.ckpt.* of a GPT2 in fp32 into a directory that lacks them."""
    config = model.config
    check_plain(config, "OpenAI's GPT-2", ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"))
    state, tensors = model.state_dict(), {}
    for name in names(config):
        tensor = state[name].to("cpu", torch.float32).contiguous()
        theirs = openai_name(name)
        tensors[theirs] = tensor[None] if theirs.endswith("/w") else tensor
    index = directory / f"{_PREFIX}.index"
    write_new_file(data_path(index, 0, 1), (tensor_bytes(tensors[name]) for name in sorted(tensors, key=str.encode)))
    write_new_file(
        directory / "hparams.json", [json.dumps({t: getattr(config, o) for t, o in HPARAMS.items()}).encode()]
    )
    write_new_file(directory / "checkpoint", [f'model_checkpoint_path: "{_PREFIX}"\n'.encode()])
    write_new_file(index, [index_bytes(tensors)])  # last: without it the directory is no checkpoint
