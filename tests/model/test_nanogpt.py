"""What whoever comes from nanoGPT calls: its names, with its meaning, or an error that says what serves instead."""

import pytest
import torch
from peers import tiny_config

from model import GPT2


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT2(tiny_config()).eval()


def test_parameters_are_counted_without_positions(model):
    parts = sum(p.numel() for p in model.parameters())
    assert model.get_num_params(non_embedding=False) == parts
    assert model.get_num_params() == parts - model.config.n_positions * model.config.n_embd


def test_the_optimizer_is_configured(model):
    optimizer = model.configure_optimizers(0.2, 1e-3, (0.8, 0.9), "cpu")
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.2, 0.0]
    assert {(group["lr"], group["betas"]) for group in optimizer.param_groups} == {(1e-3, (0.8, 0.9))}
    with pytest.raises(ValueError, match="device_type is 'cuda'; the model is on cpu"):
        model.configure_optimizers(0.2, 1e-3, (0.8, 0.9), "cuda")


def test_mfu_by_hand(model):
    config = model.config
    T = config.n_positions
    flops = 3 * T * (6 * model.get_num_params() + 12 * config.n_layer * config.n_embd * T)
    assert model.estimate_mfu(3, 0.5, peak_flops=1e9) == pytest.approx(flops / 0.5 / 1e9)
    with pytest.raises(ValueError, match="no data sheet of cpu"):
        model.estimate_mfu(3, 0.5)


def test_a_cropped_model_computes_the_same_and_refuses_more(model, tmp_path):
    ids = torch.arange(8)[None]
    before = model(ids).logits
    model.crop_block_size(8)
    assert torch.equal(model(ids).logits, before)
    with pytest.raises(ValueError, match="the input has 9 tokens; n_positions is 8"):
        model(torch.arange(9)[None])
    model.save_pretrained(tmp_path)
    assert torch.equal(GPT2.from_pretrained(tmp_path)(ids).logits, before)
    for wrong in (0, 9):
        with pytest.raises(ValueError, match=f"block_size is {wrong}; it must be 1 to 8"):
            model.crop_block_size(wrong)


def test_its_calls_are_explained(model):
    ids = torch.arange(6)[None]
    with pytest.raises(TypeError, match=r"attention_mask is 5; .* How many tokens to say is max_new_tokens"):
        model.generate(ids, 5)
    with pytest.raises(TypeError, match="attention_mask= or labels="):
        model(ids, ids)
    with pytest.raises(ValueError, match=r"labels range from -1 to -1; .* or -100 where they are to be ignored"):
        model(ids, labels=torch.full_like(ids, -1))
    with pytest.raises(TypeError, match="'override_args'; a field of GPT2Config goes by its own name"):
        GPT2.from_pretrained("gpt2", override_args={"dropout": 0.0})
    assert model.generate(ids, max_new_tokens=5, temperature=0.8, top_k=None, do_sample=True, seed=0).shape == (1, 11)
