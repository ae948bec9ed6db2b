"""The kernels inside transformers: attn_implementation="triton_flash", and patch_gpt2. Oracle: their eager, float64."""

import copy

import pytest
import torch
from lanes import across_lanes
from numerics import assert_close, assert_gradient_close
from optional import transformers
from peers import padded_batch, spread, their_config, tiny_config

from model.integrations.transformers import attention_bounds, patch_gpt2, register

interpreted = across_lanes(torch.float32, lanes=("interpret",))
everywhere = across_lanes(torch.float32, lanes=("interpret", "sm_90", "gpu"))


def gpt2(lane, **fields):
    config = their_config(tiny_config(n_layer=2, **fields), attn_implementation="eager")
    return spread(transformers.GPT2LMHeadModel(config)).eval().to(lane.device)


def llama(lane, cls="Llama", **fields):
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "eos_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": "eager"}
    config = getattr(transformers, f"{cls}Config")(**sizes, **heads, bos_token_id=1, pad_token_id=0, **fields)
    return spread(getattr(transformers, f"{cls}ForCausalLM")(config)).eval().to(lane.device)


def ours(model, **options):
    """The same model with our attention."""
    name = register(**options)
    other = copy.deepcopy(model)
    other.set_attn_implementation(name)
    assert other.config._attn_implementation == "triton_flash"
    return other


def compare(model, other, ids, keep=None, **inputs):
    """The tolerance rule for logits and, without `keep`, which selects them, for loss and gradients of `other`."""
    results = []
    for peer in (other, model, copy.deepcopy(model).double()):
        if "encoder_hidden_states" in inputs:
            inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"].to(peer.dtype)
        output = peer(ids, labels=ids, **inputs)
        results.append((output, torch.autograd.grad(output.loss, list(peer.parameters()))))
    (mine, my_grads), (theirs, their_grads), (oracle, oracle_grads) = results
    keep = torch.ones_like(ids, dtype=torch.bool) if keep is None else keep
    assert_close(mine.logits[keep], theirs.logits[keep], oracle.logits[keep], what="logits")
    if keep.all():
        assert_close(mine.loss, theirs.loss, oracle.loss, what="loss")
        for (name, _), mine, theirs, oracle in zip(model.named_parameters(), my_grads, their_grads, oracle_grads):
            assert_gradient_close(mine, theirs, oracle, what=name, beside=oracle_grads)


@everywhere
def test_logits_loss_and_gradients(lane, dtype):
    model = gpt2(lane, scale_attn_by_inverse_layer_idx=True)
    compare(model, ours(model), torch.randint(101, (2, 17), device=lane.device))


@interpreted
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side, lane, dtype):
    model = gpt2(lane)
    ids, mask = padded_batch(101, [13, 5, 9], 13, side=side)
    compare(model, ours(model), ids, mask.bool(), attention_mask=mask)


@interpreted
@pytest.mark.parametrize("make", [gpt2, llama], ids=["gpt2", "llama-grouped"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_their_cache(make, cache, lane, dtype):
    model = make(lane)
    ids, mask = padded_batch(61, [7, 3], 7, side="left")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "cache_implementation": cache}
    expected = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(ours(model).generate(ids, attention_mask=mask, **options), expected)


@interpreted
def test_grouped_queries(lane, dtype):
    model = llama(lane)
    compare(model, ours(model), torch.randint(61, (2, 11)))


@interpreted
def test_sliding_windows(lane, dtype):
    model = llama(lane, "Mistral", sliding_window=8)
    ids = torch.randint(61, (2, 8))
    compare(model, ours(model), ids)
    ids = torch.randint(61, (2, 9))
    with pytest.raises(ValueError, match=r"a sliding window or .*other_masks='sdpa'"):
        ours(model)(ids)
    compare(model, ours(model, other_masks="sdpa"), ids)


@interpreted
def test_cross_attention(lane, dtype):
    model = gpt2(lane)
    model.config.add_cross_attention = True
    model = spread(transformers.GPT2LMHeadModel(model.config)).eval()
    states, mask = torch.randn(2, 7, 48), torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    compare(
        model,
        ours(model),
        torch.randint(101, (2, 5)),
        encoder_hidden_states=states,
        encoder_attention_mask=mask,
    )


@interpreted
@pytest.mark.parametrize("kind", ["bool", "added"])
def test_masks_of_ones_own(kind, lane, dtype):
    model = gpt2(lane)
    model.set_attn_implementation("sdpa")  # their eager of transformers 4 adds causality of its own
    ids = torch.randint(101, (2, 6))
    causal = torch.ones(6, 6, dtype=torch.bool).tril()

    def as_given(visible):
        visible = visible.expand(2, 1, 6, 6)
        return visible if kind == "bool" else torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(dtype).min)

    full = torch.ones(6, 6, dtype=torch.bool)
    full[:, 4:] = False
    both = (causal, full)
    scattered = causal.clone()
    scattered[4, 1] = False
    with torch.no_grad():
        for visible in both:
            theirs = model(ids, attention_mask=_added(visible)).logits
            mine = ours(model)(ids, attention_mask=as_given(visible)).logits
            oracle = copy.deepcopy(model).double()(ids, attention_mask=_added(visible).double()).logits
            assert_close(mine, theirs, oracle)
        with pytest.raises(ValueError, match=r"no interval of keys for each row.*register\(other_masks='sdpa'\)"):
            ours(model)(ids, attention_mask=as_given(scattered))
        mine = ours(model, other_masks="sdpa")(ids, attention_mask=as_given(scattered)).logits
        oracle = copy.deepcopy(model).double()(ids, attention_mask=_added(scattered).double()).logits
        assert_close(mine, model(ids, attention_mask=_added(scattered)).logits, oracle)
        with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 1, 5, 6\); it must be"):
            ours(model)(ids, attention_mask=as_given(causal)[:, :, :5])


