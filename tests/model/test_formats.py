"""Checkpoints of other projects: each way with the same logits; a damaged or foreign file is one ValueError.

Peers: nanoGPT's forward and llm.c's, which differ in their GELU alone, written here from their sources; the layouts of
files, written here from their descriptions; and a file that TensorFlow 2.21 wrote.
"""

import base64
import json
import math
import struct

import pytest
import torch
import torch.nn.functional as F
from optional import Optional
from peers import spread, tiny_config
from safetensors.torch import load_file

from model import GPT2, GPT2Config
from model.convert import convert, main
from model.formats import flax, llmc, openai, tensor_bundle, tensorflow_h5
from model.formats.crc32c import crc32c, masked

h5py = Optional("h5py")
SIZES = {"n_layer": 2, "n_positions": 16, "bos_token_id": None, "eos_token_id": None}
IDS = torch.arange(12).view(2, 6)
# tf.compat.v1.train.Saver of model/wte [2, 3] fp32, model/h0/attn/c_attn/b [2] fp16 and model/step [] int64
INDEX = (
    "000IE0U81b0RR>cZEs{{Y%gdqFJW|aZZBhBVRUqEFJcH25(E+g2m&YsHL%hm=>`N1b97~J2niAZAOt7~HM`fJ5e5SlcXVY40TKuj0tf;U0tf>"
    "j3@8{iz}r0+000000RR9109K%D)c^nh00961006-9p|Ah}0&W0k000000RR910FiS)Zfyv94gdfE000000000000000000000000000000000000"
    "000009X5fizIbN+W"
)
DATA = "06qY~2LJ#70000000000004kL0000$002Nh004kM005vs"


@pytest.fixture
def ours():
    return spread(GPT2(tiny_config(**SIZES, activation_function="gelu_new"))).eval()


