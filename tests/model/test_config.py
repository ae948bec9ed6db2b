"""GPT2Config reads, holds and writes what transformers.GPT2Config does, and refuses what describes no GPT-2."""

import json
import time

import pytest
import torch
from optional import transformers
from whole import marked

from model import GPT2, GPT2Config

# Who wrote the file and where it came from; not the model.
PROVENANCE = {"transformers_version", "_name_or_path"}
UNUSUAL = {
    "vocab_size": 500,
    "n_positions": 128,
    "n_embd": 96,
    "n_layer": 3,
    "n_head": 6,
    "n_inner": 200,
    "activation_function": "relu",
    "resid_pdrop": 0.2,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.3,
    "layer_norm_epsilon": 1e-6,
    "initializer_range": 0.01,
    "summary_type": "last",
    "summary_use_proj": False,
    "summary_activation": "tanh",
    "summary_proj_to_labels": False,
    "summary_first_dropout": 0.4,
    "scale_attn_weights": False,
    "scale_attn_by_inverse_layer_idx": True,
    "reorder_and_upcast_attn": True,
    "use_cache": False,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": 4,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "output_hidden_states": True,
    "output_attentions": True,
    "return_dict": False,
    "id2label": {"0": "no", "1": "yes", "2": "maybe"},
    "label2id": {"no": 0, "yes": 1, "maybe": 2},
    "problem_type": "regression",
    "architectures": ["GPT2LMHeadModel"],
}


def described(config):
    """A config as its JSON says it, without provenance."""
    return {key: value for key, value in json.loads(json.dumps(config.to_dict())).items() if key not in PROVENANCE}


def test_every_field_and_default_is_transformers():
    assert described(GPT2Config()) == described(transformers.GPT2Config())


def test_every_field_changed_is_still_transformers():
    fields = described(transformers.GPT2Config()).keys()
    assert fields - UNUSUAL.keys() == {
        "model_type",
        "add_cross_attention",
        "is_encoder_decoder",
        "chunk_size_feed_forward",
    }
    assert described(GPT2Config(**UNUSUAL)) == described(transformers.GPT2Config(**UNUSUAL))


@pytest.mark.parametrize("fields", [{}, UNUSUAL], ids=["defaults", "unusual"])
def test_json_goes_both_ways(fields, tmp_path):
    ours, theirs = GPT2Config(**fields), transformers.GPT2Config(**fields)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert described(transformers.GPT2Config.from_pretrained(tmp_path / "ours")) == described(theirs)
    assert described(GPT2Config.from_pretrained(tmp_path / "theirs")) == described(ours)
    assert GPT2Config.from_pretrained(tmp_path / "ours") == ours
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["config.json"]


def test_aliases_read_write_and_construct():
    config = GPT2Config(hidden_size=64, num_attention_heads=4, num_hidden_layers=2, max_position_embeddings=32)
    assert (config.n_embd, config.n_head, config.n_layer, config.n_positions) == (64, 4, 2, 32)
    config.hidden_size = 128
    assert config.n_embd == config.hidden_size == 128
    assert GPT2Config(torch_dtype="float16").dtype == GPT2Config(dtype=torch.float16).torch_dtype == torch.float16
    with pytest.raises(TypeError, match="both n_embd and its alias hidden_size"):
        GPT2Config(n_embd=64, hidden_size=64)


def test_dropouts_that_only_heads_know_are_kept_as_transformers_keeps_them():
    assert GPT2Config().classifier_dropout is None
    config = GPT2Config(classifier_dropout=0.2, extra={"odd": 1})
    config.hidden_dropout = 0.3
    assert config.extra == {"odd": 1, "classifier_dropout": 0.2, "hidden_dropout": 0.3}
    assert described(config) == described(transformers.GPT2Config(classifier_dropout=0.2, odd=1, hidden_dropout=0.3))
    assert GPT2Config.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="summary_last_dropout is -1; it must be between 0 and 1"):
        GPT2Config(summary_last_dropout=-1)


def test_num_labels_is_the_number_of_labels():
    assert GPT2Config().num_labels == 2
    config = GPT2Config(num_labels=3)
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert config.label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    assert described(config) == described(transformers.GPT2Config(num_labels=3))


