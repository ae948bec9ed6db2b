"""GGUF, version 3, for llama.cpp: written, not read (github.com/ggml-org/ggml, docs/gguf.md).

"GGUF", version, the number of tensors and of keys; the keys with their values; of each tensor its name, its lengths
from the innermost, its type and where it lies; then the tensors, each from a multiple of 32 bytes. Matrices are
[out, in], in fp16 or q8_0: 32 numbers of a row as int8 times one fp16. Norms, biases and positions stay fp32. The
vocabulary comes from the vocab.json and merges.txt (or OpenAI's encoder.json and vocab.bpe) beside the source.
"""

import struct

import torch

from model.checkpoints.files import read_json_object
from model.formats.found import check_plain, is_linear, names

ALIGNMENT = 32
_BLOCK = 32  # numbers of q8_0 with one scale
_F32, _F16, _Q8_0 = 0, 1, 8  # of tensors
_U32, _FLOAT, _STRING, _ARRAY, _I32 = 4, 6, 8, 9, 5  # of values
_FILE_TYPES = {_F16: 1, _Q8_0: 7}
_NORMAL, _CONTROL = 1, 3  # of tokens
_NAMES = {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
_NAMES |= {"ln_1": "attn_norm", "ln_2": "ffn_norm"}
_OUTSIDE = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
VOCABULARIES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
END_OF_TEXT = "<|endoftext|>"


def gguf_name(name):
    """What llama.cpp calls a tensor of ours."""
    path, _, last = name.removeprefix("transformer.").rpartition(".")
    if path.startswith("h."):
        _, layer, path = path.split(".", 2)
        return f"blk.{layer}.{_NAMES[path]}.{last}"
    return f"{_OUTSIDE[path]}.{last}"


def read_vocabulary(directory, vocab_size):
    """(tokens by id, merges) of the files beside a source. Raises ValueError where there are none, or not enough."""
    for vocab, merges in VOCABULARIES:
        if (directory / vocab).is_file() and (directory / merges).is_file():
            break
    else:
        needed = " or ".join(" and ".join(pair) for pair in VOCABULARIES)
        raise ValueError(f"convert: llama.cpp needs the vocabulary in the file; {directory} has not {needed}")
    tokens = read_json_object(directory / vocab)
    if sorted(value for value in tokens.values() if type(value) is int) != list(range(vocab_size)):
        raise ValueError(
            f"convert: {directory / vocab} has {len(tokens)} tokens; the model's {vocab_size} rows need one for each id"
        )
    lines = (directory / merges).read_text(encoding="utf-8").split("\n")
    rules = [line for line in lines if line and not line.startswith("#version")]
    if not all(len(rule.split(" ")) == 2 for rule in rules):
        raise ValueError(f"convert: {directory / merges} holds a line that is not two tokens and a space")
    return sorted(tokens, key=tokens.get), rules


def chunks(model, tokens, merges, quantised):
    """The bytes of a .gguf, piece by piece."""
    config = model.config
    check_plain(config, "llama.cpp's gpt2", ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"))
    state, matrix = model.state_dict(), _Q8_0 if quantised else _F16
    kinds = {}
    for name in names(config):
        is_matrix = is_linear(name) or name.endswith("wte.weight")
        rows_fit = (state[name].shape[0] if is_linear(name) else state[name].shape[-1]) % _BLOCK == 0
        kinds[name] = _F32 if not is_matrix else matrix if rows_fit else _F16
    values = [
        _value("general.architecture", _STRING, "gpt2"),
        _value("general.file_type", _U32, _FILE_TYPES[matrix]),
        _value("gpt2.context_length", _U32, config.n_positions),
        _value("gpt2.embedding_length", _U32, config.n_embd),
        _value("gpt2.feed_forward_length", _U32, config.inner_dim),
        _value("gpt2.block_count", _U32, config.n_layer),
        _value("gpt2.attention.head_count", _U32, config.n_head),
        _value("gpt2.attention.layer_norm_epsilon", _FLOAT, config.layer_norm_epsilon),
        _value("tokenizer.ggml.model", _STRING, "gpt2"),
        _value("tokenizer.ggml.pre", _STRING, "gpt-2"),
        _array("tokenizer.ggml.tokens", _STRING, tokens),
        _array("tokenizer.ggml.token_type", _I32, [_CONTROL if t == END_OF_TEXT else _NORMAL for t in tokens]),
        _array("tokenizer.ggml.merges", _STRING, merges),
    ]
    for key, field in (("bos", config.bos_token_id), ("eos", config.eos_token_id)):
        if isinstance(field, int):
            values.append(_value(f"tokenizer.ggml.{key}_token_id", _U32, field))
    infos, at = [], 0
    for name, kind in kinds.items():
        shape = state[name].shape if is_linear(name) else tuple(reversed(state[name].shape))  # from the innermost
        infos.append(_string(gguf_name(name)) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape))
        infos[-1] += struct.pack("<IQ", kind, at)
        at += -(-_size(state[name].numel(), kind) // ALIGNMENT) * ALIGNMENT
    header = b"GGUF" + struct.pack("<IQQ", 3, len(kinds), len(values)) + b"".join(values + infos)
    yield header + bytes(-len(header) % ALIGNMENT)
    for name, kind in kinds.items():
        tensor = state[name].detach().cpu().float()
        content = _content(tensor.t() if is_linear(name) else tensor, kind)
        yield content
        yield bytes(-len(content) % ALIGNMENT)


def _size(numbers, kind):
    return numbers // _BLOCK * (_BLOCK + 2) if kind == _Q8_0 else numbers * (4 if kind == _F32 else 2)


def _content(tensor, kind):
    if kind == _Q8_0:
        return quantise(tensor).numpy().tobytes()
    return tensor.to(torch.float32 if kind == _F32 else torch.float16).contiguous().numpy().tobytes()


def quantise(tensor):
    """fp32 [..., 32 n] as q8_0: uint8 [blocks, 34], an fp16 scale before 32 int8. Halves are rounded away from 0."""
    blocks = tensor.reshape(-1, _BLOCK)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    steps = blocks * torch.where(scale == 0, 0.0, 1 / scale)
    rounded = (steps.abs() + 0.5).floor().copysign(steps).to(torch.int8)
    return torch.cat([scale.half().view(torch.uint8), rounded.view(torch.uint8)], 1)


def _string(text):
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def _plain(kind, value):
    return _string(value) if kind == _STRING else struct.pack({_U32: "<I", _I32: "<i", _FLOAT: "<f"}[kind], value)


def _value(key, kind, value):
    return _string(key) + struct.pack("<I", kind) + _plain(kind, value)


def _array(key, kind, values):
    head = _string(key) + struct.pack("<IIQ", _ARRAY, kind, len(values))
    return head + b"".join(_plain(kind, value) for value in values)
