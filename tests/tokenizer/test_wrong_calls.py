"""What is wrong in a call is one TypeError or ValueError with function and argument; in a file, one with its path."""

import inspect
import json
import re
import time

import numpy as np
import pytest
import torch

from tokenizer import GPT2Tokenizer, StreamDecoder

RIGHT = {
    "text": "a b",
    "texts": ["a b"],
    "ids": [64, 65],
    "token_ids_0": [64],
    "tokens": ["a"],
    "sequences": [[64], [65]],
    "batch": [[64], [65]],
    "token": 64,
    "text_or_bytes": "a",
    "encoded_inputs": {"input_ids": [[1, 2], [3]]},
    "special_tokens_dict": {"cls_token": "[CLS]"},
    "new_tokens": ["<a>"],
    "vocab_size": 300,
}
NAMED = {
    "encode_batch": {"text": ["a"]},
    "encode_ordinary_batch": {"text": ["a"]},
    "decode_with_offsets": {"tokens": [64]},
    "decode_tokens_bytes": {"tokens": [64]},
}
WRONG = {
    "None": None,
    "int": 3,
    "negative": -1,
    "huge": 1 << 70,
    "float": 1.5,
    "nan": float("nan"),
    "bool": True,
    "str": "x\0y",
    "lone surrogate": "\ud800",
    "empty str": "",
    "bytes": b"\xff",
    "list": [],
    "list of list": [[]],
    "list of None": [None],
    "list of float": [0.5],
    "list of bool": [True],
    "list of str": ["\udfff"],
    "dict": {},
    "set": {1},
    "object": object(),
    "array": np.ones((2, 2)),
    "array of ids": np.array([1, 60000]),
    "tensor": torch.ones(2, 2),
    "scalar": torch.tensor(1.0),
    "type": int,
}
METHODS = [
    name
    for name, value in inspect.getmembers(GPT2Tokenizer)
    if callable(value) and (not name.startswith("_") or name in ("__call__", "__init__")) and name != "train"
]
OPTIONS = {"encode": ["padding", "truncation", "max_length", "stride", "return_tensors", "allowed_special"]}
OPTIONS["__init__"] = ["pad_token"]
# What a path, a hub name or a limit may be: written to, fetched, or harmless.
HARMLESS = {"save_directory", "pretrained_model_name_or_path", "filename_prefix"}


def parameters(name):
    signature = inspect.signature(getattr(GPT2Tokenizer, name))
    return [
        p
        for p in signature.parameters.values()
        if p.name not in ("self", "vocabulary") and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]


def calls():
    for name in METHODS:
        required = [p.name for p in parameters(name) if p.default is p.empty]
        for argument in [*(p.name for p in parameters(name)), *OPTIONS.get(name, [])]:
            if argument not in HARMLESS:
                yield name, argument, [other for other in required if other not in HARMLESS]


CALLS = list(calls())


def test_there_are_enough_of_them():
    assert len({(name, argument) for name, argument, _ in CALLS}) * len(WRONG) > 1000


@pytest.mark.parametrize(("name", "argument", "required"), CALLS, ids=lambda value: str(value).strip("_"))
def test_a_wrong_argument(name, argument, required, gpt2, tmp_path):
    function = getattr(GPT2Tokenizer, name)
    for kind, value in WRONG.items():
        if name == "from_pretrained":
            positional = ("gpt2",)
        elif name == "__init__":
            positional = (GPT2Tokenizer.__new__(GPT2Tokenizer), gpt2.vocabulary)
        else:
            positional = (copied(gpt2),)
        if name.startswith("save"):
            positional += (tmp_path,)
        arguments = {other: NAMED.get(name, {}).get(other, RIGHT.get(other)) for other in required}
        try:
            function(*positional, **arguments | {argument: value})
        except UnicodeDecodeError:
            assert name == "decode_with_offsets"
        except (TypeError, ValueError) as error:
            said = str(error)
            # Several texts or rows are so many calls for one; options of encode are those of a call;
            # the class adds the special tokens that it is given.
            assert re.match(
                rf"GPT2Tokenizer(\.{name.strip('_')}|\.(en|de)code\w*|\.add_special_tokens)?: |StreamDecoder: ", said
            ), (
                kind,
                said,
            )
            named = argument in said or re.search(r"\b(ids?|text|token|tokens|input_ids|max_length|rows?|role)\b", said)
            assert named, (kind, said)


def copied(tokenizer):
    """One whose state a call may change, without the half second that making it anew takes."""
    clone = GPT2Tokenizer.__new__(GPT2Tokenizer)
    clone.__dict__ = {
        name: value.copy() if isinstance(value, (dict, set)) else value for name, value in vars(tokenizer).items()
    }
    return clone


@pytest.mark.parametrize("kind", WRONG)
def test_attributes_and_streams_are_checked(kind, gpt2):
    settings = ["errors", "model_max_length", "padding_side", "truncation_side", "add_prefix_space"]
    for name in (*settings, "pad_token", "pad_token_id"):
        before = copied(gpt2)
        try:
            setattr(before, name, WRONG[kind])
        except (TypeError, ValueError) as error:
            assert name in str(error)  # noqa: PT017
        else:
            before("a b", return_tensors="np")
    for call in (StreamDecoder, StreamDecoder(gpt2).push, lambda value: StreamDecoder(gpt2, errors=value)):
        try:
            call(WRONG[kind])
        except (TypeError, ValueError) as error:
            assert "StreamDecoder" in str(error)  # noqa: PT017


