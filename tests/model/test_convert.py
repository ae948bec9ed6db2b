"""Checkpoints of nanoGPT, llm.c and OpenAI: the logits that their own code gives, and damage that is named."""

import json
import math

import numpy as np
import pytest
import torch
from peers import spread, tiny_config
from torch import nn

from model import GPT2
from model.checkpoints.formats import bundle, llmc, nanogpt, openai
from model.checkpoints.formats.crc32c import crc32c, masked
from model.convert import load, main, save

SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 16, "vocab_size": 101}
IDS = torch.arange(12).view(2, 6)


def tiny(**fields):
    torch.manual_seed(0)
    return spread(GPT2(tiny_config(**{**SIZES, "bos_token_id": None, "eos_token_id": None, **fields}))).eval()


@pytest.fixture(scope="module")
def model():
    return tiny()


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("to", ["safetensors", "nanogpt", "llmc", "openai"])
def test_there_and_back(to, tmp_path):
    model = tiny(activation_function="gelu") if to == "nanogpt" else tiny()
    save(model, tmp_path / "out", to)
    kind, again, _ = load(tmp_path / "out")
    assert kind == to
    assert torch.equal(logits(again), logits(model))
    assert again.lm_head.weight is again.transformer.wte.weight
    assert again.config.activation_function == model.config.activation_function
    for name in SIZES:
        assert getattr(again.config, name) == getattr(model.config, name)
    again.train()(IDS, labels=IDS).loss.backward()  # the weights are its own, and trainable