@pytest.fixture
def saved(ours, tmp_path):
    ours.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def peer_logits(state, heads, approximate, dtype):
    """nanoGPT's forward, from its state dict: linear layers [out, in], a head that is wte."""
    w = {key.removeprefix("transformer."): tensor.to(dtype) for key, tensor in state.items()}
    x = w["wte.weight"][IDS] + w["wpe.weight"][: IDS.shape[1]]
    C = x.shape[-1]
    layer = 0
    while f"h.{layer}.ln_1.weight" in w:
        h, layer = f"h.{layer}.", layer + 1

        def norm(x, name, h=h):
            return F.layer_norm(x, (C,), w[h + name + ".weight"], w.get(h + name + ".bias"), 1e-5)

        def linear(x, name, h=h):
            return F.linear(x, w[h + name + ".weight"], w.get(h + name + ".bias"))

        q, k, v = linear(norm(x, "ln_1"), "attn.c_attn").split(C, dim=2)
        q, k, v = (y.view(*y.shape[:2], heads, C // heads).transpose(1, 2) for y in (q, k, v))
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(C // heads)
        hidden = torch.ones(IDS.shape[1], IDS.shape[1]).tril() == 0
        y = (scores.masked_fill(hidden, -math.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(y, "attn.c_proj")
        x = x + linear(F.gelu(linear(norm(x, "ln_2"), "mlp.c_fc"), approximate=approximate), "mlp.c_proj")
    x = F.layer_norm(x, (C,), w["ln_f.weight"], w.get("ln_f.bias"), 1e-5)
    return x @ w["wte.weight"].t()


def nanogpt_state(bias=True, rows=104, config=None):
    """A random state dict as nanoGPT's GPT has it: vocabulary padded, buffers of the mask."""
    config = config or tiny_config(**SIZES)
    C, state = config.n_embd, {}
    shapes = {"attn.c_attn": (3 * C, C), "attn.c_proj": (C, C), "mlp.c_fc": (4 * C, C), "mlp.c_proj": (C, 4 * C)}
    state["transformer.wte.weight"] = torch.randn(rows, C) * 0.1
    state["transformer.wpe.weight"] = torch.randn(config.n_positions, C) * 0.1
    for layer in range(config.n_layer):
        for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
            shape = shapes.get(name, (C,))
            state[f"transformer.h.{layer}.{name}.weight"] = torch.randn(shape) * 0.1 + (len(shape) == 1)
            if bias:
                state[f"transformer.h.{layer}.{name}.bias"] = torch.randn(shape[0]) * 0.1
        state[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 4, 4)
    state["transformer.ln_f.weight"] = torch.randn(C) * 0.1 + 1
    if bias:
        state["transformer.ln_f.bias"] = torch.randn(C) * 0.1
    state["lm_head.weight"] = state["transformer.wte.weight"]
    return state


def nanogpt_arguments(bias=True, rows=104):
    sizes = {"n_layer": 2, "n_head": 3, "n_embd": 48, "block_size": 16}
    return {**sizes, "bias": bias, "vocab_size": rows, "dropout": 0.0}


def same(model, state, approximate):
    """The model's logits are the peer's, within a small multiple of what the peer errs in fp32."""
    oracle = peer_logits(state, 3, approximate, torch.float64)[..., : model.config.vocab_size]
    error = (peer_logits(state, 3, approximate, torch.float32)[..., : model.config.vocab_size] - oracle).abs().max()
    assert (logits(model) - oracle).abs().max() <= 4 * error


@pytest.mark.parametrize("bias", [True, False], ids=["biases", "no biases"])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."], ids=["plain", "compiled"])
def test_nanogpts_checkpoint(bias, prefix, tmp_path):
    state = nanogpt_state(bias)
    checkpoint = {"model": {prefix + key: x for key, x in state.items()}, "model_args": nanogpt_arguments(bias)}
    torch.save({**checkpoint, "config": {"wandb_log": False}, "iter_num": 3}, tmp_path / "ckpt.pt")
    lines = []
    convert(tmp_path / "ckpt.pt", tmp_path / "hf", report=lines.append)
    model = GPT2.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    assert model.config.activation_function == "gelu"
    assert (model.config.vocab_size, model.config.n_positions) == (104, 16)
    same(model, state, "none")
    assert any(line.startswith("dropped: transformer.h.0.attn.bias") for line in lines)
    assert ("bias is False: biases are zeros" in lines) != bias
    convert(tmp_path / "ckpt.pt", tmp_path / "cut", vocab_size=101)
    cut = GPT2.from_pretrained(tmp_path / "cut", attn_implementation="eager")
    assert cut.config.vocab_size == 101
    assert torch.equal(cut.transformer.wte.weight, model.transformer.wte.weight[:101])


def test_nanogpt_and_back(saved, ours, tmp_path):
    lines = []
    convert(saved, tmp_path, "nanogpt", report=lines.append)
    loaded = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert loaded["model_args"] == nanogpt_arguments(rows=101) | {"dropout": 0.1}
    same(ours, loaded["model"], "tanh")
    assert any("erf GELU, this model the tanh form" in line for line in lines)
    assert loaded["model"]["lm_head.weight"].data_ptr() == loaded["model"]["transformer.wte.weight"].data_ptr()
    convert(tmp_path / "ckpt.pt", tmp_path / "back")
    again = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(again[key], tensor) for key, tensor in load_file(saved / "model.safetensors").items())


def llmc_bytes(state, dtype, rows=128):
    """A .bin as train_gpt2.py's write_model writes it."""
    parts = ("ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight")
    parts += ("attn.c_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias")
    parts += ("mlp.c_proj.weight", "mlp.c_proj.bias")
    wte = state["transformer.wte.weight"]
    tensors = [F.pad(wte, (0, 0, 0, rows - len(wte))), state["transformer.wpe.weight"]]
    tensors += [state[f"transformer.h.{layer}.{part}"] for part in parts for layer in range(2)]
    tensors += [state["transformer.ln_f.weight"], state["transformer.ln_f.bias"]]
    return b"".join(bytes(x.to(dtype).contiguous().view(-1).view(torch.uint8).numpy()) for x in tensors)


def llmc_header(*numbers):
    return struct.pack("<256i", *numbers, *[0] * (256 - len(numbers)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_llmcs_bin_and_back(dtype, tmp_path):
    state = {key: x.to(dtype).float() for key, x in nanogpt_state(rows=101).items()}
    version = 3 if dtype == torch.float32 else 5
    content = llmc_header(20240326, version, 16, 101, 2, 3, 48, 128) + llmc_bytes(state, dtype)
    (tmp_path / "model.bin").write_bytes(content)
    convert(tmp_path / "model.bin", tmp_path / "hf")
    model = GPT2.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    assert model.dtype == dtype
    same(model.float(), state, "tanh")
    convert(tmp_path / "hf", tmp_path / "back", "llmc")
    assert (tmp_path / "back" / "model.bin").read_bytes() == content


def test_llmcs_debug_state(ours, tmp_path):
    y = IDS + 1
    output = ours(IDS, labels=IDS)
    output.loss.backward()
    transposed = {"c_attn.weight", "c_proj.weight", "c_fc.weight"}
    gradients = {
        name: p.grad.t() if ".".join(name.split(".")[-2:]) in transposed else p.grad
        for name, p in ours.named_parameters()
    }
    numbers = b"".join(bytes(x.int().numpy()) for x in (IDS, y))
    numbers += b"".join(bytes(x.detach().numpy()) for x in (output.logits, output.loss))
    path = tmp_path / "debug_state.bin"
    path.write_bytes(llmc_header(20240327, 2, 2, 6) + numbers + llmc_bytes(gradients, torch.float32))
    state = llmc.read_state(path, ours.config)
    assert torch.equal(state.x, IDS.int())
    assert torch.equal(state.y, y.int())
    assert torch.equal(state.logits, output.logits)
    assert state.loss == output.loss
    assert all(torch.equal(state.gradients[name], p.grad) for name, p in ours.named_parameters())
    with pytest.raises(ValueError, match=r"is a debug state, without weights"):
        convert(path, tmp_path / "hf")
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"within transformer\.ln_f\.bias"):
        llmc.read_state(path, ours.config)


def test_crc32c():
    """RFC 3720, B.4, and pieces of every length around the lanes'."""
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(b"123456789") == 0xE3069283
    assert masked(0) == 0xA282EAD8
    data = torch.randint(256, (10_000,), dtype=torch.uint8).numpy()
    for at in (0, 1, 2047, 2048, 2049, 6144, 9999):
        assert crc32c(data[at:], crc32c(data[:at])) == crc32c(data)


@pytest.fixture
def by_tensorflow(tmp_path):
    index = tmp_path / "model.ckpt.index"
    index.write_bytes(base64.b85decode(INDEX))
    (tmp_path / "model.ckpt.data-00000-of-00001").write_bytes(base64.b85decode(DATA))
    return index


def test_what_tensorflow_wrote(by_tensorflow):
    tensors = tensor_bundle.read_bundle(by_tensorflow)
    assert list(tensors) == ["model/h0/attn/c_attn/b", "model/step", "model/wte"]
    assert torch.equal(tensors["model/wte"], torch.arange(6.0).view(2, 3))
    assert torch.equal(tensors["model/h0/attn/c_attn/b"], torch.tensor([1.5, -2.0], dtype=torch.float16))
    assert tensors["model/step"] == 7


def outcome(index):
    """(the tensors, None) or (None, the ValueError's text)"""
    try:
        return tensor_bundle.read_bundle(index), None
    except ValueError as error:
        return None, str(error)


def test_no_byte_of_a_bundle_can_change_unnoticed(by_tensorflow):
    data = tensor_bundle.data_path(by_tensorflow, 0, 1)
    expected = tensor_bundle.read_bundle(by_tensorflow)
    expected = {name: tensor.clone() for name, tensor in expected.items()}
    for path in (by_tensorflow, data):
        whole = path.read_bytes()
        for at in range(len(whole)):
            for content in (whole[:at], whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :]):
                path.write_bytes(content)
                tensors, error = outcome(by_tensorflow)
                if error:
                    assert str(by_tensorflow.parent) in error
                else:  # the padding of the footer, and the block that says nothing
                    assert path == by_tensorflow
                    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
        path.write_bytes(whole)
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ValueError, match="ends at byte 35, within model/wte"):
        tensor_bundle.read_bundle(by_tensorflow)


def test_openais_checkpoint_both_ways(saved, ours, tmp_path):
    (saved / "encoder.json").write_text("{}")
    lines = []
    convert(saved, tmp_path / "openai", "openai", report=lines.append)
    hparams = json.loads((tmp_path / "openai" / "hparams.json").read_text())
    assert hparams == {"n_vocab": 101, "n_ctx": 16, "n_embd": 48, "n_head": 3, "n_layer": 2}
    assert (tmp_path / "openai" / "encoder.json").read_text() == "{}"
    assert "vocab.bpe, the tokenizer's, is not beside the source and has to be put there" in lines
    tensors = tensor_bundle.read_bundle(tmp_path / "openai" / "model.ckpt.index")
    assert tensors["model/h1/attn/c_attn/w"].shape == (1, 48, 144)
    assert {"model/wte", "model/wpe", "model/ln_f/g", "model/ln_f/b", "model/h0/ln_1/g"} < tensors.keys()
    convert(tmp_path / "openai", tmp_path / "hf")
    again = GPT2.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    assert torch.equal(logits(again), logits(GPT2.from_pretrained(saved, attn_implementation="eager")))
    index = tmp_path / "openai" / "model.ckpt.index"
    del tensors["model/h1/mlp/c_fc/w"]
    data = b"".join(bytes(tensor_bundle.tensor_bytes(tensors[name])) for name in sorted(tensors))
    index.write_bytes(tensor_bundle.index_bytes(tensors))
    tensor_bundle.data_path(index, 0, 1).write_bytes(data)
    with pytest.raises(ValueError, match=r"lacks transformer\.h\.1\.mlp\.c_fc\.weight"):
        convert(tmp_path / "openai", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def packed(value):
    """MessagePack, as flax.serialization.to_bytes writes it."""
    if isinstance(value, dict):
        return b"\xde" + struct.pack(">H", len(value)) + b"".join(packed(k) + packed(v) for k, v in value.items())
    if isinstance(value, str):
        return b"\xd9" + struct.pack(">B", len(value)) + value.encode()
    if isinstance(value, int):
        return b"\xcd" + struct.pack(">H", value)
    content = bytes(value.contiguous().view(-1).view(torch.uint8).numpy())
    shape = bytes([0x90 + value.dim()]) + b"".join(packed(n) for n in value.shape)
    dtype = packed(str(value.dtype).removeprefix("torch."))
    array = b"\x93" + shape + dtype + b"\xc6" + struct.pack(">I", len(content)) + content
    return b"\xc9" + struct.pack(">Ib", len(array), 1) + array


def flax_tree(model):
    tree = {}
    for name, tensor in model.state_dict().items():
        *path, last = name.split(".")
        if name == "lm_head.weight":
            continue
        if last == "weight":
            last = "scale" if path[-1].startswith("ln_") else "embedding" if path[-1] in ("wte", "wpe") else "kernel"
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = tensor.t() if last == "kernel" else tensor
    return tree


def test_flaxs_msgpack(ours, saved, tmp_path):
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    whole = packed(flax_tree(ours))
    path = tmp_path / flax.FILE
    path.write_bytes(whole)
    convert(tmp_path, tmp_path / "hf")
    again = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(again[key], tensor) for key, tensor in load_file(saved / "model.safetensors").items())
    for at in [*range(0, 400), *range(400, len(whole), 1013), len(whole) - 1]:
        path.write_bytes(whole[:at])
        with pytest.raises(ValueError, match=r"flax_model\.msgpack"):
            convert(tmp_path, tmp_path / "short")
    path.write_bytes(whole[:-4])
    with pytest.raises(ValueError, match="within transformer/ln_f/bias"):
        convert(tmp_path, tmp_path / "short")
    path.write_bytes(b"\x91" * 100_000)
    with pytest.raises(ValueError, match="more than 16 levels"):
        convert(tmp_path, tmp_path / "short")
    path.write_bytes(packed({"transformer": {"wte": {"pickle": 3}}}))
    with pytest.raises(ValueError, match="transformer/wte/pickle is int; it must be an array"):
        convert(tmp_path, tmp_path / "short")
    assert not (tmp_path / "short").exists()


def read_gguf(content):
    """(keys, {name: (lengths from the innermost, type, bytes)}) of a .gguf, read as docs/gguf.md describes it."""
    at = 0

    def take(form):
        nonlocal at
        values = struct.unpack_from("<" + form, content, at)
        at += struct.calcsize("<" + form)
        return values[0] if len(values) == 1 else values

    def value(kind):
        nonlocal at
        if kind == 8:
            length = take("Q")
            at += length
            return content[at - length : at].decode()
        if kind == 9:
            of, count = take("IQ")
            return [value(of) for _ in range(count)]
        return take({4: "I", 5: "i", 6: "f"}[kind])

    assert content[:4] == b"GGUF"
    at = 4
    version, tensors, count = take("IQQ")
    assert version == 3
    keys = {value(8): value(take("I")) for _ in range(count)}
    infos = {}
    for _ in range(tensors):
        name, dimensions = value(8), take("I")
        shape = [take("Q") for _ in range(dimensions)]
        infos[name] = shape, *take("IQ")
    start = -(-at // 32) * 32
    found = {}
    for name, (shape, kind, offset) in infos.items():
        assert offset % 32 == 0
        size = {0: 4, 1: 2, 8: 34 / 32}[kind] * math.prod(shape)
        found[name] = shape, kind, content[start + offset : start + offset + int(size)]
        assert len(found[name][2]) == size
    return keys, found


@pytest.mark.parametrize("to", ["gguf", "gguf-q8_0"])
def test_gguf_read_back(to, tmp_path):
    fields = {"vocab_size": 300, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 16}
    ours = spread(GPT2(GPT2Config(**fields, bos_token_id=299, eos_token_id=299)))
    ours.save_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match=r"llama\.cpp needs the vocabulary in the file; .* has not vocab\.json and"):
        convert(tmp_path / "hf", tmp_path / "out", to)
    tokens = [f"t{i}" for i in range(299)] + ["<|endoftext|>"]
    (tmp_path / "hf" / "merges.txt").write_text("#version: 0.2\na b\nab c\n")
    (tmp_path / "hf" / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens[:-1])}))
    with pytest.raises(ValueError, match=r"has 299 tokens; the model's 300 rows need one for each id"):
        convert(tmp_path / "hf", tmp_path / "out", to)
    (tmp_path / "hf" / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    convert(tmp_path / "hf", tmp_path / "out", to)
    keys, found = read_gguf((tmp_path / "out" / "model.gguf").read_bytes())
    assert keys["general.architecture"] == "gpt2"
    assert keys["tokenizer.ggml.tokens"] == tokens
    assert keys["tokenizer.ggml.token_type"] == [1] * 299 + [3]
    assert keys["tokenizer.ggml.merges"] == ["a b", "ab c"]
    assert keys["tokenizer.ggml.eos_token_id"] == 299
    assert (keys["gpt2.block_count"], keys["gpt2.attention.head_count"], keys["gpt2.context_length"]) == (2, 4, 16)
    state = ours.state_dict()
    assert len(found) == len(state) - 1  # the head is token_embd
    for theirs, ours_name, transposed in (
        ("token_embd.weight", "wte.weight", False),
        ("blk.1.attn_qkv.weight", "h.1.attn.c_attn.weight", True),
        ("blk.0.ffn_down.weight", "h.0.mlp.c_proj.weight", True),
        ("blk.0.ffn_norm.bias", "h.0.ln_2.bias", False),
        ("position_embd.weight", "wpe.weight", False),
    ):
        shape, kind, content = found[theirs]
        expected = state["transformer." + ours_name]
        expected = expected.t() if transposed else expected
        assert shape == list(reversed(expected.shape))
        assert kind == (0 if "norm" in theirs or "position" in theirs else 8 if to.endswith("q8_0") else 1)
        numbers = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        if kind == 8:
            blocks = numbers.view(-1, 34)
            scale = blocks[:, :2].contiguous().view(torch.float16).float()  # [blocks, 1]
            values = blocks[:, 2:].contiguous().view(torch.int8) * scale
            # half a step of the grid, and the scale's own rounding to fp16
            assert ((values - expected.reshape(-1, 32)).abs() <= scale * (0.5 + 128 * 2**-11)).all()
        else:
            dtype = torch.float16 if kind == 1 else torch.float32
            assert torch.equal(numbers.view(dtype), expected.reshape(-1).to(dtype))


def test_names_of_tensorflows_h5():
    head = "transformer/tfgpt2lm_head_model/transformer"
    assert tensorflow_h5.our_name(f"{head}/h_._11/attn/c_attn/weight:0") == "transformer.h.11.attn.c_attn.weight"
    assert tensorflow_h5.our_name(f"{head}/h_._0/ln_1/gamma:0") == "transformer.h.0.ln_1.weight"
    assert tensorflow_h5.our_name(f"{head}/ln_f/beta:0") == "transformer.ln_f.bias"
    assert tensorflow_h5.our_name(f"{head}/wte/weight:0") == "transformer.wte.weight"
    assert tensorflow_h5.our_name("tf_bert/encoder/kernel:0") is None


def test_h5_without_h5py_says_what_to_install(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    (tmp_path / tensorflow_h5.FILE).write_bytes(b"x")
    assert main([str(tmp_path), str(tmp_path / "hf")]) == 1
    assert "pip install h5py" in capsys.readouterr().err


def test_the_command_says_what_it_did_and_what_it_cannot(saved, tmp_path, capsys):
    assert main([str(saved), str(tmp_path / "c"), "--to", "llmc", "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "Hugging Face's layout" in out
    assert "tied: lm_head.weight is transformer.wte.weight" in out
    assert f"wrote {tmp_path / 'c' / 'model.bin'}" in out
    assert main([str(tmp_path / "c" / "model.bin"), str(tmp_path / "d"), "--to", "nanogpt"]) == 0
    for arguments, error in {
        ("absent", "x"): "is not there",
        (saved, saved): "is the source",
        (saved, saved / "config.json"): "is a file",
        (saved / "config.json", "x"): "none of the kinds",
        (saved, "x", "--to", "llmc", "--dtype", "float16"): "llm.c's are float32 or bfloat16",
        (saved, "x", "--vocab-size", "102"): "only padding can be cut",
    }.items():
        assert main([str(tmp_path / a) if a == "x" else str(a) for a in arguments]) == 1
        assert error in capsys.readouterr().err
    assert not (tmp_path / "x").exists() or not list((tmp_path / "x").iterdir())


@pytest.mark.parametrize(
    ("fields", "to"),
    [
        ({"activation_function": "relu"}, "nanogpt"),
        ({"scale_attn_by_inverse_layer_idx": True}, "llmc"),
        ({"n_inner": 64}, "openai"),
        ({"tie_word_embeddings": False}, "openai"),
        ({"activation_function": "gelu"}, "llmc"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_a_model_that_a_format_cannot_say_is_refused(fields, to, tmp_path):
    GPT2(tiny_config(**SIZES, **fields)).save_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match=f"{next(iter(fields))} is .*, which .* cannot say; not written"):
        convert(tmp_path / "hf", tmp_path / "out", to)
    assert not list((tmp_path / "out").iterdir())


def test_damaged_files_are_refused_with_the_tensor(tmp_path, ours):
    state = nanogpt_state(rows=101)
    content = llmc_header(20240326, 3, 16, 101, 2, 3, 48, 128) + llmc_bytes(state, torch.float32)
    path = tmp_path / "model.bin"
    for change, error in {
        content[:100]: "has 100 bytes; llm.c's header alone has 1024",
        content[:2000]: r"ends at byte 2000, within transformer\.wte\.weight",
        content[:-4]: r"within transformer\.ln_f\.bias",
        content + b"1234": "its header describes",
        llmc_header(20240326, 4, 16, 101, 2, 3, 48, 128): "version 4; 20240326 and 3 or 5 are required",
        llmc_header(20240326, 3, 16, 101, 2, 3, 48, 7): "7 rows of wte for a vocabulary of 101",
        llmc_header(20240326, 3, -1, 101, 2, 3, 48, 128): "n_positions is -1",
        llmc_header(20240326, 3, 16, 2**31 - 1, 4096, 1, 2**31 - 1, 2**31 - 1): "parameters, .* are the most",
    }.items():
        path.write_bytes(change)
        with pytest.raises(ValueError, match=error):
            convert(path, tmp_path / "hf")
    path = tmp_path / "ckpt.pt"
    arguments = nanogpt_arguments(rows=101)
    short = {key: x for key, x in state.items() if key != "transformer.h.1.mlp.c_fc.weight"}
    for loaded, error in (
        ({"model": short, "model_args": arguments}, r"lacks transformer\.h\.1\.mlp\.c_fc\.weight"),
        ({"model": {**state, "extra": torch.ones(1)}, "model_args": arguments}, "has also extra"),
        ({"model": {**state, "extra": 3}, "model_args": arguments}, "'extra' is int"),
        ({"model": state, "model_args": {**arguments, "n_embd": "48"}}, "n_embd '48'; it must be int"),
        ({"model": state, "model_args": {**arguments, "n_embd": 24}}, "wrong shapes"),
        ({"weights": state}, "no checkpoint of nanoGPT's"),
        ({"model": {**state, "lm_head.weight": torch.ones(101, 48)}, "model_args": arguments}, "differs from wte"),
    ):
        torch.save(loaded, path)
        with pytest.raises(ValueError, match=error):
            convert(path, tmp_path / "hf")
    torch.save({"model": print, "model_args": arguments}, path)
    with pytest.raises(ValueError, match="damaged or holds more than tensors"):
        convert(path, tmp_path / "hf")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        convert(path, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    assert openai.is_openai(tmp_path) is False


def test_tensorflows_h5(ours, saved, tmp_path):
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    with h5py.File(tmp_path / tensorflow_h5.FILE, "w") as file:
        for name, tensor in ours.state_dict().items():
            *path, last = name.removeprefix("transformer.").split(".")
            if path[0] == "lm_head":
                continue
            where = "/".join(path).replace("h/", "h_._", 1) if path[0] == "h" else "/".join(path)
            if path[-1].startswith("ln_"):
                last = {"weight": "gamma", "bias": "beta"}[last]
            elif last == "bias":
                tensor = tensor[None]
            file[f"transformer/tfgpt2lm_head_model/transformer/{where}/{last}:0"] = tensor.numpy()
    convert(tmp_path, tmp_path / "hf")
    again = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(again[key], tensor) for key, tensor in load_file(saved / "model.safetensors").items())
    path = tmp_path / tensorflow_h5.FILE
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"tf_model\.h5 is truncated or damaged"):
        convert(tmp_path, tmp_path / "short")
