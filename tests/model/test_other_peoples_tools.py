"""What transformers' pipeline, PEFT and other people's decoding loops ask of a model."""

import importlib.metadata
import math

import pytest
import torch
from optional import transformers
from packaging.version import Version
from peers import pair, spread, tiny_config
from torch import nn

from model import GPT2, GPT2Config, GPT2Model
from model.layers.linear import Conv1D
from tokenizer import GPT2Tokenizer

IDS = torch.arange(10).view(2, 5)


class LoRA(nn.Module):
    """As PEFT puts one in a layer's place: its forward, and x A B beside it."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(base.in_features, rank) / math.sqrt(rank))
        self.B = nn.Parameter(torch.zeros(rank, base.out_features))

    def forward(self, x):
        return self.base_layer(x) + x @ self.A @ self.B


def adapted(model):
    """Freezes the model and puts a LoRA in the place of every linear layer of its blocks."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if type(module) is Conv1D:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, LoRA(module))
    return model


def test_lora_trains_alone_merges_and_generates():
    model = spread(GPT2(tiny_config(n_layer=1), attn_implementation="eager")).eval()
    plain = model(IDS).logits.detach()
    model = adapted(model)
    torch.testing.assert_close(model(IDS).logits, plain)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 8
    optimizer, losses = torch.optim.AdamW(trained, lr=0.02), []
    for _ in range(5):
        losses.append(model(IDS, labels=IDS).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    expected = model(IDS).logits
    assert model.generate(IDS, max_new_tokens=2).shape == (2, 7)
    for name, module in list(model.named_modules()):
        if type(module) is LoRA:
            parent, _, last = name.rpartition(".")
            with torch.no_grad():
                module.base_layer.weight += module.A @ module.B
            setattr(model.get_submodule(parent), last, module.base_layer)
    torch.testing.assert_close(model(IDS).logits, expected)


def test_a_decoding_loop_of_somebody_elses():
    ours, theirs = pair()
    ids, cache, other = IDS, None, None
    with torch.no_grad():
        for _ in range(4):
            inputs = ours.prepare_inputs_for_generation(ids, past_key_values=cache, use_cache=True, cache_position=None)
            assert inputs["input_ids"].shape[1] == (5 if cache is None else 1)
            output = ours(**inputs)
            cache = output.past_key_values
            peer = theirs(ids if other is None else ids[:, -1:], past_key_values=other, use_cache=True)
            other = peer.past_key_values
            torch.testing.assert_close(output.logits, peer.logits)
            ids = torch.cat([ids, output.logits[:, -1:].argmax(-1)], 1)
    embeds = ours.transformer.wte(IDS)
    assert ours.prepare_inputs_for_generation(IDS, inputs_embeds=embeds).keys() == {
        "inputs_embeds",
        "attention_mask",
        "past_key_values",
    }
    assert "input_ids" in ours.prepare_inputs_for_generation(ids, inputs_embeds=embeds, past_key_values=cache)


def test_what_others_ask():
    ours = GPT2(tiny_config(n_layer=1))
    assert ours.can_generate()
    assert not GPT2Model(tiny_config(n_layer=1)).can_generate()
    assert not hasattr(ours, "hf_device_map")
    with pytest.raises(
        AttributeError, match=r"GPT2 has no hf_device_map: its weights lie on one device, model\.device"
    ):
        _ = ours.hf_device_map
    with pytest.raises(AttributeError, match="'GPT2' object has no attribute 'absent'"):
        _ = ours.absent
    linear = Conv1D(3, 5)
    assert (linear.in_features, linear.out_features) == (3, 5)
    assert ours.generation_config.to_diff_dict() == {"bos_token_id": 0, "eos_token_id": 0}


def test_transformers_pipeline_runs_on_our_model_and_tokenizer():
    pipeline = transformers.pipeline
    if Version(importlib.metadata.version("transformers")) < Version("5.18"):
        pytest.skip("its pipeline() asks for config._commit_hash, and for spaces cleaned up, which ours refuse")
    model = spread(GPT2(GPT2Config(n_embd=16, n_layer=1, n_head=2))).eval()
    tokenizer = GPT2Tokenizer.from_pretrained("gpt2")
    tokenizer.pad_token = tokenizer.eos_token
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=2)
    texts = ["Hello", "Hi there, you"]
    found = pipe(texts, max_new_tokens=3, do_sample=False)
    for text, [answer] in zip(texts, found):
        ids = model.generate(tokenizer(text, return_tensors="pt").input_ids, max_new_tokens=3)
        assert answer["generated_text"] == tokenizer.decode(ids[0])
