"""Hooks and replaced modules do to this model what they do to transformers' GPT-2, place by place.

Where nothing observes it a block's addition and the next block's norm are one kernel, so each place is tried.
"""

from contextlib import ExitStack

import pytest
import torch
from lanes import across_lanes
from peers import pair, tiny_config
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from model.layers import norm as norm_module

LOGITS = 2e-4
IDS = torch.tensor([[5, 17, 80, 3, 41, 2, 9], [9, 2, 33, 9, 2, 44, 60]])
EMBEDDINGS = ["wte", "wpe"]
BLOCKS = ["h.0", "h.1", "h.2"]
WITHIN = [
    *("h.0.ln_1", "h.1.ln_1", "h.1.ln_2", "h.1.attn", "h.1.attn.c_attn", "h.1.attn.c_proj", "h.1.attn.resid_dropout"),
    *("h.1.mlp", "h.1.mlp.c_fc", "h.1.mlp.act", "h.1.mlp.c_proj", "h.1.mlp.dropout"),
]
INNER = ["drop", *BLOCKS, *WITHIN, "ln_f"]  # what takes and gives [B, T, ...]
PLACES = [*EMBEDDINGS, *INNER]


def models(**options):
    return pair(tiny_config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), **options)


def at(model, place):
    return model.get_submodule(f"transformer.{place}")


def first(output):
    """The tensor of what a module returns: attention gives its weights, too."""
    return output[0] if isinstance(output, tuple) else output


def edited(output):
    """Something else in the place of an output, not a multiple, which a norm would undo."""
    tensor = first(output)
    change = torch.linspace(-1, 1, tensor.shape[-1], device=tensor.device).to(tensor.dtype)
    return (tensor + change, *output[1:]) if isinstance(output, tuple) else tensor + change


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def assert_equal_effect(models, change, ids=IDS):
    """change(model) alters both models, and their logits alike."""
    before = logits(models[0], ids)
    for model in models:
        change(model)
    ours, theirs = (logits(model, ids) for model in models)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=LOGITS)
    assert (ours - before).abs().max() > 10 * LOGITS  # it mattered


@pytest.mark.parametrize("place", PLACES)
def test_a_forward_hook_sees_what_it_sees_in_transformers(place):
    pair, seen = models(attn="sdpa"), []
    before = logits(pair[0])
    for model in pair:
        at(model, place).register_forward_hook(lambda module, args, output: seen.append(first(output)))
    after, theirs = map(logits, pair)
    torch.testing.assert_close(*seen, rtol=0, atol=LOGITS)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    torch.testing.assert_close(after, theirs, rtol=0, atol=LOGITS)


@pytest.mark.parametrize("place", PLACES)
def test_a_forward_hook_edits_the_output(place):
    def change(model):
        at(model, place).register_forward_hook(lambda module, args, output: edited(output))

    assert_equal_effect(models(attn="sdpa"), change)


@pytest.mark.parametrize("place", INNER)
def test_a_forward_pre_hook_edits_the_input(place):
    def change(model):
        at(model, place).register_forward_pre_hook(lambda module, args: (edited(args[0]), *args[1:]))

    assert_equal_effect(models(attn="sdpa"), change)


@pytest.mark.parametrize("place", BLOCKS)
def test_a_hook_edits_a_blocks_output_in_place(place):
    """As activation patching does: output[:, -1] = ..."""

    def patch(module, args, output):
        output[:, -1] = torch.linspace(-1, 1, output.shape[-1])

    def change(model):
        at(model, place).register_forward_hook(patch)

    assert_equal_effect(models(attn="sdpa"), change)


