"""The examples of GPT-2's model page, their import lines changed, on a tiny model in the place of the checkpoint."""

import pytest
import torch

import model as ours
import tokenizer as tokenizers
from model import GPT2, AutoModelForCausalLM, GPT2Config, GPT2DoubleHeadsModel, GPT2DoubleHeadsModelOutput
from tokenizer import AutoTokenizer, GPT2Tokenizer

# The page's listing, in its order.
CLASSES = [
    "GPT2Config",
    "GPT2Tokenizer",
    "GPT2TokenizerFast",
    "GPT2DoubleHeadsModelOutput",
    "TFGPT2DoubleHeadsModelOutput",
    "GPT2Model",
    "GPT2LMHeadModel",
    "GPT2DoubleHeadsModel",
    "GPT2ForQuestionAnswering",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "TFGPT2Model",
    "TFGPT2LMHeadModel",
    "TFGPT2DoubleHeadsModel",
    "TFGPT2ForSequenceClassification",
    "TFSequenceClassifierOutputWithPast",
    "TFGPT2Tokenizer",
    "FlaxGPT2Model",
    "FlaxGPT2LMHeadModel",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    GPT2(GPT2Config(n_embd=16, n_layer=1, n_head=2)).save_pretrained(path)
    return path


def test_usage(checkpoint):
    model = GPT2.from_pretrained(checkpoint)
    tokenizer = GPT2Tokenizer.from_pretrained("gpt2")

    prompt = "GPT2 is a model developed by OpenAI."
    input_ids = tokenizer(prompt, return_tensors="pt").input_ids
    gen_tokens = model.generate(input_ids, do_sample=True, temperature=0.9, max_length=100)
    gen_text = tokenizer.batch_decode(gen_tokens)[0]

    assert gen_text.startswith(prompt)
    assert gen_tokens.shape[1] == 100 or gen_tokens[0, -1] == 50256


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_half_precision_under_a_named_attention(checkpoint, attn_implementation):
    model = GPT2.from_pretrained(checkpoint, torch_dtype=torch.float16, attn_implementation=attn_implementation)
    tokenizer = GPT2Tokenizer.from_pretrained("gpt2")

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


def test_the_page_runs_with_its_import_line_changed(checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)
    model = AutoModelForCausalLM.from_pretrained(checkpoint.name)
    tokenizer = AutoTokenizer.from_pretrained("gpt2")
    prompt = "GPT2 is a model developed by OpenAI."
    input_ids = tokenizer(prompt, return_tensors="pt").input_ids
    gen_tokens = model.generate(
        input_ids,
        do_sample=True,
        temperature=0.9,
        max_length=100,
    )
    assert tokenizer.batch_decode(gen_tokens)[0].startswith(prompt)
    assert type(model) is GPT2


@pytest.mark.parametrize("name", CLASSES)
def test_each_class_of_the_page_has_an_answer(name):
    if name.startswith(("TF", "Flax")):
        with pytest.raises(ImportError, match=rf"{name} is a class of (TensorFlow|Flax); use \w+"):
            getattr(ours, name)
        with pytest.raises(ImportError, match=f"{name} is a class of"):
            exec(f"from model import {name}")
    else:
        assert hasattr(ours if "Tokenizer" not in name else tokenizers, name)


def test_outputs_are_what_models_return():
    model = GPT2DoubleHeadsModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50257))
    assert isinstance(model(torch.zeros(1, 2, 4).long()), GPT2DoubleHeadsModelOutput)


def test_auto_classes_load_the_head_of_their_name(checkpoint):
    for name, cls in (
        ("AutoModel", "GPT2Model"),
        ("AutoModelForSequenceClassification", "GPT2ForSequenceClassification"),
        ("AutoModelForTokenClassification", "GPT2ForTokenClassification"),
        ("AutoModelForQuestionAnswering", "GPT2ForQuestionAnswering"),
    ):
        assert type(getattr(ours, name).from_pretrained(checkpoint)) is getattr(ours, cls)
        assert type(getattr(ours, name).from_config(GPT2Config(n_embd=16, n_layer=1, n_head=2))) is getattr(ours, cls)
        with pytest.raises(TypeError, match=f"{name} makes no objects"):
            getattr(ours, name)()


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    GPT2(GPT2Config(n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"model_type": "gpt2"', '"model_type": "llama"'))
    with pytest.raises(ValueError, match="model_type is 'llama'; it must be 'gpt2'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_flash_attention_2_without_its_package_names_what_serves():
    with pytest.raises(ValueError, match="needs the package flash_attn, which is not installed; 'triton', our own"):
        AutoModelForCausalLM.from_config(
            GPT2Config(n_embd=16, n_layer=1, n_head=2), attn_implementation="flash_attention_2"
        )
