"""Cross-attention over an encoder's states, with and without its cache: as in transformers."""

import pytest
import torch
from lanes import across_lanes
from numerics import assert_close
from optional import transformers
from peers import pair, spread, tiny_config

from model import GPT2, GPT2ForTokenClassification
from model.cache import KVCache

CONFIG = {"n_layer": 2, "add_cross_attention": True, "resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
IDS = torch.arange(10).view(2, 5)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 0, 0]])


def encoder(**options):
    states = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(3))
    return {"encoder_hidden_states": states, "encoder_attention_mask": MASK, **options}


def peers(attn="eager", **fields):
    return pair(tiny_config(**CONFIG, **fields), attn=attn)


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("fields", [{}, {"scale_attn_by_inverse_layer_idx": True}, {"reorder_and_upcast_attn": True}])
def test_logits_loss_gradients_and_weights(attn, fields):
    ours, theirs = peers(attn, **fields)
    shown = {"output_attentions": attn == "eager", "output_hidden_states": True}
    mine, other = (model(IDS, labels=IDS, **encoder(), **shown) for model in (ours, theirs))
    torch.testing.assert_close(mine.logits, other.logits)
    torch.testing.assert_close(mine.hidden_states, other.hidden_states)
    if attn == "eager":
        torch.testing.assert_close(mine.attentions, other.attentions)
        torch.testing.assert_close(mine.cross_attentions, other.cross_attentions)
    mine.loss.backward()
    other.loss.backward()
    theirs = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, msg=name)


@across_lanes(torch.float32, lanes=("interpret", "sm_90", "gpu"))
def test_by_the_kernels(lane, dtype):
    ours, _ = peers("eager")
    ours.to(lane.device)
    given = {name: tensor.to(lane.device) for name, tensor in encoder().items()}
    ids = IDS.to(lane.device)
    with torch.no_grad():
        eager = ours(ids, **given).logits
        ours.set_attn_implementation("triton")
        mine = ours(ids, **given).logits
        ours.set_attn_implementation("eager")
        given["encoder_hidden_states"] = given["encoder_hidden_states"].double()
        oracle = ours.double()(ids, **given).logits
    assert_close(mine, eager, oracle)


def test_the_states_are_read_once_with_a_cache():
    ours, theirs = peers()
    given = encoder()
    with torch.no_grad():
        whole = ours(IDS, **given, use_cache=False).logits
        mine, other = (model(IDS[:, :3], **given, use_cache=True) for model in (ours, theirs))
        torch.testing.assert_close(mine.logits, other.logits)
        cache = mine.past_key_values
        mine = ours(IDS[:, 3:4], past_key_values=cache, **given)
        other = theirs(IDS[:, 3:4], past_key_values=other.past_key_values, **given)
        torch.testing.assert_close(mine.logits, other.logits)
        last = ours(IDS[:, 4:], past_key_values=cache).logits  # the cache remembers the states
        torch.testing.assert_close(torch.cat([mine.logits, last], 1), whole[:, 3:])
        assert cache.cross[1][0].shape == (2, 3, 7, 16)
        with pytest.raises(ValueError, match="encoder_hidden_states has 6 tokens; past_key_values has seen 7"):
            ours(IDS[:, :1], past_key_values=cache, encoder_hidden_states=given["encoder_hidden_states"][:, :6])


def test_rows_of_a_cache_take_their_states_along():
    ours, _ = peers()
    given = encoder()
    with torch.no_grad():
        cache = ours(IDS[:, :3], **given, use_cache=True).past_key_values
        expected = ours(IDS[:, 3:], past_key_values=cache.select([0, 1])).logits
        swapped = ours(IDS[[1, 1, 0], 3:], past_key_values=cache.select([1, 1, 0])).logits
        torch.testing.assert_close(swapped, expected[[1, 1, 0]])
        alone = ours(IDS[1:, 3:], past_key_values=cache.row(1)).logits
        torch.testing.assert_close(alone, expected[1:])
        cache.reset()
        torch.testing.assert_close(
            ours(IDS, past_key_values=cache).logits, ours(IDS, past_key_values=KVCache(ours.config, 2)).logits
        )


def test_without_states_the_layers_are_left_out_as_in_transformers():
    ours, theirs = peers()
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits)
    assert ours.generate(IDS, max_new_tokens=2).shape == (2, 7)


def test_checkpoints_go_both_ways_and_blocks_are_recomputed(tmp_path):
    ours, theirs = peers()
    ours.save_pretrained(tmp_path / "ours")
    again, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = GPT2.from_pretrained(tmp_path / "theirs", attn_implementation="eager")
    expected = ours(IDS, **encoder()).logits
    assert torch.equal(loaded(IDS, **encoder()).logits, expected)
    torch.testing.assert_close(again(IDS, **encoder()).logits, expected)
    loss = loaded.train()(IDS, labels=IDS, **encoder()).loss
    grads = torch.autograd.grad(loss, list(loaded.parameters()))
    loaded.gradient_checkpointing_enable()
    again = torch.autograd.grad(loaded(IDS, labels=IDS, **encoder()).loss, list(loaded.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(grads, again))


def test_what_does_not_fit_is_refused():
    plain = GPT2(tiny_config(n_layer=1)).eval()
    ours, given = peers()[0], encoder()
    for model, change, error in (
        (plain, {}, r"config\.add_cross_attention is False"),
        (ours, {"encoder_hidden_states": None}, "encoder_attention_mask came without encoder_hidden_states"),
        (ours, {"encoder_hidden_states": torch.ones(2, 7, 47)}, r"encoder_hidden_states has shape \(2, 7, 47\)"),
        (ours, {"encoder_hidden_states": torch.ones(3, 7, 48)}, r"encoder_hidden_states has shape \(3, 7, 48\)"),
        (ours, {"encoder_hidden_states": torch.ones(2, 48)}, r"encoder_hidden_states has shape \(2, 48\)"),
        (ours, {"encoder_hidden_states": torch.ones(2, 0, 48)}, "encoder_hidden_states has no token"),
        (ours, {"encoder_attention_mask": MASK[:, :6]}, r"its shape is \(2, 6\)"),
        (ours, {"encoder_attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1, 1]] * 2)}, "row 0 has a hole"),
    ):
        with pytest.raises(ValueError, match=error):
            model(IDS, **{**given, **change})
    with pytest.raises(TypeError, match=r"encoder_hidden_states is torch\.int64"):
        ours(IDS, encoder_hidden_states=torch.ones(2, 7, 48).long())


def test_other_heads_take_the_states():
    model = spread(GPT2ForTokenClassification(tiny_config(**CONFIG), attn_implementation="eager")).eval()
    assert not torch.equal(model(IDS, **encoder()).logits, model(IDS).logits)