@pytest.mark.parametrize("place", PLACES)
def test_a_full_backward_hook_sees_the_gradients_of_transformers(place):
    pair, seen = models(attn="sdpa"), []
    for model in pair:
        at(model, place).register_full_backward_hook(lambda module, given, of: seen.append((first(given), first(of))))
        model(IDS, labels=IDS).loss.backward()
    for ours, theirs in zip(*seen, strict=True):
        if ours is not theirs:  # both are None where the input holds ids
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
    ours, theirs = (dict(model.named_parameters()) for model in pair)
    for name, parameter in theirs.items():
        torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-3, atol=1e-5)


class AnotherNorm(nn.Module):
    def forward(self, x):
        return x / x.abs().mean(-1, keepdim=True)


class AnotherMLP(nn.Module):
    def forward(self, x):
        return torch.sin(3 * x)


class AnotherAttention(nn.Module):
    def forward(self, x, **context):
        return x.cumsum(1) / 3, None


class AnotherBlock(nn.Module):
    def forward(self, x, *arguments, **context):
        return x + torch.sin(3 * x)


class AnotherEmbedding(nn.Module):
    def forward(self, ids):
        return torch.sin(ids[..., None] * torch.linspace(0.1, 3, 48))


REPLACEMENTS = {
    **dict.fromkeys(["h.0.ln_1", "h.1.ln_1", "h.1.ln_2", "ln_f"], AnotherNorm),
    "h.1.mlp": AnotherMLP,
    "h.1.mlp.act": nn.Sigmoid,
    "h.1.mlp.dropout": AnotherMLP,
    "h.1.attn": AnotherAttention,
    "h.1.attn.resid_dropout": AnotherMLP,
    **dict.fromkeys(BLOCKS, AnotherBlock),
    "wte": AnotherEmbedding,
    "wpe": AnotherEmbedding,
    "drop": AnotherNorm,
}


@pytest.mark.parametrize("place", REPLACEMENTS)
def test_a_module_is_replaced_by_another(place):
    assert_equal_effect(
        models(attn="sdpa"), lambda model: model.set_submodule(f"transformer.{place}", REPLACEMENTS[place]())
    )


@pytest.mark.parametrize("place", [*BLOCKS, *WITHIN, "ln_f", "wpe"])
def test_a_modules_forward_is_replaced(place):
    def change(model):
        module = at(model, place)
        original = module.forward
        module.forward = lambda *arguments, **context: edited(original(*arguments, **context))

    assert_equal_effect(models(attn="sdpa"), change)


def test_blocks_are_removed_and_exchanged():
    def change(model):
        model.transformer.h = nn.ModuleList([model.transformer.h[2], model.transformer.h[0]])

    assert_equal_effect(models(attn="sdpa"), change)


@pytest.mark.parametrize("place", ["h.1", "h.1.ln_1", "h.2.mlp"])
@across_lanes(torch.float32, lanes=("sm_90", "gpu"))
def test_a_hook_edits_the_output_with_our_kernels(lane, dtype, place):
    pair = [model.to(lane.device) for model in models(attn="triton")]
    pair[0].set_kernel_implementation("triton")

    def change(model):
        at(model, place).register_forward_hook(lambda module, args, output: edited(output))

    assert_equal_effect(pair, change, IDS[:1].to(lane.device))


@pytest.mark.parametrize("place", ["h.1", "h.1.ln_1", "h.1.attn", "h.1.mlp", "wpe"])
def test_generate_goes_through_the_hooks(place):
    pair = models(attn="sdpa", theirs="sdpa", std=0.2)
    free = pair[0].generate(IDS, max_new_tokens=12)
    for model in pair:
        at(model, place).register_forward_hook(lambda module, args, output: edited(output))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    out = pair[0].generate(IDS, **options)
    assert torch.equal(out, pair[1].generate(IDS, attention_mask=torch.ones_like(IDS), **options))
    assert out.shape != free.shape or not torch.equal(out, free)


