"""Token embeddings are reached, replaced and resized as transformers' are, and a tied head stays tied."""

import pytest
import torch
from peers import TALKATIVE, pair, spread, tiny_config
from torch import nn

from model import GPT2, GPT2ForTokenClassification, GPT2Model

IDS = torch.arange(12).view(2, 6)


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("count", "multiple"), [(130, None), (120, 64), (None, 64), (60, None), (None, None), (101, 1)]
)
def test_resizing_is_transformers(count, multiple, tied):
    """The same sizes; the same logits of the old tokens, and of the new ones up to the noise around the mean."""
    ours, theirs = pair(tiny_config(tie_word_embeddings=tied, eos_token_id=None, bos_token_id=None))
    before = logits(ours)
    embedding = ours.resize_token_embeddings(count, multiple)
    theirs.resize_token_embeddings(count, multiple)
    rows = theirs.config.vocab_size
    assert embedding is ours.get_input_embeddings()
    assert embedding.num_embeddings == len(embedding.weight) == len(ours.get_output_embeddings().weight) == rows
    assert ours.config.vocab_size == ours.transformer.config.vocab_size == rows
    assert (ours.lm_head.weight is embedding.weight) == tied
    old = min(rows, 101)
    assert torch.equal(logits(ours)[..., :old], before[..., :old])
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-2)


def test_new_rows_vary_as_the_old_ones_do():
    model = spread(GPT2(tiny_config(n_embd=6, n_head=1)), TALKATIVE)
    old = model.transformer.wte.weight.detach().clone()
    new = model.resize_token_embeddings(101 + 20_000).weight[101:].detach()
    spread_of_new = (new.double() - old.mean(0).double()) / 1e-9**0.5
    torch.testing.assert_close(spread_of_new.T.cov(), old.double().T.cov(correction=0), rtol=0.2, atol=2e-3)
    plain = spread(GPT2(tiny_config(n_embd=6, n_head=1, initializer_range=0.5)))
    new = plain.resize_token_embeddings(101 + 20_000, mean_resizing=False).weight[101:]
    assert new.std().item() == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize("cls", [GPT2Model, GPT2ForTokenClassification])
def test_models_without_a_language_models_head_resize(cls):
    model = cls(tiny_config())
    assert model.get_output_embeddings() is None
    assert model.resize_token_embeddings(120).weight.shape == (120, 48)
    model(torch.tensor([[119]]))
    with pytest.raises(ValueError, match="has no language-modelling head"):
        model.set_output_embeddings(nn.Linear(48, 120))


def test_a_resized_model_trains_saves_and_says_new_tokens(tmp_path):
    model = spread(GPT2(tiny_config(), attn_implementation="sdpa"))
    model.generate(IDS, max_new_tokens=2)
    model.resize_token_embeddings(103)
    with torch.no_grad():
        model.lm_head.weight[102] = 100.0 * model.lm_head.weight[5]
    said = model.eval().generate(IDS, max_new_tokens=8, eos_token_id=[])
    assert (said == 102).any()
    model.train()(said, labels=said).loss.backward()
    assert model.transformer.wte.weight.grad.shape == (103, 48)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(GPT2.from_pretrained(tmp_path)), logits(model.eval()))


def test_a_frozen_embedding_stays_frozen():
    model = GPT2(tiny_config())
    model.transformer.wte.weight.requires_grad_(False)
    assert not model.resize_token_embeddings(110).weight.requires_grad


def test_an_embedding_can_be_replaced():
    model = GPT2(tiny_config())
    model.set_input_embeddings(nn.Embedding(90, 48))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.config.vocab_size == 90
    with pytest.raises(ValueError, match=r"an nn\.Embedding of 48 columns is required"):
        model.set_input_embeddings(nn.Embedding(90, 40))
    model.set_output_embeddings(nn.Linear(48, 90, bias=False))
    assert model(IDS).logits.shape == (2, 6, 90)


@pytest.mark.parametrize("arguments", [{"new_num_tokens": 0}, {"new_num_tokens": 5.0}, {"pad_to_multiple_of": -1}])
def test_refuses_what_is_no_size(arguments):
    with pytest.raises(ValueError, match="it must be a positive integer"):
        GPT2(tiny_config()).resize_token_embeddings(**arguments)


def test_a_vocabulary_that_loses_its_eos_says_so():
    with pytest.warns(UserWarning, match="eos_token_id=100: outside the vocabulary of 50"):
        GPT2(tiny_config(eos_token_id=100)).resize_token_embeddings(50)
