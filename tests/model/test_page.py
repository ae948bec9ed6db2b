"""The examples of GPT-2's model page, their import lines changed, on a tiny model in the place of the checkpoint.

And every class that the page lists: here under its name, or an error that names what takes its place.
"""

import importlib
import json

import pytest
import torch

import model
import tokenizer
from model import GPT2, AutoConfig, AutoModelForCausalLM, GPT2Config
from tokenizer import AutoTokenizer, GPT2Tokenizer

# The page's [[autodoc]] lines, as they are.
LISTING = """
GPT2Config
GPT2Tokenizer - save_vocabulary
GPT2TokenizerFast
models.gpt2.modeling_gpt2.GPT2DoubleHeadsModelOutput
models.gpt2.modeling_tf_gpt2.TFGPT2DoubleHeadsModelOutput
GPT2Model - forward
GPT2LMHeadModel - forward
GPT2DoubleHeadsModel - forward
GPT2ForQuestionAnswering - forward
GPT2ForSequenceClassification - forward
GPT2ForTokenClassification - forward
TFGPT2Model - call
TFGPT2LMHeadModel - call
TFGPT2DoubleHeadsModel - call
TFGPT2ForSequenceClassification - call
modeling_tf_outputs.TFSequenceClassifierOutputWithPast
TFGPT2Tokenizer
FlaxGPT2Model - call
FlaxGPT2LMHeadModel - call
"""
LISTED = [line.partition(" - ")[::2] for line in LISTING.strip().splitlines()]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    GPT2(GPT2Config(n_embd=16, n_layer=1, n_head=2)).save_pretrained(path)
    return path


@pytest.mark.parametrize(("path", "method"), LISTED, ids=lambda value: value)
def test_each_class_of_the_page_has_an_answer(path, method):
    name = path.rpartition(".")[2]
    package = importlib.import_module("tokenizer" if "Tokenizer" in name else "model")
    if not name.startswith(("TF", "Flax")):
        assert callable(getattr(getattr(package, name), method or "__init__"))
        return
    with pytest.raises(ImportError, match=f"{name} needs (TensorFlow|Flax), .* takes its place") as refusal:
        exec(f"from {package.__name__} import {name}")
    ours = str(refusal.value).partition(f"{package.__name__}.")[2].partition(" ")[0]
    assert callable(getattr(package, ours))


def test_names_are_found_where_people_look():
    assert tokenizer.GPT2TokenizerFast is GPT2Tokenizer
    output = model.GPT2DoubleHeadsModel(GPT2Config(n_embd=8, n_layer=1, n_head=1))(torch.arange(6).view(1, 2, 3))
    assert isinstance(output, model.GPT2DoubleHeadsModelOutput)
    with pytest.raises(ImportError, match="from tokenizer import AutoTokenizer"):
        from model import AutoTokenizer  # noqa: F401
    with pytest.raises(AttributeError, match="module 'model' has no attribute 'GPT3'"):
        _ = model.GPT3
    with pytest.raises(AttributeError, match="module 'tokenizer' has no attribute 'GPT3'"):
        _ = tokenizer.GPT3


@pytest.mark.parametrize("name", [name for name in model.__all__ if name.startswith("AutoModel")])
def test_auto_classes_choose_the_class(name, checkpoint):
    auto = getattr(model, name)
    made = auto.from_pretrained(checkpoint)
    assert type(made) is auto.model_class is type(auto.from_config(AutoConfig.from_pretrained(checkpoint)))
    with pytest.raises(TypeError, match=rf"{name}: it has no instances; call {name}\.from_pretrained"):
        auto()


def test_another_models_config_is_refused(checkpoint, tmp_path):
    GPT2.from_pretrained(checkpoint).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "model_type": "opt"}))
    with pytest.raises(ValueError, match=r"model_type is 'opt'; it must be 'gpt2'.*config\.json"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    GPT2Tokenizer.from_pretrained("gpt2").save_vocabulary(tmp_path)
    with pytest.raises(ValueError, match=r"AutoTokenizer.*config\.json has model_type 'opt'; it must be 'gpt2'"):
        AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2TokenizerFast"}')
    assert AutoTokenizer.from_pretrained(tmp_path).encode("a b") == GPT2Tokenizer.from_pretrained("gpt2").encode("a b")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "OPTTokenizer"}')
    with pytest.raises(
        ValueError, match=r"tokenizer_config\.json has tokenizer_class 'OPTTokenizer'; it must be GPT-2"
    ):
        AutoTokenizer.from_pretrained(tmp_path)


def test_usage(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained("gpt2")

    prompt = "GPT2 is a model developed by OpenAI."
    input_ids = tokenizer(prompt, return_tensors="pt").input_ids
    gen_tokens = model.generate(input_ids, do_sample=True, temperature=0.9, max_length=100)
    gen_text = tokenizer.batch_decode(gen_tokens)[0]

    assert gen_text.startswith(prompt)
    assert gen_tokens.shape[1] == 100 or gen_tokens[0, -1] == 50256


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_half_precision_under_a_named_attention(checkpoint, attn_implementation):
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, torch_dtype=torch.float16, attn_implementation=attn_implementation
    )
    tokenizer = AutoTokenizer.from_pretrained("gpt2")

    prompt = "def hello_world():"
    model_inputs = tokenizer([prompt], return_tensors="pt").to("cpu")
    generated_ids = model.generate(**model_inputs, max_new_tokens=100, do_sample=True)
    text = tokenizer.batch_decode(generated_ids)[0]

    assert model.dtype == torch.float16
    assert text.startswith(prompt)


def test_padding_on_the_right_as_the_page_advises(checkpoint):
    model = GPT2.from_pretrained(checkpoint)
    tokenizer = GPT2Tokenizer.from_pretrained("gpt2", padding_side="right")
    tokenizer.pad_token = tokenizer.eos_token
    prompts = ["GPT2 is a model", "Hi", "def hello_world():"]
    together = model.generate(**tokenizer(prompts, padding=True, return_tensors="pt"), max_new_tokens=12)
    for prompt, row in zip(prompts, together):
        alone = model.generate(**tokenizer([prompt], return_tensors="pt"), max_new_tokens=12)[0]
        assert torch.equal(row[len(row) - len(alone) :], alone)