def test_generate_goes_through_the_model_itself_where_it_is_observed():
    pair = models(attn="sdpa", theirs="sdpa", std=0.2)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    free = pair[0].generate(IDS, **options)

    def prefer_even(module, args, output):
        output.logits[..., ::2] += 3.0
        return output

    for model in pair:
        model.register_forward_hook(prefer_even)
    out = pair[0].generate(IDS, **options)
    assert torch.equal(out, pair[1].generate(IDS, attention_mask=torch.ones_like(IDS), **options))
    assert out.shape != free.shape or not torch.equal(out, free)


def test_the_weights_of_observed_layers_are_returned():
    ours, theirs = models(attn="eager")
    at(ours, "h.1").register_forward_hook(lambda module, args, output: None)
    weights = ours(IDS, output_attentions=True).attentions
    for x, y in zip(weights, theirs(IDS, output_attentions=True).attentions, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-6)


@pytest.mark.parametrize("place", ["h.1", "h.1.attn", "h.1.mlp", "h.2.ln_1"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_with_the_hooks(place, reentrant):
    ours, _ = models(attn="sdpa")
    at(ours, place).register_forward_hook(lambda module, args, output: edited(output))
    ours.train()
    grads = []
    for options in (None, {"use_reentrant": reentrant}):
        if options is not None:
            ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        ours.zero_grad()
        ours(IDS, labels=IDS).loss.backward()
        grads.append([parameter.grad.clone() for parameter in ours.parameters()])
    for plain, recomputed in zip(*grads):
        torch.testing.assert_close(recomputed, plain)


@pytest.mark.parametrize("place", ["h.1.attn", "h.1.mlp"])
def test_in_training_a_hook_sees_what_dropout_has_left(place):
    """In the fused path dropout is in the addition, after the module."""
    ours, _ = pair(tiny_config(resid_pdrop=0.5))
    seen = []
    at(ours.train(), place).register_forward_hook(lambda module, args, output: seen.append(first(output)))
    ours(IDS)
    assert 0.3 < (seen[0] == 0).float().mean() < 0.7


def test_dropout_is_turned_off_as_in_any_model():
    """By setting p of each nn.Dropout, as experiments do."""
    ours, _ = pair(tiny_config(resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5), attn="sdpa")
    expected = ours(IDS).logits
    for module in ours.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    torch.testing.assert_close(ours(IDS).logits, expected)


def test_the_loss_without_logits_goes_through_the_heads_hooks():
    ours, _ = models(attn="sdpa")
    ours.lm_head.register_forward_hook(lambda module, args, output: edited(output))
    expected = ours(IDS, labels=IDS).loss
    torch.testing.assert_close(ours(IDS, labels=IDS, return_logits=False).loss, expected)


def test_a_hook_on_all_modules_is_called_by_each():
    ours, _ = models(attn="sdpa")
    called = []
    with ExitStack() as stack:
        handle = register_module_forward_hook(lambda module, args, output: called.append(module))
        stack.callback(handle.remove)
        logits(ours)
    missing = {name for name, module in ours.named_modules() if not any(module is one for one in called)}
    assert missing == {"transformer.h", *(f"transformer.h.{i}.attn.attn_dropout" for i in range(3))}


@pytest.mark.parametrize(
    ("place", "fused"),
    [(None, 6), ("h.0", 5), ("h.1", 4), ("h.2", 4), ("h.1.ln_1", 5), ("h.1.ln_2", 5), ("ln_f", 5), ("h.1.mlp", 6)],
)
def test_additions_are_fused_with_norms_where_nothing_observes_it(place, fused, monkeypatch):
    """Three blocks have six additions, each before a norm. Hooks on a block part it from its neighbours."""
    ours, _ = models(attn="sdpa")
    calls, add_layer_norm = [], norm_module.add_layer_norm

    def counted(*arguments):
        calls.append(arguments)
        return add_layer_norm(*arguments)

    monkeypatch.setattr(norm_module, "add_layer_norm", counted)
    if place is not None:
        at(ours, place).register_forward_hook(lambda module, args, output: None)
    logits(ours)
    assert len(calls) == fused