class TheirBlock(nn.Module):
    """nanoGPT's, in this test's own words: nn.Linear, optional biases, the exact GELU."""

    def __init__(self, C, H, bias):
        super().__init__()
        self.H = H
        self.ln_1, self.ln_2 = nn.LayerNorm(C, bias=bias), nn.LayerNorm(C, bias=bias)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.c_attn, self.attn.c_proj = nn.Linear(C, 3 * C, bias=bias), nn.Linear(C, C, bias=bias)
        self.mlp.c_fc, self.mlp.c_proj = nn.Linear(C, 4 * C, bias=bias), nn.Linear(4 * C, C, bias=bias)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (
            y.view(B, T, self.H, C // self.H).transpose(1, 2) for y in self.attn.c_attn(self.ln_1(x)).split(C, 2)
        )
        scores = (q @ k.mT / math.sqrt(C // self.H)).masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf)
        x = x + self.attn.c_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C))
        return x + self.mlp.c_proj(nn.functional.gelu(self.mlp.c_fc(self.ln_2(x))))


class TheirGPT(nn.Module):
    def __init__(self, V, bias):
        super().__init__()
        torch.manual_seed(1)
        self.args = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": V, "bias": bias}
        self.args["dropout"] = 0.0
        parts = {"wte": nn.Embedding(V, 32), "wpe": nn.Embedding(16, 32), "ln_f": nn.LayerNorm(32, bias=bias)}
        parts["h"] = nn.ModuleList(TheirBlock(32, 2, bias) for _ in range(2))
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(32, V, bias=False)
        self.lm_head.weight = self.transformer.wte.weight

    def forward(self, ids):
        x = self.transformer.wte(ids) + self.transformer.wpe.weight[: ids.shape[1]]
        for block in self.transformer.h:
            x = block(x)
        return self.lm_head(self.transformer.ln_f(x))


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_of_nanogpt_computes_what_nanogpt_does(bias, prefix, tmp_path):
    theirs = spread(TheirGPT(101, bias))
    state = {prefix + name: tensor for name, tensor in theirs.state_dict().items()}
    state[f"{prefix}transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16)  # the mask that older ones hold
    torch.save({"model": state, "model_args": theirs.args, "iter_num": 3, "optimizer": {}}, tmp_path / "ckpt.pt")
    for source in (tmp_path, tmp_path / "ckpt.pt"):
        kind, ours, notes = load(source)
        assert kind == "nanogpt"
        assert torch.allclose(logits(ours), theirs(IDS), atol=2e-5)
        assert any("exact GELU" in note for note in notes)
        assert any("biases" in note for note in notes) == (not bias)


def test_ours_loads_into_nanogpt(tmp_path):
    model = tiny(activation_function="gelu")
    assert save(model, tmp_path, "nanogpt") == []
    content = torch.load(tmp_path / "ckpt.pt")
    theirs = TheirGPT(101, content["model_args"].pop("bias"))
    theirs.load_state_dict(content["model"])
    assert torch.allclose(theirs(IDS), logits(model), atol=2e-5)
    assert content["model_args"] == {
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "block_size": 16,
        "vocab_size": 101,
        "dropout": 0.1,
    }
    assert "exact GELU" in save(tiny(), tmp_path, "nanogpt")[0]


def test_nanogpts_padded_vocabulary_is_cut(tmp_path):
    theirs = TheirGPT(50304, True)
    torch.save({"model": theirs.state_dict(), "model_args": theirs.args}, tmp_path / "ckpt.pt")
    _, ours, notes = load(tmp_path)
    assert ours.config.vocab_size == len(ours.transformer.wte.weight) == 50257
    assert "vocabulary: 50304 rows cut to GPT-2's 50257" in notes
    assert torch.allclose(logits(ours), theirs(IDS)[..., :50257], atol=2e-5)


@pytest.mark.parametrize(("version", "dtype"), [(3, torch.float32), (5, torch.bfloat16)])
def test_a_model_of_llmc_is_read_as_its_writer_lays_it_out(version, dtype, model, tmp_path):
    """Written here from the state dict as train_gpt2.py does: kinds in order, each over all layers, [out, in]."""
    state = {name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items()}
    parts = [nn.functional.pad(state["wte.weight"], (0, 0, 0, 27)), state["wpe.weight"]]
    for kind in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        for what in ("weight", "bias"):
            layers = [state[f"h.{i}.{kind}.{what}"] for i in range(2)]
            parts += [layer.T if layer.dim() == 2 else layer for layer in layers]
    parts += [state["ln_f.weight"], state["ln_f.bias"]]
    header = np.zeros(256, np.int32)
    header[:8] = 20240326, version, 16, 101, 2, 2, 32, 128
    path = tmp_path / "gpt2.bin"
    path.write_bytes(
        header.tobytes() + b"".join(part.to(dtype).contiguous().view(torch.uint8).numpy().tobytes() for part in parts)
    )
    kind, ours, _ = load(path)
    assert (kind, ours.dtype) == ("llmc", dtype)
    expected = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in ours.state_dict().items())
    save(ours, tmp_path / "again", "llmc")
    assert (tmp_path / "again" / "model.bin").read_bytes() == path.read_bytes()


def test_crcs_are_castagnolis():
    assert crc32c(b"123456789") == 0xE3069283  # Castagnoli 1993; RFC 3720, appendix B.4
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(bytes([0xFF]) * 32) == 0x62A8AB43
    assert crc32c(b"") == 0
    assert masked(0) == 0xA282EAD8


@pytest.mark.parametrize("size", [1, 16383, 16384, 16385, 100_000, 65536 * 3 + 5])
def test_a_crc_of_many_bytes_is_that_of_one_after_the_other(size, monkeypatch):
    data = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    plain = 0xFFFFFFFF
    for byte in data.tolist():
        plain ^= byte
        for _ in range(8):
            plain = plain >> 1 ^ (0x82F63B78 if plain & 1 else 0)
    assert crc32c(data) == crc32c(data.tobytes()) == plain ^ 0xFFFFFFFF
    monkeypatch.setattr("model.checkpoints.formats.crc32c._BLOCK", 40_000)
    assert crc32c(data) == plain ^ 0xFFFFFFFF


# OpenAI's: the index is written here from the table's format, with shared prefixes, restarts and several blocks


def number(value):
    out = b""
    while value > 127:
        out, value = out + bytes([value % 128 + 128]), value // 128
    return out + bytes([value])


def block(entries, every=3):
    out, restarts, last = b"", [], b""
    for i, (key, value) in enumerate(entries):
        if i % every == 0:
            restarts.append(len(out))
            last = b""
        shared = next((n for n, (a, b) in enumerate(zip(key, last)) if a != b), min(len(key), len(last)))
        out += number(shared) + number(len(key) - shared) + number(len(value)) + key[shared:] + value
        last = key
    out += b"".join(at.to_bytes(4, "little") for at in restarts or [0])
    return out + len(restarts or [0]).to_bytes(4, "little")


def table(entries, per_block=5):
    content, index = b"", []

    def append(body):
        nonlocal content
        at = len(content)
        content += body + b"\0" + masked(crc32c(body + b"\0")).to_bytes(4, "little")
        return number(at) + number(len(body))

    for i in range(0, len(entries), per_block):
        part = entries[i : i + per_block]
        index.append((part[-1][0], append(block(part))))
    handles = append(block([])) + append(block(index))
    return content + handles.ljust(40, b"\0") + 0xDB4775248B80FB57.to_bytes(8, "little")


def their_checkpoint(model, path):
    """As OpenAI's: named tensors in any order in the data, a step beside them."""
    arrays = {"global_step": np.array(7, np.int64)}
    for name, tensor in model.state_dict().items():
        words = name.split(".")[1:]
        if name == "lm_head.weight":
            continue
        array = tensor.numpy()
        if words[0] == "h":
            words = [f"h{words[1]}", *words[2:]]
        is_norm = any(word.startswith("ln_") for word in words)
        if words[0] in ("wte", "wpe"):
            words = words[:1]
        else:
            words[-1] = {"bias": "b", "weight": "g" if is_norm else "w"}[words[-1]]
        arrays["/".join(["model", *words])] = array[None] if words[-1] == "w" else array
    path.mkdir()
    data, entries = b"", [(b"", b"\x08\x01\x1a\x02\x08\x01")]
    for name in sorted(arrays, key=lambda name: name[::-1]):
        array = np.ascontiguousarray(arrays[name])
        content = array.tobytes()
        shape = b"".join(b"\x12" + number(len(d)) + d for d in (b"\x08" + number(n) for n in array.shape))
        value = b"\x08" + number({"float32": 1, "int64": 9}[array.dtype.name]) + b"\x12" + number(len(shape)) + shape
        value += b"\x20" + number(len(data)) + b"\x28" + number(len(content))
        entries.append((name.encode(), value + b"\x35" + masked(crc32c(content)).to_bytes(4, "little")))
        data += content
    (path / "model.ckpt.index").write_bytes(table(sorted(entries)))
    (path / "model.ckpt.data-00000-of-00001").write_bytes(data)
    hparams = {"n_vocab": 101, "n_ctx": 16, "n_embd": 32, "n_head": 2, "n_layer": 2}
    (path / "hparams.json").write_text(json.dumps(hparams))
    return path


@pytest.fixture(scope="module")
def original(model, tmp_path_factory):
    return their_checkpoint(model, tmp_path_factory.mktemp("openai") / "124M")


def test_openais_checkpoint_is_read_without_tensorflow(original, model):
    kind, ours, notes = load(original)
    assert kind == "openai"
    assert notes == ["dropped: global_step"]
    assert torch.equal(logits(ours), logits(model))


def test_no_flipped_byte_goes_unnoticed(original, tmp_path):
    """In the index each byte counts but what pads the footer; in the data a sample, since CRCs cover all of it."""
    for name, positions in (("model.ckpt.index", None), ("model.ckpt.data-00000-of-00001", 12)):
        content = (original / name).read_bytes()
        places = range(len(content)) if positions is None else range(0, len(content), len(content) // positions)
        footer = len(content) - 48
        for at in places:
            if positions is None and (at % 23 or at >= footer):
                continue
            damaged = bytearray(content)
            damaged[at] ^= 0x10
            for other in original.iterdir():
                (tmp_path / other.name).write_bytes(other.read_bytes() if other.name != name else damaged)
            with pytest.raises(ValueError, match=r"damaged|CRC-32C|compressed|not those that were saved"):
                openai.read(tmp_path)


@pytest.mark.parametrize("size", [0, 10, 47, 300, -1])
@pytest.mark.parametrize("name", ["model.ckpt.index", "model.ckpt.data-00000-of-00001"])
def test_files_that_were_cut_off_are_named(name, size, original, tmp_path):
    for other in original.iterdir():
        content = other.read_bytes()
        (tmp_path / other.name).write_bytes(content[:size] if other.name == name else content)
    with pytest.raises(ValueError, match=r"model\.ckpt\."):
        load(tmp_path)


def test_tensors_that_do_not_fit_are_named(original, model, tmp_path):
    for other in original.iterdir():
        (tmp_path / other.name).write_bytes(other.read_bytes())
    (tmp_path / "hparams.json").write_text('{"n_vocab": 101, "n_ctx": 16, "n_embd": 32, "n_head": 2, "n_layer": 3}')
    with pytest.raises(ValueError, match=r"transformer\.h\.2\.ln_1\.weight is missing"):
        load(tmp_path)
    (tmp_path / "hparams.json").write_text('{"n_vocab": 100, "n_ctx": 16, "n_embd": 32, "n_head": 2, "n_layer": 2}')
    with pytest.raises(ValueError, match=r"wte\.weight is \(101, 32\); with its config it must be \(100, 32\)"):
        load(tmp_path)
    (tmp_path / "hparams.json").write_text('{"n_vocab": 100}')
    with pytest.raises(ValueError, match=r"hparams\.json: n_ctx must be an integer"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda header: header.__setitem__(1, 4), "version 4; 3, of fp32, and 5"),
        (lambda header: header.__setitem__(4, 3), "bytes; with its header it must have"),
        (lambda header: header.__setitem__(7, 100), "vocabulary 101 of 100"),
        (lambda header: header.__setitem__(6, 1 << 30), "channels 1073741824"),
    ],
    ids=["version", "layers", "padding", "channels"],
)
def test_headers_of_llmc_that_cannot_be_are_refused(change, words, model, tmp_path):
    save(model, tmp_path, "llmc")
    content = bytearray((tmp_path / "model.bin").read_bytes())
    header = np.frombuffer(content, np.int32, 256)
    change(header)
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        load(tmp_path)


