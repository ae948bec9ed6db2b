"""The examples of GPT-2's model page, their import lines changed, on a tiny model in the place of the checkpoint."""

import pytest
import torch

from model import GPT2, GPT2Config
from tokenizer import GPT2Tokenizer


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