def test_a_config_json_of_2019_is_understood_and_its_unknown_keys_are_written_back(tmp_path):
    old = {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 1600,
        "n_head": 25,
        "n_layer": 48,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "torch_dtype": "float16",
    }
    (tmp_path / "config.json").write_text(json.dumps(old))
    config = GPT2Config.from_pretrained(tmp_path)
    assert config.dtype == torch.float16
    written = json.loads(config.to_json_string())
    assert written["n_ctx"] == 1024
    assert written["task_specific_params"] == old["task_specific_params"]
    assert GPT2Config.from_dict({"n_ctx": 512}).n_positions == 512
    assert GPT2Config.from_dict({"n_ctx": 512, "n_positions": 256}).n_positions == 256


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        ("distilgpt2", 81_912_576),
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_presets_have_the_published_number_of_parameters(size, parameters):
    from model import GPT2

    with torch.device("meta"):
        assert GPT2(GPT2Config.preset(size)).num_parameters() == parameters


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_embd": 100, "n_head": 12}, "n_embd 100 is not divisible by n_head 12"),
        ({"n_layer": 0}, "n_layer is 0; it must be a positive integer"),
        ({"vocab_size": 1.5}, "vocab_size is 1.5; it must be a positive integer"),
        ({"n_inner": -1}, "n_inner is -1"),
        ({"attn_pdrop": 1.5}, "attn_pdrop is 1.5; it must be between 0 and 1"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon is 0; it must be greater than 0"),
        ({"dtype": "int8"}, "dtype is torch.int8; it must be a floating-point"),
        ({"dtype": "half-precision"}, "dtype is 'half-precision'"),
        ({"summary_type": "attn"}, "summary_type is 'attn'"),
        ({"problem_type": "guess"}, "problem_type is 'guess'"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder is not supported"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses_what_is_no_gpt2(fields, message):
    with pytest.raises(ValueError, match=message):
        GPT2Config(**fields)


def test_refuses_unknown_names_and_files(tmp_path):
    with pytest.raises(TypeError, match="n_layers"):
        GPT2Config(n_layers=3)
    with pytest.raises(ValueError, match="unknown size 'gpt3'; choose one of distilgpt2"):
        GPT2Config.preset("gpt3")
    with pytest.raises(ValueError, match="model_type is 'llama'"):
        GPT2Config.from_dict({"model_type": "llama"})
    (tmp_path / "config.json").write_text('{"n_embd": 7')
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        GPT2Config.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="must be an object"):
        GPT2Config.from_pretrained(tmp_path)


class TestSpecialTokens:
    """Regression: GPT2Config(vocab_size=1000) kept eos 50256, said nothing, and its texts never ended."""

    @pytest.mark.parametrize(
        "fields",
        [
            {"vocab_size": 1000},
            {"vocab_size": 50257, "bos_token_id": None, "eos_token_id": [3, 50257]},
            {"pad_token_id": 50257},
        ],
        ids=["default", "one of several eos", "pad"],
    )
    def test_outside_the_vocabulary_warn(self, fields):
        with pytest.warns(UserWarning, match=r"outside the vocabulary of \d+ tokens.*your tokenizer's own ids"):
            GPT2Config(**fields)

    def test_those_inside_do_not(self, recwarn):
        GPT2Config()
        GPT2Config(vocab_size=1000, bos_token_id=None, eos_token_id=None)
        GPT2Config(vocab_size=1000, bos_token_id=0, eos_token_id=[1, 999], pad_token_id=2)
        assert not recwarn.list

    def test_the_warning_shows_the_callers_line(self):
        with pytest.warns(UserWarning, match="vocabulary of 1000 tokens") as warned:
            GPT2Config(vocab_size=1000)
        assert warned[0].filename == __file__


def test_a_config_can_be_made_from_its_dict():
    config = GPT2Config(n_head=4, eos_token_id=[1, 2], dtype="bfloat16", extra={"n_special": 3})
    assert GPT2Config(**config.to_dict()) == config
    assert GPT2Config(**transformers.GPT2Config(n_head=4).to_dict()) == GPT2Config.from_dict(
        transformers.GPT2Config(n_head=4).to_dict()
    )
    with pytest.raises(TypeError, match="n_heads"):
        GPT2Config(n_heads=4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_layer", 100_000),
        ("n_layer", True),
        ("n_layer", 2.0),
        ("n_embd", 12 * 10**7),
        ("vocab_size", 10**12),
        ("n_positions", float("inf")),
        ("n_inner", 0),
        ("n_inner", 10**10),
        ("num_labels", 10**9),
        ("num_labels", 0),
        ("num_labels", 2.0),
        ("num_labels", True),
        ("layer_norm_epsilon", float("inf")),
        ("layer_norm_epsilon", float("nan")),
        ("layer_norm_epsilon", True),
        ("initializer_range", "0.02"),
        ("attn_pdrop", float("nan")),
        ("attn_pdrop", True),
        ("eos_token_id", True),
        ("eos_token_id", 1.0),
        ("eos_token_id", -1),
        ("eos_token_id", []),
        ("eos_token_id", [0, True]),
        ("pad_token_id", -1),
        ("pad_token_id", [0]),
        ("bos_token_id", "0"),
        ("use_cache", 1),
        ("tie_word_embeddings", "false"),
        ("tie_word_embeddings", None),
        ("activation_function", ["gelu"]),
        ("summary_type", ["last"]),
        ("id2label", {"x": "y"}),
        ("id2label", [1]),
        ("dtype", "float7"),
        ("dtype", 3),
    ],
    ids=lambda value: str(value)[:12],
)
def test_values_of_no_gpt2_are_refused_before_anything_is_built(field, value, tmp_path):
    start = time.perf_counter()
    with pytest.raises(ValueError, match=rf"GPT2Config: .*{field}"):
        GPT2Config(**{field: value})
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"n_layer": 2, field: value}))
    with pytest.raises(ValueError, match=rf"GPT2Config: .*{field}.*config\.json"):
        GPT2Config.from_json_file(path)
    assert time.perf_counter() - start < 1


def test_the_weights_have_the_layers_before_they_are_built(tmp_path, monkeypatch):
    marked(3).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "n_layer": 4000}))
    monkeypatch.setattr("model.gpt2.Block.__init__", None)  # nothing is built
    with pytest.raises(
        ValueError, match=r"n_layer is 4000, but the weights end with h\.1; .* lacks h\.2 .*safetensors"
    ):
        GPT2.from_pretrained(tmp_path)


@pytest.mark.parametrize("config", [None, {"n_layer": 1}, "gpt2"], ids=str)
def test_a_model_takes_a_config_and_nothing_else(config):
    with pytest.raises(TypeError, match=r"GPT2: config is .*; it must be a GPT2Config"):
        GPT2(config)