def test_wrong_texts_to_train_on():
    for texts in (None, 3, "a", b"a", [3], [None], ["a", 3]):
        with pytest.raises((TypeError, ValueError), match=r"GPT2Tokenizer\.train: "):
            GPT2Tokenizer.train(texts, 300, progress=False)
    for size in (None, 1.5, True, -1, 256, "300"):
        with pytest.raises((TypeError, ValueError), match=r"GPT2Tokenizer\.train: vocab_size"):
            GPT2Tokenizer.train(["a"], size, progress=False)


DEEP = "[" * 10**5


def damage(content):
    """{name: text} of a tokenizer.json that is damaged in every way; content: one that is not."""

    def changed(**what):
        return json.dumps(content | what)

    vocab, model = content["model"]["vocab"], content["model"]
    token = content["added_tokens"][0]
    yield from {
        "cut short": json.dumps(content)[:-9],
        "deep": DEEP,
        "deep inside": '{"model": ' + DEEP,
        "no object": "[1]",
        "empty": "",
        "no model": changed(model=None),
        "no vocabulary": changed(model=model | {"vocab": None}),
        "a list for a vocabulary": changed(model=model | {"vocab": ["a"]}),
        "no merges": changed(model=model | {"merges": None}),
        "a merge of three": changed(model=model | {"merges": [["a", "b", "c"]]}),
        "a merge of numbers": changed(model=model | {"merges": [[1, 2]]}),
        "merges that make up for each other": changed(model=model | {"merges": ["a", "b c d"]}),
        "a float id": changed(model=model | {"vocab": vocab | {"a": 64.0}}),
        "a bool id": changed(model=model | {"vocab": vocab | {"a": True}}),
        "a negative id": changed(model=model | {"vocab": vocab | {"a": -1}}),
        "an id twice": changed(model=model | {"vocab": vocab | {"a": 65}}),
        "a huge id": changed(model=model | {"vocab": vocab | {"new": 3 * 10**8}}),
        "a name with the separator": changed(model=model | {"vocab": vocab | {"a\uffffb": 60000}}),
        "a name in no alphabet": changed(model=model | {"vocab": vocab | {"中": 60000}}),
        "a key twice": '{"version": "1", "version": "2"}',
        "an added token without content": changed(added_tokens=[token | {"content": None}]),
        "an added token that is none": changed(added_tokens=["<a>"]),
        "an added float id": changed(added_tokens=[token | {"id": 1.0}]),
        "an added token with a surrogate": changed(added_tokens=[token | {"content": "\ud800", "id": 60000}]),
        "two ids": changed(added_tokens=[token | {"id": 5}]),
        "a huge added id": changed(added_tokens=[token | {"content": "<x>", "id": 3 * 10**8}]),
    }.items()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    directory = tmp_path_factory.mktemp("small")
    GPT2Tokenizer.train(["low lower " * 9], 261, progress=False).save_pretrained(directory)
    return directory


def test_a_damaged_tokenizer_json(small, tmp_path):
    path = tmp_path / "tokenizer.json"
    for name, text in damage(json.loads((small / "tokenizer.json").read_text(encoding="utf-8"))):
        path.write_text(text)
        start = time.perf_counter()
        with pytest.raises(ValueError, match=re.escape(str(path))):
            print(name, GPT2Tokenizer.from_pretrained(tmp_path))
        assert time.perf_counter() - start < 2, name  # a table of 3 * 10**8 places would take twelve
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match=re.escape(str(path))):
        GPT2Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"additional_special_tokens": "abc"},
        {"additional_special_tokens": [3]},
        {"extra_special_tokens": "abc"},
        {"pad_token": 3},
        {"pad_token": {"content": None}},
        {"pad_token": ""},
        {"pad_token": "\ud800"},
        {"model_max_length": -1},
        {"model_max_length": "7"},
        {"model_max_length": 1.5},
        {"model_max_length": True},
        {"padding_side": "up"},
        {"errors": "nothing"},
        {"add_prefix_space": 3},
        {"added_tokens_decoder": [1]},
        {"added_tokens_decoder": {"x": {"content": "a"}}},
        {"added_tokens_decoder": {"300000000": {"content": "<a>"}}},
        {"added_tokens_decoder": {"300": {"content": "<a>", "lstrip": True}}},
    ],
    ids=str,
)
def test_a_wrong_tokenizer_config(config, small, tmp_path):
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((small / name).read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        GPT2Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        GPT2Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("limit", [None, 10**30, 1e30])
def test_no_limit(limit, small, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((small / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": limit}))
    assert GPT2Tokenizer.from_pretrained(tmp_path).model_max_length is None


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"])
def test_damage_in_the_older_layout(name, small, tmp_path):
    for text in (DEEP, "[1]", "\ufeff{", "a b c", '{"a": 1.5}'):
        for file in ("vocab.json", "merges.txt"):
            (tmp_path / file).write_bytes((small / file).read_bytes())
        (tmp_path / name).write_text(text, encoding="utf-8")
        if (name, text) == ("special_tokens_map.json", '{"a": 1.5}'):
            continue  # a key that nobody reads
        with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
            GPT2Tokenizer.from_pretrained(tmp_path)
