"""torch's default dtype and device and its inference mode change nothing but what they are meant to change.

Each action must give, under each setting, the bits that it gives without. A tensor made without a dtype or a device of
its own shows here: the default device is "meta" in two of the settings, which holds no values.
"""

import copy
from contextlib import contextmanager, nullcontext

import pytest
import torch
from lanes import across_lanes
from peers import padded_batch, spread, tiny_config

from kernels import cross_entropy, flash_attention, gelu, layer_norm, linear_cross_entropy
from model import (
    GPT2,
    GPT2DoubleHeadsModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
)
from model.generation.graph import DecodeStep

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13]]


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


DTYPES = {
    "fp16": lambda: default_dtype(torch.float16),
    "bf16": lambda: default_dtype(torch.bfloat16),
    "fp64": lambda: default_dtype(torch.float64),
}
META = {"default device": lambda: default_device("meta"), "with device": lambda: torch.device("meta")}
SETTINGS = {**DTYPES, **META, "inference mode": torch.inference_mode}


def under(settings):
    return pytest.mark.parametrize("setting", settings.values(), ids=settings.keys())


def tensors(value):
    """All tensors in an output, a list or a model."""
    if isinstance(value, torch.nn.Module):
        value = list(value.state_dict().values())
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.to_tuple() if hasattr(value, "to_tuple") else value
    return [t for item in items if not hasattr(item, "attend") and item is not None for t in tensors(item)]


def assert_unchanged(action, setting):
    with torch.no_grad() if setting is torch.inference_mode else nullcontext():
        expected = tensors(action())
    with setting():
        found = tensors(action())
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected):
        assert (a.device, a.dtype) == (b.device, b.dtype)
        assert torch.equal(a, b)


@pytest.fixture(scope="module")
def model():
    return spread(GPT2(tiny_config(pad_token_id=1))).eval()


@pytest.fixture(scope="module")
def batch():
    torch.manual_seed(0)
    return padded_batch(101, [7, 4], 7, side="left")


GENERATIONS = {
    "greedy": {},
    "without a cache": {"use_cache": False},
    "sampling": {"do_sample": True, "seed": 1, "top_p": 0.9, "typical_p": 0.9, "min_p": 0.01},
    "several of each": {"do_sample": True, "seed": 1, "num_return_sequences": 2},
    "torch's seed": {"do_sample": True},
    "beams": {"num_beams": 3},
    "beam sampling": {"num_beams": 3, "do_sample": True, "seed": 1},
    "drafts": {"prompt_lookup_num_tokens": 3},
    "a window": {"max_new_tokens": 70, "sliding_window": True, "eos_token_id": []},
    "processors": {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[5], [6, 7]],
        "suppress_tokens": [9],
        "sequence_bias": {(5,): 2.0},
        "min_new_tokens": 3,
        "renormalize_logits": True,
        "prefix_allowed_tokens_fn": lambda row, ids: list(range(50)),
    },
    "scores": {"output_scores": True, "output_logits": True, "return_dict_in_generate": True},
}


@under(SETTINGS)
@pytest.mark.parametrize("options", GENERATIONS.values(), ids=GENERATIONS.keys())
def test_generate(model, options, setting):
    def action():
        torch.manual_seed(3)
        output = copy.deepcopy(model).generate(PROMPTS, **{"max_new_tokens": 5, **options})  # packs its weights anew
        return [output] if isinstance(output, torch.Tensor) else [output.sequences, output.scores, output.logits]

    assert_unchanged(action, setting)


@under(SETTINGS)
def test_forward_copies_and_resizing(model, batch, setting):
    ids, mask = batch

    def action():
        past = model(ids[:, :4], attention_mask=mask[:, :4], use_cache=True).past_key_values
        resized = [copy.deepcopy(model) for _ in range(2)]
        torch.manual_seed(3)
        for one, mean in zip(resized, (True, False)):
            one.resize_token_embeddings(110, mean_resizing=mean)
        return [
            model(ids, attention_mask=mask, labels=ids, output_hidden_states=True),
            model(ids, attention_mask=mask.flip(1), output_attentions=True),
            model(ids, labels=ids, return_logits=False),
            model(ids[:, 4:], attention_mask=mask, past_key_values=past),
            copy.deepcopy(model),
            *resized,
        ]

    assert_unchanged(action, setting)


@under({**DTYPES, **META})
def test_backward(model, batch, setting):
    ids, mask = batch

    def action():
        one = copy.deepcopy(model).train()
        one.gradient_checkpointing_enable()
        torch.manual_seed(3)
        (one(ids, attention_mask=mask, labels=ids).loss + one(ids, labels=ids, return_logits=False).loss).backward()
        return [parameter.grad for parameter in one.parameters()]

    assert_unchanged(action, setting)


