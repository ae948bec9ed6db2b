"""Roles, special tokens and added ones: what is said is kept, by the tokenizer, by its files, and by transformers'."""

import json

import pytest
from optional import tokenizers, transformers

from tokenizer import GPT2Tokenizer, StreamDecoder

TEXT = "a <tool> b [CLS] c new<x> abc"


def add(tokenizer):
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "additional_special_tokens": ["<x>"]})
    tokenizer.add_tokens(["<tool>", "new", "abc"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<x>", "bc"]})


def same(ours, peer):
    ids = ours.encode(TEXT)
    assert ids == peer.encode(TEXT)
    assert len(ours) == len(peer)
    for skip in (False, True):
        assert ours.decode(ids, skip_special_tokens=skip) == peer.decode(ids, skip_special_tokens=skip)
        expected = peer.convert_ids_to_tokens([*ids, 60000], skip_special_tokens=skip)
        assert ours.convert_ids_to_tokens([*ids, 60000], skip_special_tokens=skip) == expected
    for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
        assert getattr(ours, f"{role}_token") == getattr(peer, f"{role}_token"), role
        assert getattr(ours, f"{role}_token_id") == getattr(peer, f"{role}_token_id"), role
    assert ours.get_vocab() == peer.get_vocab()
    assert ours.get_added_vocab() == peer.get_added_vocab()


def test_added_tokens_are_transformers(fresh, saved):
    peer = transformers.AutoTokenizer.from_pretrained(saved)
    for tokenizer in (fresh, peer):
        add(tokenizer)
    same(fresh, peer)


@pytest.mark.parametrize("drop", [(), ("tokenizer.json",)], ids=["tokenizer.json", "vocab.json"])
def test_they_survive_saving_here_and_in_transformers(drop, fresh, tmp_path):
    add(fresh)
    fresh.pad_token_id = fresh.add_special_tokens({"mask_token": "[M]"}) and fresh.mask_token_id
    fresh.unk_token = None
    fresh.padding_side = "left"
    fresh.save_pretrained(tmp_path)
    for name in drop:
        (tmp_path / name).unlink()
    ours = GPT2Tokenizer.from_pretrained(tmp_path)
    assert ours.encode(TEXT) == fresh.encode(TEXT)
    assert ours.roles == fresh.roles
    assert ours.padding_side == "left"
    assert ours.vocab_size == 50257
    assert ours.additional_special_tokens == ["bc", "<x>"]
    same(ours, transformers.AutoTokenizer.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match="special token"):
        ours.encode("<|endoftext|>")  # read only where it is asked for, as before


def test_what_transformers_saved_loads(saved, tmp_path):
    peer = transformers.AutoTokenizer.from_pretrained(saved, pad_token="[PAD]", add_prefix_space=True)
    add(peer)
    peer.save_pretrained(tmp_path)
    ours = GPT2Tokenizer.from_pretrained(tmp_path)
    assert ours.add_prefix_space
    same(ours, peer)


def test_the_older_layout_of_transformers_loads(fresh, tmp_path):
    fresh.save_vocabulary(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[PAD]": 50257, "wörd": 50258, "<x>": 50259}))
    roles = {"pad_token": "[PAD]", "bos_token": {"content": "<|endoftext|>"}, "additional_special_tokens": ["<x>"]}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(roles))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": None, "chat_template": "{{x}}"}))
    ours = GPT2Tokenizer.from_pretrained(tmp_path)
    ids = ours.encode("a[PAD] wörd<x>")
    assert ids == [64, 50257, 220, 50258, 50259]
    assert ours.decode(ids, skip_special_tokens=True) == "a wörd"
    assert (ours.pad_token_id, ours.bos_token_id, ours.model_max_length) == (50257, 50256, None)
    ours.save_pretrained(tmp_path / "again")
    again = GPT2Tokenizer.from_pretrained(tmp_path / "again")
    assert again.encode("a[PAD] wörd<x>") == ids
    assert json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())["chat_template"] == "{{x}}"


@pytest.mark.parametrize("name", ["[PAD]", "<|endoftext|>"])
def test_a_role_may_be_given_when_loading(name, saved):
    ours = GPT2Tokenizer.from_pretrained("gpt2", pad_token=name)
    peer = transformers.AutoTokenizer.from_pretrained(saved, pad_token=name)
    assert (ours.pad_token, ours.pad_token_id, len(ours)) == (name, peer.pad_token_id, len(peer))
    assert ours(["a b", "c"], padding=True).input_ids == peer(["a b", "c"], padding=True).input_ids
    assert ours.eos_token == "<|endoftext|>"


def test_the_padding_token_that_was_added_pads(fresh):
    fresh.add_special_tokens({"pad_token": "[PAD]"})
    assert fresh(["a b", "c"], padding=True).input_ids == [[64, 275], [66, 50257]]
    fresh.pad_token_id = 0  # an ordinary token may play a role, and stays ordinary
    assert fresh.pad_token == "!"
    assert fresh(["a b", "c"], padding=True).input_ids == [[64, 275], [66, 0]]
    assert fresh.decode([0, 50257], skip_special_tokens=True) == "!"
    fresh.pad_token_id = None
    assert fresh.pad_token is None


def test_a_token_of_hugging_faces(fresh):
    assert fresh.add_tokens(tokenizers.AddedToken("<a>", special=True)) == 1
    assert fresh.add_tokens(["<a>", tokenizers.AddedToken("<b>")]) == 1
    assert fresh.decode(fresh.encode("<a><b>"), skip_special_tokens=True) == "<b>"
    assert fresh.add_tokens(["<b>"], special_tokens=True) == 0
    assert fresh.decode(fresh.encode("<a><b>"), skip_special_tokens=True) == ""
    with pytest.raises(ValueError, match="'<c>' has lstrip, which is not supported"):
        fresh.add_tokens(tokenizers.AddedToken("<c>", lstrip=True))
    with pytest.raises(ValueError, match="'é' is the spelling of another text's"):
        fresh.add_tokens("é")  # Hugging Face gives it the id of a byte, which decodes to U+FFFD


def test_padding_that_tokenizer_json_holds(saved, tmp_path):
    theirs = tokenizers.Tokenizer.from_file(str(saved / "tokenizer.json"))
    theirs.enable_padding(direction="left", pad_id=50256, pad_token="<|endoftext|>")
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = GPT2Tokenizer.from_pretrained(tmp_path)
    assert (ours.pad_token, ours.padding_side) == ("<|endoftext|>", "left")


@pytest.mark.parametrize("setting", ["add_bos_token", "add_eos_token", "split_special_tokens"])
def test_a_setting_that_cannot_be_served_is_refused(setting, fresh, tmp_path):
    fresh.save_vocabulary(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({setting: True}))
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json sets {setting}, which"):
        GPT2Tokenizer.from_pretrained(tmp_path)


def test_ids_beyond_the_vocabulary_decode_to_nothing(gpt2, saved):
    # A model whose embedding is padded, say to 50304 rows, may generate them.
    ids = [64, 50300, 65, 10**6]
    assert gpt2.decode(ids) == transformers.AutoTokenizer.from_pretrained(saved).decode(ids) == "ab"
    assert gpt2.batch_decode([ids, [50300]]) == ["ab", ""]
    assert gpt2.decode([64, *[50300] * 5000, 65] * 60) == "ab" * 60  # long enough for numpy
    stream = StreamDecoder(gpt2)
    assert "".join(map(stream.push, ids)) == "ab"
    for wrong in (ids, [50257]):
        with pytest.raises(ValueError, match=r"decode_bytes: id 50(300|257) is not in the vocabulary"):
            gpt2.decode_bytes(wrong)


def test_a_surrogate_pair_is_the_character_that_it_stands_for(gpt2, fresh):
    pair = "".join(chr(int.from_bytes("👩".encode("utf-16-be")[i : i + 2], "big")) for i in (0, 2))
    assert len(pair) == 2
    assert gpt2.encode(f"a{pair}b") == gpt2.encode("a👩b") == gpt2.encode_ordinary(f"a{pair}b")
    assert gpt2([f"a{pair}b"]).input_ids == [gpt2.encode("a👩b")]
    fresh.add_special_tokens({"cls_token": "<👩>"})
    assert fresh.encode(f"<{pair}>") == [50257]
    with pytest.raises(ValueError, match=r"GPT2Tokenizer.encode: lone surrogate U\+D83D at character 3"):
        gpt2.encode(f"{pair}a\ud83d")


def test_tiktokens_names(gpt2, openai):
    for name in ("n_vocab", "max_token_value", "eot_token", "name", "special_tokens_set"):
        assert getattr(gpt2, name) == getattr(openai, name), name
    batch = [[64, 65], [447], []]
    assert gpt2.decode_batch(batch) == openai.decode_batch(batch)
    assert gpt2.decode_batch(batch, errors="ignore") == openai.decode_batch(batch, errors="ignore")
    assert gpt2.decode_bytes_batch(batch) == openai.decode_bytes_batch(batch)
    assert gpt2.encode_ordinary_batch(["a b", "<|endoftext|>"]) == openai.encode_ordinary_batch(
        ["a b", "<|endoftext|>"]
    )
    for token in (" hello", b"\xe2\x80", "<|endoftext|>"):
        assert gpt2.encode_single_token(token) == openai.encode_single_token(token)
    assert gpt2.decode_tokens_bytes([995, 50256]) == openai.decode_tokens_bytes([995, 50256])
    assert gpt2.decode_single_token_bytes(447) == openai.decode_single_token_bytes(447)
    assert [gpt2.is_special_token(id) for id in (50256, 0)] == [True, False]
    assert gpt2.token_byte_values() == openai.token_byte_values()
    assert gpt2.encode_to_numpy("a b").tolist() == openai.encode_to_numpy("a b").tolist()
    with pytest.raises(ValueError, match="encode_single_token: b'hello world' is no token"):
        gpt2.encode_single_token("hello world")


def test_a_hub_token_is_never_shown(saved):
    ours = GPT2Tokenizer.from_pretrained(saved, token="hf_secret")
    assert "hf_secret" not in repr(ours) + repr(vars(ours))
