"""nanoGPT's ckpt.pt, both ways (github.com/karpathy/nanoGPT, train.py and model.py).

A pickle of {"model": state dict, "model_args": {n_layer, n_head, n_embd, block_size, bias, vocab_size, dropout}, ...}.
Its linear layers are [out, in], its GELU is the erf form, and with bias=False neither linear layers nor LayerNorms have
biases: here they are zeros. torch.compile writes `_orig_mod.` before each key.
"""

import pickle
import re

import torch

from model.checkpoints.files import _can_be_mapped, listed
from model.formats.found import Found, check_plain, config_of, is_linear, names

_ARGUMENTS = {"n_layer": int, "n_head": int, "n_embd": int, "block_size": int, "vocab_size": int, "bias": bool}
_MASK = re.compile(r"transformer\.h\.\d+\.attn\.bias")


def is_nanogpt(path):
    return path.is_file() and path.suffix in (".pt", ".pth")


def read(path):
    """The Found of a ckpt.pt. Raises ValueError for whatever else the file is; no code in it runs."""
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=_can_be_mapped(path))
    except (MemoryError, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError | MemoryError):
            raise
        raise ValueError(f"convert: {path} is truncated or damaged: {error}") from error
    except pickle.UnpicklingError as error:  # whose text advises to trust the file
        raise ValueError(f"convert: {path} is damaged or holds more than tensors; not loaded") from error
    except Exception as error:  # the reader raises of a damaged file whatever it stumbles over
        raise ValueError(f"convert: {path} is truncated or damaged: {str(error).partition(chr(10))[0]}") from error
    state, arguments = _parts(path, loaded)
    tensors = {key.removeprefix("_orig_mod."): tensor for key, tensor in state.items()}
    config = config_of(
        vocab_size=arguments["vocab_size"],
        n_positions=arguments["block_size"],
        **{name: arguments[name] for name in ("n_layer", "n_head", "n_embd")},
        **{name: float(arguments.get("dropout", 0.0)) for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")},
        activation_function="gelu",
    )
    found = Found(config, {})
    found.notes.append("nanoGPT's GELU is the erf form: activation_function is 'gelu'")
    for name in names(config):
        if name in tensors:
            tensor = tensors.pop(name)
            found.tensors[name] = tensor.t() if is_linear(name) and tensor.dim() == 2 else tensor
            found.renamed[name] = name
        elif name.endswith(".bias") and not arguments["bias"]:
            weight = found.tensors.get(name.removesuffix("bias") + "weight")
            if weight is not None:
                found.tensors[name] = weight.new_zeros(weight.shape[-1])
    if not arguments["bias"]:
        found.notes.append("bias is False: biases are zeros")
    head = tensors.pop("lm_head.weight", None)
    if head is not None:
        found.tensors["lm_head.weight"] = head  # load_weights() compares it with wte
        found.notes.append("lm_head.weight is wte.weight")
    found.dropped = [name for name in tensors if _MASK.fullmatch(name)]
    unknown = [name for name in tensors if name not in found.dropped]
    if unknown:
        raise ValueError(f"convert: {path} has also {listed(unknown)}, which nanoGPT's GPT has not")
    return found


def _parts(path, loaded):
    """(state dict, model_args), checked."""
    if not isinstance(loaded, dict) or not all(isinstance(loaded.get(key), dict) for key in ("model", "model_args")):
        raise ValueError(f"convert: {path} is no checkpoint of nanoGPT's; it must hold dicts 'model' and 'model_args'")
    state, arguments = loaded["model"], loaded["model_args"]
    for name, kind in _ARGUMENTS.items():
        if type(arguments.get(name)) is not kind:
            came = repr(arguments.get(name))[:60]
            raise ValueError(f"convert: {path}: model_args has {name} {came}; it must be {kind.__name__}")
    for key, tensor in state.items():
        is_dense = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and not tensor.is_quantized
        if not isinstance(key, str) or not is_dense or tensor.is_meta:
            raise ValueError(
                f"convert: {path}: {key!r} is {type(tensor).__name__}; it must be a dense tensor of values"
            )
    return state, arguments


def write(model, file):
    """Writes the ckpt.pt of a GPT2 to an open binary file; returns notes. nanoGPT's sample.py and GPT load it."""
    config = model.config
    check_plain(config, "nanoGPT", ("gelu", "gelu_new", "gelu_pytorch_tanh"))
    state = model.state_dict()
    tensors = {name: state[name].t().contiguous() if is_linear(name) else state[name] for name in names(config)}
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]  # one storage, written once
    arguments = {
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "block_size": config.n_positions,
        "bias": True,
        "vocab_size": config.vocab_size,
        "dropout": config.resid_pdrop,
    }
    torch.save({"model": tensors, "model_args": arguments, "config": {}, "iter_num": 0, "best_val_loss": 1e9}, file)
    if config.activation_function == "gelu":
        return []
    return ["nanoGPT computes the erf GELU, this model the tanh form: activations differ by up to 4.7e-4"]