@under(SETTINGS)
def test_other_heads(batch, setting):
    ids, mask = batch
    double, texts, words, answers = (
        spread(cls(tiny_config(pad_token_id=1))).eval()
        for cls in (
            GPT2DoubleHeadsModel,
            GPT2ForSequenceClassification,
            GPT2ForTokenClassification,
            GPT2ForQuestionAnswering,
        )
    )
    one = torch.tensor([1, 0])
    choices = ids[None].repeat(2, 1, 1)

    def action():
        return [
            double(choices, mc_token_ids=torch.full_like(choices[..., 0], 2), labels=choices, mc_labels=one),
            texts(ids, attention_mask=mask),
            words(ids, labels=ids % 2),
            answers(ids, start_positions=one, end_positions=one + 1),
        ]

    assert_unchanged(action, setting)


@under({**DTYPES, "inference mode": torch.inference_mode})
def test_loading(model, tmp_path, setting):
    model.save_pretrained(tmp_path)
    assert_unchanged(lambda: GPT2.from_pretrained(tmp_path), setting)


@under(META)
def test_loading_onto_meta_is_refused(model, tmp_path, setting):
    """As in transformers: a model without values is made from a config."""
    model.save_pretrained(tmp_path)
    with setting(), pytest.raises(ValueError, match=r"GPT2.from_pretrained: .*meta, which holds no weights"):
        GPT2.from_pretrained(tmp_path)


def test_loading_obeys_another_default_device(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    moved = []
    monkeypatch.setattr(torch, "get_default_device", lambda: torch.device("cuda:1"))
    monkeypatch.setattr(GPT2, "to", lambda self, device: moved.append(device))
    GPT2.from_pretrained(tmp_path)
    assert moved == [torch.device("cuda:1")]


def test_a_model_on_meta_has_shapes_and_says_no_token(batch):
    with torch.device("meta"):
        model = GPT2(tiny_config()).eval()
    ids, mask = (tensor.to("meta") for tensor in batch)
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            output = model(ids, attention_mask=mask, labels=ids)
        assert (output.logits.device.type, output.logits.shape) == ("meta", (2, 7, 101))
    with pytest.raises(ValueError, match="generate: the weights are on device meta"):
        model.generate(ids)


def test_what_inference_mode_made_serves_outside(model, batch, tmp_path):
    """Weights loaded and resized there could not be trained, a cache that grew there could not be continued."""
    ids, mask = batch
    model.save_pretrained(tmp_path)
    past = model(ids, attention_mask=mask, use_cache=True).past_key_values
    expected = copy.deepcopy(past)
    with torch.inference_mode():
        loaded = GPT2.from_pretrained(tmp_path)
        loaded.resize_token_embeddings(110)
        made = model(ids, attention_mask=mask).past_key_values
        model(ids[:, :1], past_key_values=past)
        packed = model.generate(PROMPTS, max_new_tokens=3)
    loaded.train()(ids, labels=ids).loss.backward()
    assert torch.equal(model.generate(PROMPTS, max_new_tokens=3), packed)
    model(ids[:, :1], past_key_values=expected)
    for cache in (past, made):
        cache.crop(7)
    expected.crop(7)
    for cache in (past, made):
        output = model(ids[:, :3], past_key_values=cache)
        assert torch.equal(output.logits, model(ids[:, :3], past_key_values=copy.deepcopy(expected)).logits)


@under(DTYPES)
def test_a_captured_step_keeps_logits_in_fp32(model, setting):
    with setting():
        assert DecodeStep(model, 2, 16).logits.dtype == torch.float32


@across_lanes(torch.float32, lanes=("interpret", "gpu"))
@under({"fp16": DTYPES["fp16"], "with device": META["with device"]})
def test_kernels(lane, dtype, setting):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 17, 16, device=lane.device, dtype=dtype, requires_grad=True).unbind()
    x, w = (torch.randn(16, 16, device=lane.device, dtype=dtype, requires_grad=True) for _ in range(2))
    target = torch.arange(16, device=lane.device)
    start = torch.tensor([3], dtype=torch.int32, device=lane.device)
    class_weight = torch.rand(16, device=lane.device) + 0.5

    def action():
        torch.manual_seed(3)
        o = flash_attention(q, k, v, causal=True, kv_start=start, dropout_p=0.25)
        decoded = flash_attention(q[:, :, -1:], k, v, q_start=start + 13)
        y = gelu(layer_norm(x, w[0], w[1]))
        losses = [
            cross_entropy(y, target, class_weight=class_weight),
            linear_cross_entropy(y, w, target, implementation="triton", class_weight=class_weight),
            linear_cross_entropy(y, w, target, implementation="torch", class_weight=class_weight),
            linear_cross_entropy(y, w, target, implementation="torch", reduction="sum"),
        ]
        total = sum(losses) + o.sum() + decoded.sum()
        gradients = torch.autograd.grad(total, [q, k, v, x, w])
        return [o, decoded, y, *losses, *gradients]

    assert_unchanged(action, setting)
