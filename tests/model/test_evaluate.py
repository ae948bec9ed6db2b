"""python -m model.evaluate: each token is predicted once, from as much before it as the stride promises."""

import io
import json
import math

import pytest
import torch
from peers import TALKATIVE, spread, tiny_config

from model import GPT2
from model.evaluate import last_word_accuracy, main, perplexity
from model.generation.rounded import product_errors, rounded
from tokenizer import GPT2Tokenizer

TEXT = "It was a dark and stormy night; the rain fell in torrents, except at occasional intervals. " * 3


@pytest.fixture(scope="module")
def tokenizer():
    return GPT2Tokenizer.train([TEXT] * 3, 290, progress=False)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = tiny_config(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0, n_positions=32)
    return spread(GPT2(config, attn_implementation="eager"), TALKATIVE).eval()


@pytest.fixture(scope="module")
def directory(model, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def by_hand(model, ids, T, stride):
    """The loss of each token but the first, from the first window that holds it."""
    losses = {}
    for start in range(0, len(ids), stride):
        window = torch.tensor(ids[start : start + T])
        logits = model(window[None], use_cache=False).logits[0].double().log_softmax(-1)
        for i in range(1, len(window)):
            losses.setdefault(start + i, -float(logits[i - 1, window[i]]))
        if start + T >= len(ids):
            break
    return losses


@pytest.mark.parametrize(("T", "stride"), [(32, 16), (32, 1), (32, 31), (8, 3), (None, None), (2, 1)])
def test_each_token_counts_once(T, stride, model, tokenizer):
    ids = tokenizer.encode_ordinary(TEXT)
    found = perplexity(model, tokenizer, TEXT, T=T, stride=stride)
    losses = by_hand(model, ids, T or 32, stride or (T or 32) // 2)
    assert found["tokens"] == len(losses) == len(ids) - 1
    mean = sum(losses.values()) / len(losses)
    assert found["loss"] == pytest.approx(mean, abs=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
    size = len(TEXT.encode()) - len(tokenizer.decode_bytes(ids[:1]))
    assert found["bits_per_byte"] == pytest.approx(sum(losses.values()) / math.log(2) / size, rel=1e-5)


def test_the_last_word_is_right_where_all_its_tokens_are(model, tokenizer):
    context = "It was a dark and"
    ids = tokenizer.encode_ordinary(context)
    said = tokenizer.decode(model.generate([ids], max_new_tokens=1)[0, len(ids) :].tolist())
    wrong = "stormy" if said.strip() != "stormy" else "night"
    found = last_word_accuracy(model, tokenizer, [f"{context} {wrong}", "word", "", f"{context} torrents"])
    assert found["lines"] == 2
    for word in (wrong, "torrents"):
        target = tokenizer.encode_ordinary(" " + word)
        whole = torch.tensor([*ids, *target])
        logits = model(whole[None], use_cache=False).logits[0, len(ids) - 1 : -1].double()
        greedy = bool((logits.argmax(-1) == whole[len(ids) :]).all())
        alone = last_word_accuracy(model, tokenizer, [f"{context} {word}"])
        assert alone["accuracy"] == float(greedy)
        loss = torch.nn.functional.cross_entropy(logits, whole[len(ids) :], reduction="sum")
        assert alone["loss"] == pytest.approx(float(loss), rel=1e-4)


def test_the_command(directory, model, tokenizer, tmp_path, capsys, monkeypatch):
    (tmp_path / "text.txt").write_text(TEXT)
    assert main([str(tmp_path / "text.txt"), "--model", directory, "--seq-len", "16", "--stride", "4", "--json"]) == 0
    expected = perplexity(model, tokenizer, TEXT, T=16, stride=4)
    assert json.loads(capsys.readouterr().out) == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert main(["-", "--model", directory, "--last-word"]) == 0
    assert capsys.readouterr().out.startswith("accuracy ")


@pytest.fixture(scope="module")
def trained():
    """A model of letters, trained on a text that repeats itself with other numbers: far better than chance."""
    torch.manual_seed(0)
    digits = torch.randint(10, (300,)).tolist()
    ids = torch.tensor([b for d in digits for b in f"{d}+{9 - d}=nine; ".encode()])
    dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    config = tiny_config(n_layer=2, n_embd=32, n_head=2, vocab_size=128, n_positions=32, **dropout)
    model = GPT2(config, attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        starts = torch.randint(len(ids) - 640 - 32, (8,))
        batch = torch.stack([ids[i : i + 32] for i in starts])
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), ids[-640:].unfold(0, 32, 32)


def test_int8_weights_keep_the_perplexity_of_a_trained_model(trained):
    model, held_out = trained
    with torch.no_grad():
        before, after = (float(m(held_out, labels=held_out).loss) for m in (model, rounded(model)))
    assert before < 1.0  # nats a letter; 4.9 is chance
    assert math.exp(after - before) == pytest.approx(1, abs=0.01)
    errors = product_errors(model, held_out)
    assert [set(layer) for layer in errors] == [{"layer", "qkv", "out", "fc", "proj"}] * 2 + [{"layer", "head"}]
    assert all(0 < error < 0.02 for layer in errors for name, error in layer.items() if name != "layer")


def test_the_command_tells_the_error_of_each_layer(directory, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    given = [str(tmp_path / "text.txt"), "--model", directory, "--weights", "int8"]
    assert main(given) == 0
    *layers, result = capsys.readouterr().out.splitlines()
    assert layers[0].startswith("layer 0: error of products in int8: qkv ")
    assert layers[-1].startswith("layer head: error of products in int8: head ")
    assert main([*given, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert f"perplexity {told['perplexity']:.6g}" in result
    assert [layer["layer"] for layer in told["layers"]] == [*range(len(layers) - 1), "head"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nowhere.txt",), "nowhere.txt"),
        (("text.txt", "--stride", "0"), "stride is 0; it must be from 1 to 31"),
        (("text.txt", "--stride", "32"), "stride is 32"),
        (("text.txt", "--seq-len", "33"), "windows of 33 tokens; 2 to n_positions = 32"),
        (("empty.txt",), "the text has 0 tokens"),
        (("empty.txt", "--weights", "int8"), "the text has 0 tokens; the layers' errors need one"),
        (("empty.txt", "--last-word"), "no line has two words"),
        (("binary.txt",), "binary.txt is not UTF-8 (byte 1: invalid start byte)"),
    ],
    ids=str,
)
def test_what_cannot_be_evaluated_is_one_line(arguments, words, directory, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"a\xff")
    assert main([*arguments, "--model", directory]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
