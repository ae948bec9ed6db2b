"""Every argument of the model's public functions, replaced by what it must not be: refused by name, or a result."""

from dataclasses import fields

import pytest
import torch
from wrong_calls import WRONG, mutations, outcome, wrong_calls

import model
from model import GPT2Config, register_attention
from model.attention import attention, registry
from model.cache import KVCache
from model.generation.settings import Settings
from model.training.loop import Settings as TrainingSettings

SIZES = {"vocab_size": 31, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
MASK = torch.ones(2, 4, dtype=torch.long)
TOKENS = {
    "input_ids": IDS,
    "attention_mask": MASK,
    "position_ids": torch.arange(4).repeat(2, 1),
    "token_type_ids": IDS.clone(),
}
CHOICES = {
    "input_ids": IDS[None].clone(),
    "mc_token_ids": torch.tensor([[3, 3]]),
    "labels": IDS[None].clone(),
    "mc_labels": torch.tensor([1]),
}
SPAN = {"start_positions": torch.tensor([0, 1]), "end_positions": torch.tensor([2, 3])}


TRAINING = [f.name for f in fields(TrainingSettings)]


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def config(**options):
    return GPT2Config(**SIZES, bos_token_id=0, eos_token_id=0, pad_token_id=0, **options)


def made(name, **options):
    torch.manual_seed(0)
    return getattr(model, name)(config(**options)).eval()


def register(name, replace=False, package=None, padding=False, dropout=False):
    decorate = register_attention(name, replace=replace, package=package, padding=padding, dropout=dropout)
    return decorate(lambda q, k, v, **options: None)


# name -> (the function, the arguments of a right call)
CALLS = {
    "GPT2": lambda: (made("GPT2").forward, {**TOKENS, "labels": IDS.clone()}),
    "GPT2Model": lambda: (made("GPT2Model").forward, TOKENS),
    "GPT2DoubleHeadsModel": lambda: (made("GPT2DoubleHeadsModel").forward, CHOICES),
    "GPT2ForQuestionAnswering": lambda: (made("GPT2ForQuestionAnswering").forward, {**TOKENS, **SPAN}),
    "GPT2ForSequenceClassification": lambda: (
        made("GPT2ForSequenceClassification", num_labels=3).forward,
        {**TOKENS, "labels": torch.tensor([0, 2])},
    ),
    "GPT2ForTokenClassification": lambda: (
        made("GPT2ForTokenClassification", num_labels=3).forward,
        {**TOKENS, "labels": IDS % 3},
    ),
    "attention": lambda: (
        attention,
        {
            **dict(zip("qkv", torch.randn(3, 2, 2, 4, 16))),
            "kv_start": ints(0, 1),
            "kv_end": ints(4, 3),
            "q_start": ints(0, 1),
        },
    ),
    "GPT2Config": lambda: (GPT2Config, {**SIZES, "bos_token_id": 0, "eos_token_id": 0}),
    "KVCache": lambda: (KVCache, {"config": config(), "batch_size": 2, "capacity": 4}),
    "register_attention": lambda: (
        register,
        {"name": "never called", "replace": True},
    ),
    "resize_token_embeddings": lambda: (made("GPT2").resize_token_embeddings, {"new_num_tokens": 31}),
    "GPT2 over an encoder": lambda: (
        made("GPT2", add_cross_attention=True).forward,
        {
            "input_ids": IDS,
            "encoder_hidden_states": torch.randn(2, 3, SIZES["n_embd"]),
            "encoder_attention_mask": torch.ones(2, 3, dtype=torch.long),
        },
    ),
    "generate": lambda: (made("GPT2").generate, {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": 2}),
    "generate from embeddings": lambda: (
        made("GPT2").generate,
        {
            "inputs_embeds": torch.randn(2, 4, SIZES["n_embd"]),
            "position_ids": torch.arange(4).repeat(2, 1),
            "attention_mask": MASK,
            "max_new_tokens": 2,
        },
    ),
    "generate from a cache": lambda: (continue_a_cache, {"past_key_values": None}),
    "configure_optimizers": lambda: (
        made("GPT2").configure_optimizers,
        {"weight_decay": 0.1, "learning_rate": 1e-3, "betas": (0.9, 0.95), "device_type": "cpu"},
    ),
    "estimate_mfu": lambda: (made("GPT2").estimate_mfu, {"fwdbwd_per_iter": 2, "dt": 0.1, "peak_flops": 1e12}),
    "crop_block_size": lambda: (made("GPT2").crop_block_size, {"block_size": 4}),
    "training": lambda: (TrainingSettings, {name: getattr(TrainingSettings(), name) for name in TRAINING}),
}


def continue_a_cache(past_key_values=None):
    return made("GPT2").generate(IDS, past_key_values=past_key_values, max_new_tokens=1)


@pytest.mark.filterwarnings("ignore")  # of ids outside the vocabulary, and of complex numbers
@pytest.mark.parametrize("name", CALLS)
def test_wrong_calls_are_refused_by_name_or_give_a_result(name, monkeypatch):
    function, arguments = CALLS[name]()
    monkeypatch.setattr(registry, "_BACKENDS", dict(registry._BACKENDS))
    monkeypatch.setattr(registry, "_NOT_INSTALLED", dict(registry._NOT_INSTALLED))
    faults, count = [], 0
    for argument, what, call in wrong_calls(function, arguments):
        kind, result = outcome(function, (name.partition(" ")[0], "GPT2", "attention_mask", "KVCache"), call)
        count += 1
        # The second is torch's own, of its CUDA build where there is no GPU.
        expected = ("the logits of row 0 for new token 1 hold NaN", "Found no NVIDIA driver")
        if kind == WRONG and not any(words in result for words in expected):
            faults.append(f"{argument}, {what}: {result}")
    assert not faults, "\n".join(faults)
    assert count > 20


SETTINGS = [f.name for f in fields(Settings)]
OTHERS = ["generation_config", "streamer", "inputs", "stop_strings", "bos_token_id", "eos_token_id", "pad_token_id"]


@pytest.mark.filterwarnings("ignore")
def test_wrong_settings_of_generate_are_refused_by_name_or_give_a_result():
    gpt2, faults, count = made("GPT2"), [], 0
    for name in SETTINGS + OTHERS:
        for what, other in mutations(None, required=True):
            call = {"input_ids": IDS, "max_new_tokens": 2, name: other}
            if name == "inputs":
                del call["input_ids"]
            kind, result = outcome(lambda call: gpt2.generate(**call), ("generate", "GenerationConfig"), {"call": call})
            count += 1
            named = result is None or any(word in str(result) for word in (name, "input_ids", "n_positions"))
            if kind == WRONG and (name, what) != ("prefix_allowed_tokens_fn", "type") and not _promised(result, named):
                faults.append(f"{name}, {what}: {result}")
    assert not faults, "\n".join(faults)
    assert count > 700


def _promised(result, named):
    return named and result.startswith(("TypeError: generate", "ValueError: generate", "ValueError: attention_mask"))


@pytest.mark.parametrize("prompts", [[[1.0, 2.0]], [[1, 2.5]], torch.tensor([[1.0, 2.0]]), [[True, 2]], [["a"]], ["a"]])
def test_prompts_are_integers(prompts):
    with pytest.raises(TypeError, match="generate: input_ids"):
        made("GPT2").generate(prompts, max_new_tokens=1)


def test_wrong_calls_of_files_are_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    gpt2 = made("GPT2")
    gpt2.save_pretrained("saved")
    calls = (
        (gpt2.save_pretrained, {"directory": "again"}),
        (model.GPT2.from_pretrained, {"pretrained_model_name_or_path": "saved"}),
    )
    faults, count = [], 0
    for function, arguments in calls:
        for argument, what, call in wrong_calls(function, arguments):
            kind, result = outcome(function, ("_pretrained", "GPT2", "_implementation"), call)
            count += 1
            if kind == WRONG and not (
                argument in ("pretrained_model_name_or_path", "config") and "FileNotFoundError" in result
            ):
                faults.append(f"{argument}, {what}: {result}")
    assert not faults, "\n".join(faults)
    assert count > 200


@pytest.mark.parametrize(
    "mask",
    [
        (1.0 - MASK) * -1e9,
        torch.tensor([[0.0, 0.0, -1e9, -1e9]] * 2),
        torch.tensor([[0.0, -float("inf"), 0.0, 0.0]] * 2),
        torch.full((2, 4), torch.finfo(torch.float32).min),
    ],
    ids=["all visible", "right padding", "infinite", "all hidden"],
)
def test_a_mask_that_is_added_to_scores_is_recognised(mask):
    gpt2 = made("GPT2")
    for call in (gpt2, lambda *args, **kw: gpt2.generate(*args, max_new_tokens=1, **kw)):
        with pytest.raises(
            ValueError, match=r"attention_mask: .* as in a mask that is added to scores; it must be 1 for"
        ):
            call(IDS, attention_mask=mask)
    padded = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    expected = gpt2(IDS, attention_mask=padded).logits
    for dtype in (torch.bool, torch.float32, torch.float16, torch.uint8):
        assert torch.equal(gpt2(IDS, attention_mask=padded.to(dtype)).logits, expected)