class Hostile:
    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model": {}, "model_args": {"n_layer": Hostile()}}, "cannot be read"),
        ({"weights": {}}, 'a dict with "model" and "model_args"'),
        ({"model": {}, "model_args": {"n_layer": 2}}, "must have the integers n_layer, n_head"),
        ([1, 2], "a dict with"),
    ],
    ids=["code", "another dict", "half of the arguments", "a list"],
)
def test_pickles_that_are_not_nanogpts_are_refused(content, words, tmp_path):
    torch.save(content, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match=words):
        load(tmp_path / "ckpt.pt")
    (tmp_path / "ckpt.pt").write_bytes((tmp_path / "ckpt.pt").read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        load(tmp_path / "ckpt.pt")


@pytest.mark.parametrize(
    ("fields", "to", "words"),
    [
        ({"n_inner": 40}, "nanogpt", "n_inner = 4 n_embd"),
        ({"tie_word_embeddings": False}, "llmc", "a tied head"),
        ({"activation_function": "relu"}, "llmc", "GELU by tanh; this model has relu"),
        ({"activation_function": "gelu"}, "openai", "GELU by tanh; this model has gelu"),
    ],
    ids=str,
)
def test_what_a_format_has_no_place_for_is_refused_before_anything_is_written(fields, to, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        save(tiny(**fields), tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_the_command(original, tmp_path, capsys, model):
    assert main([str(original), str(tmp_path / "ours")]) == 0
    assert capsys.readouterr().out.startswith("openai -> safetensors: 29 tensors")
    assert main([str(tmp_path / "ours"), str(tmp_path / "bin"), "--to", "llmc"]) == 0
    assert "vocabulary: 101 rows, zeros up to 128" in capsys.readouterr().out
    assert main([str(tmp_path / "bin" / "model.bin"), str(tmp_path / "back"), "--to", "openai"]) == 0
    assert torch.equal(logits(load(tmp_path / "back")[1]), logits(model))
    capsys.readouterr()
    (tmp_path / "file").write_text("x")
    for source, target, words in (
        (tmp_path / "file", tmp_path / "out", "is a file of no format that is read"),
        (tmp_path / "ours", tmp_path / "file", "is a file; a directory to write to is required"),
    ):
        assert main([str(source), str(target)]) == 2
        err = capsys.readouterr().err
        assert words in err
        assert err.count("\n") == 1


def test_a_save_that_fails_leaves_what_was_there(model, tmp_path, monkeypatch):
    save(model, tmp_path, "llmc")
    before = (tmp_path / "model.bin").read_bytes()
    other = tiny(n_layer=1)

    def failing(file):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(llmc, "write", lambda model: ("model.bin", failing, []))
    with pytest.raises(OSError, match="no space"):
        save(other, tmp_path, "llmc")
    assert (tmp_path / "model.bin").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["model.bin"]
    assert (nanogpt.is_one(tmp_path), openai.is_one(tmp_path), llmc.is_one(tmp_path)) == (False, False, True)
    assert bundle._FOOTER == 48
