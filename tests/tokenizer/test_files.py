"""What is saved loads in transformers and here, with the same ids; what cannot be served is refused with the reason."""

import json

import pytest
from optional import tokenizers, transformers

from tokenizer import GPT2Tokenizer

TEXT = "Hello wörld, antidisestablishmentarianism\n\n  don't 中文 👩‍👩‍👧"


def test_transformers_loads_what_we_save(fresh, tmp_path):
    fresh.add_special_tokens({"cls_token": "[CLS]"})
    fresh.pad_token = fresh.eos_token
    fresh.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode(TEXT + "[CLS]") == fresh.encode(TEXT + "[CLS]")
    assert (theirs.cls_token_id, theirs.pad_token, theirs.model_max_length) == (50257, "<|endoftext|>", 1024)
    assert len(theirs) == len(fresh)


def test_save_vocabulary_writes_openais_files(gpt2, tmp_path):
    vocab, merges = gpt2.save_vocabulary(tmp_path, filename_prefix="x")
    theirs = transformers.GPT2Tokenizer(vocab=vocab, merges=merges)
    assert theirs.encode(TEXT) == gpt2.encode(TEXT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-merges.txt", "x-vocab.json"]


@pytest.mark.parametrize("files", [["tokenizer.json"], ["vocab.json", "merges.txt"]], ids="+".join)
def test_both_layouts_load(files, gpt2, saved, tmp_path):
    for file in [*files, "tokenizer_config.json"]:
        (tmp_path / file).write_bytes((saved / file).read_bytes())
    ours = GPT2Tokenizer.from_pretrained(tmp_path)
    assert ours.encode(TEXT) == gpt2.encode(TEXT)
    assert (len(ours), ours.eos_token_id, ours.model_max_length) == (50257, 50256, 1024)
    with pytest.raises(ValueError, match="special token"):
        ours.encode("<|endoftext|>")


def test_a_vocabulary_that_hugging_face_trained_loads(tmp_path):
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    theirs.train_from_iterator([TEXT * 5, "low lower lowest newer wider " * 9], trainer)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = GPT2Tokenizer.from_pretrained(tmp_path)
    assert ours.encode("lowest of the new wörld") == theirs.encode("lowest of the new wörld").ids
    assert ours.encode("<s>low", allowed_special="all") == theirs.encode("<s>low").ids


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2-large", "distilgpt2", "distilbert/distilgpt2"])
def test_gpt2s_names_need_no_network(name, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    assert len(GPT2Tokenizer.from_pretrained(name)) == 50257


def test_a_repository_out_of_reach_is_an_error_that_names_it(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"'nobody/nothing' is no directory, and .* of the hub repository"):
        GPT2Tokenizer.from_pretrained("nobody/nothing", local_files_only=True, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"normalizer": {"type": "NFC"}}, "a normalizer"),
        ({"model": {"type": "Unigram"}}, "model 'Unigram'"),
        ({"model": {"ignore_merges": True}}, "model option ignore_merges"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer 'Whitespace'"),
        ({"post_processor": {"type": "RobertaProcessing"}}, "post_processor 'RobertaProcessing'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_gpt2s_kind_is_refused(change, reason, saved, tmp_path):
    content = json.loads((saved / "tokenizer.json").read_text(encoding="utf-8"))
    for key, value in change.items():
        content[key] = (content[key] or {}) | value
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=f"has {reason}; it must be a byte-level BPE"):
        GPT2Tokenizer.from_pretrained(tmp_path)


def test_directories_without_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has neither tokenizer\.json nor vocab\.json with merges\.txt"):
        GPT2Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is no directory"):
        GPT2Tokenizer.from_pretrained(tmp_path / "nothing")
    (tmp_path / "tokenizer.json").write_text('{"model": ', encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not valid JSON"):
        GPT2Tokenizer.from_pretrained(tmp_path)


def test_saving_to_a_file_is_refused(gpt2, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file; a directory to save to is required"):
        gpt2.save_pretrained(tmp_path / "file")
