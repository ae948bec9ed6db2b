"""OpenAI's original checkpoints: hparams.json and a TensorFlow bundle, without TensorFlow. See bundle.py."""

import json
from pathlib import Path

import numpy as np
import torch

from model.checkpoints.files import read_json_object
from model.checkpoints.formats import Weights, bundle

PREFIX = "model.ckpt"
HPARAMS = {
    "n_vocab": "vocab_size",
    "n_ctx": "n_positions",
    "n_embd": "n_embd",
    "n_head": "n_head",
    "n_layer": "n_layer",
}
_PARTS = {"g": "weight", "b": "bias", "w": "weight"}


def is_one(path):
    path = Path(path)
    return path.is_dir() and (path / "hparams.json").is_file() and (path / f"{PREFIX}.index").is_file()


def _our_name(name):
    """ "model/h0/attn/c_attn/w" to "transformer.h.0.attn.c_attn.weight"."""
    words = name.split("/")[1:]
    if words[-1] in _PARTS:
        words[-1] = _PARTS[words[-1]]
    else:
        words.append("weight")  # wte, wpe
    if words[0][:1] == "h" and words[0][1:].isdigit():
        words[:1] = ["h", words[0][1:]]
    return ".".join(["transformer", *words])


def read(path):
    """Raises ValueError for damage, with the tensor."""
    path = Path(path)
    values = read_json_object(path / "hparams.json")
    missing = [name for name in HPARAMS if not isinstance(values.get(name), int)]
    if missing:
        raise ValueError(f"{path / 'hparams.json'}: {missing[0]} must be an integer")
    config = {ours: values[theirs] for theirs, ours in HPARAMS.items()}
    if config["vocab_size"] <= 50256:
        config |= {"bos_token_id": None, "eos_token_id": None}
    tensors, dropped = {}, []
    for name, array in bundle.read(path / PREFIX).items():
        if not name.startswith("model/"):
            dropped.append(name)  # an optimizer's, or the step
            continue
        if array.ndim == 3 and len(array) == 1:  # the weights of a convolution one token wide
            array = array[0]
        tensors[_our_name(name)] = torch.from_numpy(np.array(array))
    return Weights(config, tensors, [f"dropped: {', '.join(dropped)}"] if dropped else [])


def write(model):
    """model.ckpt.*, hparams.json and checkpoint, fp32. Raises ValueError for what they have no place for."""
    config = model.config
    if config.inner_dim != 4 * config.n_embd or not config.tie_word_embeddings:
        raise ValueError("openai: its GPT-2 has n_inner = 4 n_embd and a tied head; this model has not")
    if config.activation_function not in ("gelu_new", "gelu_pytorch_tanh"):
        raise ValueError(f"openai: its GPT-2 computes GELU by tanh; this model has {config.activation_function}")
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        words = name.removeprefix("transformer.").split(".")
        if words[0] == "h":
            words[:2] = [f"h{words[1]}"]
        shape = tuple(tensor.shape)
        if words[0] in ("wte", "wpe"):
            words.pop()
        elif words[-1] == "weight":
            words[-1] = "g" if words[-2].startswith("ln_") else "w"
            shape = shape if words[-1] == "g" else (1, *shape)
        else:
            words[-1] = "b"
        tensors["/".join(["model", *words])] = shape, tensor.detach().float().cpu().numpy().astype("<f4").tobytes()
    hparams = {theirs: getattr(config, ours) for theirs, ours in HPARAMS.items()}
    files = {
        f"{PREFIX}.index": bundle.index_of(tensors),
        "hparams.json": json.dumps(hparams).encode(),
        "checkpoint": f'model_checkpoint_path: "{PREFIX}"\nall_model_checkpoint_paths: "{PREFIX}"\n'.encode(),
    }

    def save(file):
        for name in sorted(tensors):
            file.write(tensors[name][1])

    return f"{PREFIX}.data-00000-of-00001", save, [], files