def _added(visible):
    return torch.zeros(2, 1, 6, 6).masked_fill(~visible, torch.finfo(torch.float32).min)


@interpreted
def test_holes_and_packed_texts_are_refused_or_masked_as_chosen(lane, dtype):
    model = gpt2(lane)
    ids = torch.randint(101, (1, 6))
    holes = torch.tensor([[1, 1, 0, 1, 1, 1]])
    packed = {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]), "use_cache": False}
    with pytest.raises(ValueError, match="row 0 has a hole"):
        ours(model)(ids, attention_mask=holes)
    with pytest.raises(ValueError, match="packed texts"):
        ours(model)(ids, **packed)
    other = ours(model, other_masks="sdpa")
    compare(model, other, ids, holes.bool(), attention_mask=holes)
    compare(model, other, ids, **packed)
    generated = {"attention_mask": torch.tensor([[1, 1, 1, 1, 0, 0]]), "max_new_tokens": 4, "pad_token_id": 0}
    assert torch.equal(other.generate(ids, **generated), model.generate(ids, **generated))


@interpreted
def test_two_steps_of_training(lane, dtype):
    ids = torch.randint(101, (2, 9))
    model = gpt2(lane)
    peers = [ours(model), model, copy.deepcopy(model).double()]
    for peer in peers:
        optimizer = torch.optim.SGD(peer.parameters(), lr=0.1)
        for _ in range(2):
            peer(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for mine, theirs, oracle in zip(*(peer.parameters() for peer in peers)):
        assert_gradient_close(mine, theirs, oracle)


@interpreted
def test_dropout_and_checkpointing(lane, dtype):
    model = ours(gpt2(lane, attn_pdrop=0.5))
    ids = torch.randint(101, (2, 9))
    model.train()
    model.config.use_cache = False
    torch.manual_seed(1)
    plain = torch.autograd.grad(model(ids, labels=ids).loss, model.transformer.wte.weight)[0]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(1)
    again = torch.autograd.grad(model(ids, labels=ids).loss, model.transformer.wte.weight)[0]
    assert torch.equal(plain, again)


def test_what_the_kernels_cannot_do_is_refused():
    model = transformers.GPT2LMHeadModel(their_config(tiny_config(n_layer=1))).eval()
    with pytest.raises(ValueError, match="'sdpa' is a name of transformers' own"):
        register("sdpa")
    with pytest.raises(TypeError, match="register: name is 3; it must be a string"):
        register(3)
    with pytest.raises(ValueError, match="other_masks is 'dense'; choose one of refuse, sdpa"):
        register(other_masks="dense")
    with pytest.raises(TypeError, match="model is a Linear; it must be a GPT-2 of transformers"):
        patch_gpt2(torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="flash_attention: q is on cpu"):
        ours(model)(torch.tensor([[1, 2]]))


def test_bounds_of_transformers_4s_arguments():
    """transformers 4 says cache_position for where the queries stand; a static cache holds more keys than tokens."""
    call = {"batch_size": 2, "kv_length": 8, "cache_position": torch.tensor([3, 4])}
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]).bool()
    assert attention_bounds(**call, attention_mask=mask).view(2, 3).tolist() == [[0, 5, 3], [2, 5, 3]]
    assert attention_bounds(**call).view(2, 3).tolist() == [[0, 8, 3], [0, 8, 3]]
    assert attention_bounds(2, 2, 5, 3) is None
    assert attention_bounds(2, 2, 4, 3, kv_offset=1) is None


@everywhere
def test_patch_gpt2(lane, dtype):
    model = gpt2(lane)
    patched = copy.deepcopy(model)
    handle = patch_gpt2(patched)
    assert handle.replaced == {"layer_norm": 5, "residual": 2, "gelu": 2, "loss": 1}
    ids = torch.randint(101, (2, 9), device=lane.device)
    compare(model, patched, ids)
    with pytest.raises(ValueError, match="undo"):
        patch_gpt2(patched)
    handle.undo()
    assert torch.equal(patched(ids, labels=ids).loss, model(ids, labels=ids).loss)
    assert not any("forward" in module.__dict__ for module in patched.modules())
    handle.undo()


@interpreted
def test_a_patched_model_generates_counts_items_and_keeps_hooks(lane, dtype):
    model = gpt2(lane)
    ids, mask = padded_batch(101, [7, 3], 7, side="left")
    options = {"attention_mask": mask, "max_new_tokens": 5, "pad_token_id": 0, "do_sample": False}
    expected = model.generate(ids, **options)
    loss = model(ids, labels=ids, num_items_in_batch=torch.tensor(5)).loss
    shape, seen = {"output_hidden_states": True, "output_attentions": True}, []
    states = model(ids, **shape)
    with patch_gpt2(model):
        assert torch.equal(model.generate(ids, **options), expected)
        torch.testing.assert_close(model(ids, labels=ids, num_items_in_batch=torch.tensor(5)).loss, loss)
        again = model(ids, **shape)
        torch.testing.assert_close(again.hidden_states, states.hidden_states)
        torch.testing.assert_close(again.attentions, states.attentions)
        hook = model.transformer.h[1].ln_2.register_forward_hook(lambda *_: seen.append(1))
        model(ids)
        assert seen == [1]
        hook.remove()
        with torch.autocast("cpu", torch.float16):
            assert model(ids, labels=ids).loss.isfinite()
    assert torch.equal(model(ids, labels=ids, num_items_in_batch=torch.tensor(5)).loss, loss)
