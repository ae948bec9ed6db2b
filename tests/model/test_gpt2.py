"""The model computes what transformers' GPT-2 computes, and says clearly what it cannot."""

import copy
import pickle

import pytest
import torch
from lanes import across_lanes
from optional import transformers
from peers import padded_batch, pair, spread, tiny_config

from model import GPT2, GPT2Config, GPT2Model
from model.inputs import padding_bounds

LOGITS = 2e-4  # the bounds of the project's first issue, fp32
LOSS = 1e-5

BACKENDS = ["eager", "sdpa"]
PADDING = [None, "right", "left"]


def assert_equal_outputs(ours, theirs, ids, mask):
    """Logits where the mask is 1, and the loss over the targets that a token, not padding, predicts."""
    labels = ids
    if mask is not None:
        predicted = mask.bool() & (mask.roll(1, dims=1) == 1)
        labels = ids.masked_fill(~predicted, -100)
    with torch.no_grad():
        a, b = ours(ids, attention_mask=mask, labels=labels), theirs(ids, attention_mask=mask, labels=labels)
    valid = torch.ones_like(ids).bool() if mask is None else mask.bool()
    assert b.logits.std() > 0.1  # flat logits would agree by themselves
    torch.testing.assert_close(a.logits[valid], b.logits[valid], rtol=0, atol=LOGITS)
    torch.testing.assert_close(a.loss, b.loss, rtol=0, atol=LOSS)


@pytest.mark.parametrize("padding", PADDING, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_and_loss_are_transformers(backend, padding):
    ours, theirs = pair(attn=backend)
    ids, mask = padded_batch(101, [17, 1, 9], 17, side=padding or "right")
    assert_equal_outputs(ours, theirs, ids, mask if padding else None)


@pytest.mark.parametrize("padding", PADDING, ids=str)
@across_lanes(torch.float32)
def test_logits_and_loss_are_transformers_with_our_kernels(lane, dtype, padding):
    ours, theirs = (model.to(lane.device, dtype) for model in pair(attn="triton"))
    ids, mask = (tensor.to(lane.device) for tensor in padded_batch(101, [17, 1, 9], 17, side=padding or "right"))
    assert_equal_outputs(ours, theirs, ids, mask if padding else None)


@pytest.fixture(scope="module")
def gpt2_dims():
    """(ours, theirs) of 124 million parameters each, with GPT-2's initialisation."""
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(attn_implementation="sdpa")).eval()
    with torch.device("meta"):
        ours = GPT2(GPT2Config()).eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    ours.tie_weights()
    return ours, theirs


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_and_loss_are_transformers_at_gpt2s_dims(backend, gpt2_dims):
    ours, theirs = gpt2_dims
    ours.set_attn_implementation(backend)
    ids, mask = padded_batch(50257, [40, 13], 40)
    assert_equal_outputs(ours, theirs, ids, None)
    assert_equal_outputs(ours, theirs, ids, mask)


@across_lanes(torch.float32, lanes=("interpret", "gpu"))
def test_logits_and_loss_are_transformers_at_gpt2s_dims_with_our_kernels(lane, dtype, gpt2_dims):
    ours, theirs = (copy.deepcopy(model).to(lane.device) for model in gpt2_dims)
    ours.set_attn_implementation("triton")
    ids, mask = (tensor.to(lane.device) for tensor in padded_batch(50257, [40, 13], 40))
    assert_equal_outputs(ours, theirs, ids, None)
    assert_equal_outputs(ours, theirs, ids, mask)


# What changes attention, and what lies elsewhere in the model.
ATTENTION_FIELDS = [
    {"scale_attn_weights": False},
    {"scale_attn_by_inverse_layer_idx": True},
    {"reorder_and_upcast_attn": True},
    {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
]


@pytest.mark.parametrize("fields", ATTENTION_FIELDS, ids=lambda fields: "-".join(fields))
@across_lanes(torch.float32, lanes=("interpret", "gpu"))
def test_each_option_of_attention_is_honoured_by_our_kernels(lane, dtype, fields):
    ours, theirs = (model.to(lane.device) for model in pair(tiny_config(**fields), attn="triton"))
    ids, mask = (tensor.to(lane.device) for tensor in padded_batch(101, [11, 7], 11))
    assert_equal_outputs(ours, theirs, ids, mask)


@pytest.mark.parametrize(
    "fields",
    [
        *ATTENTION_FIELDS,
        {"n_inner": 40},
        {"layer_norm_epsilon": 1e-2},
        {"tie_word_embeddings": False},
        *({"activation_function": name} for name in ("gelu", "gelu_pytorch_tanh", "relu", "silu", "swish", "tanh")),
        *({"activation_function": name} for name in ("quick_gelu", "gelu_fast", "mish")),
    ],
    ids=lambda fields: "-".join(f"{key}-{value}" for key, value in fields.items()),
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_option_of_the_config_is_honoured(fields, backend):
    ours, theirs = pair(tiny_config(**fields), attn=backend)
    ids, _ = padded_batch(101, [11, 11], 11)
    assert_equal_outputs(ours, theirs, ids, None)


def test_reorder_and_upcast_matters_in_half_precision():
    """In bf16, eager attention with and without it differ, and with it agrees with transformers to bf16's rounding."""
    ours, theirs = pair(tiny_config(reorder_and_upcast_attn=True))
    plain, _ = pair(tiny_config(reorder_and_upcast_attn=False))
    ids, _ = padded_batch(101, [33, 33], 33)
    with torch.no_grad():
        a, b, c = (model.bfloat16()(ids).logits.float() for model in (ours, theirs, plain))
    assert (a - b).abs().mean() < (c - b).abs().mean()


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_states_attentions_and_other_inputs_are_transformers(backend):
    ours, theirs = pair(attn=backend)
    ids, _ = padded_batch(101, [12, 12], 12)
    positions = torch.arange(5, 17)[None]
    types = torch.randint(0, 101, ids.shape)
    with torch.no_grad():
        options = {"position_ids": positions, "token_type_ids": types, "output_hidden_states": True}
        a, b = ours(ids, **options), theirs(ids, **options)
        torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=LOGITS)
        assert len(a.hidden_states) == len(b.hidden_states) == 4
        for x, y in zip(a.hidden_states, b.hidden_states):
            torch.testing.assert_close(x, y, rtol=0, atol=LOGITS)

        embeds = torch.randn(2, 12, 48)
        torch.testing.assert_close(
            ours(inputs_embeds=embeds).logits, theirs(inputs_embeds=embeds).logits, rtol=0, atol=LOGITS
        )
        last = ours(ids, logits_to_keep=2).logits
        assert torch.equal(last.argmax(-1), theirs(ids, logits_to_keep=2).logits.argmax(-1))
        assert last.shape == (2, 2, 101)
        if backend == "eager":
            weights = ours(ids, output_attentions=True).attentions
            for x, y in zip(weights, theirs(ids, output_attentions=True).attentions, strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=1e-6)
                torch.testing.assert_close(x.sum(-1), torch.ones(2, 3, 12))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "checkpointing",
    [None, {}, {"use_reentrant": True}, {"preserve_rng_state": False}],
    ids=["", "checkpointing", "reentrant", "no-rng"],
)
def test_gradients_of_a_training_step_are_transformers(backend, checkpointing):
    assert_equal_training_step(backend, checkpointing, "cpu")


@across_lanes()
def test_gradients_of_a_training_step_are_transformers_with_our_kernels(lane):
    assert_equal_training_step("triton", None, lane.device)


def assert_equal_training_step(backend, checkpointing, device):
    """Loss, every gradient, and the logits after an optimiser step."""
    config = tiny_config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ours, theirs = (model.train().to(device) for model in pair(config, attn=backend))
    if checkpointing is not None:
        ours.gradient_checkpointing_enable(checkpointing)
    ids, mask = (tensor.to(device) for tensor in padded_batch(101, [23, 7], 23))
    labels = ids.masked_fill(mask == 0, -100)
    losses = [model(ids, attention_mask=mask, labels=labels).loss for model in (ours, theirs)]
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=LOSS)
    for loss in losses:
        loss.backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-4, atol=1e-5, msg=name)

    for model in (ours, theirs):
        torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False).step()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-3)


@pytest.mark.parametrize("place", ["embd_pdrop", "attn_pdrop", "resid_pdrop"])
def test_dropout_falls_where_transformers_lets_it_fall(place):
    """From one seed both draw the same numbers in the same order: dropout elsewhere would give other logits."""
    none = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    ours, theirs = (model.train() for model in pair(tiny_config(**{**none, place: 0.3})))
    ids, _ = padded_batch(101, [12, 12], 12)
    logits = []
    for model in (ours, theirs):
        torch.manual_seed(3)
        logits.append(model(ids).logits)
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=LOGITS)
    assert (ours.eval()(ids).logits - logits[0]).abs().max() > 0.1


def test_checkpointing_changes_no_dropout():
    ours = spread(GPT2(tiny_config())).train()
    ids, _ = padded_batch(101, [12, 12], 12)
    gradients = []
    for enabled in (False, True):
        if enabled:
            ours.gradient_checkpointing_enable()
        assert ours.is_gradient_checkpointing == enabled
        ours.zero_grad()
        torch.manual_seed(3)
        ours(ids, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in ours.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    ours.gradient_checkpointing_disable()
    assert not ours.is_gradient_checkpointing
    with pytest.raises(TypeError, match=r"'use_reentrnt' is no option of torch's checkpoint\(\): .*use_reentrant"):
        ours.gradient_checkpointing_enable({"use_reentrnt": True})
    with pytest.raises(TypeError, match="True came; a dict"):
        ours.gradient_checkpointing_enable(True)


def test_gradients_reach_inputs_whose_embedding_is_frozen():
    """As adapters are trained: everything frozen, blocks recomputed by the reentrant checkpoint()."""
    ours = spread(GPT2(tiny_config())).train().requires_grad_(False)
    ours.transformer.h[0].mlp.c_fc.bias.requires_grad_(True)
    ours.gradient_checkpointing_enable({"use_reentrant": True})
    ours.enable_input_require_grads()
    ids, _ = padded_batch(101, [12, 12], 12)
    ours(ids, labels=ids).loss.backward()
    assert ours.transformer.h[0].mlp.c_fc.bias.grad.any()
    ours.disable_input_require_grads()
    assert not ours.transformer.wte._forward_hooks


def test_initialisation_is_gpt2s():
    config = tiny_config(n_embd=240, n_layer=8, vocab_size=2000)
    model = GPT2(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif ".ln_" in name:
            assert (parameter == 1).all(), name
        else:
            std = 0.02 / 4 if name.endswith("c_proj.weight") else 0.02  # 4 = sqrt(2 * n_layer)
            assert parameter.std().item() == pytest.approx(std, rel=0.03), name
            assert abs(parameter.mean().item()) < std / 20, name
    assert model.lm_head.weight is model.transformer.wte.weight


def test_loss_ignores_minus_100_and_is_shifted():
    model = spread(GPT2(tiny_config())).eval()
    ids, _ = padded_batch(101, [9, 9], 9)
    labels = ids.clone()
    labels[:, 4:] = -100
    with torch.no_grad():
        out = model(ids, labels=labels)
    log_p = out.logits.log_softmax(-1)
    expected = torch.stack([-log_p[b, t, ids[b, t + 1]] for b in range(2) for t in range(3)]).mean()
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_what_stands_in_the_padding_does_not_matter(backend, side):
    model = spread(GPT2(tiny_config(), attn_implementation=backend)).eval()
    ids, mask = padded_batch(101, [10, 4, 0], 10, side=side)
    other = torch.where(mask.bool(), ids, torch.randint(0, 101, ids.shape))
    with torch.no_grad():
        a, b = model(ids, attention_mask=mask).logits, model(other, attention_mask=mask).logits
    assert a.isfinite().all()
    assert torch.equal(a[mask.bool()], b[mask.bool()])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_token_sees_the_future(backend):
    model = spread(GPT2(tiny_config(), attn_implementation=backend)).eval()
    ids, _ = padded_batch(101, [20], 20)
    other = ids.clone()
    other[:, 12:] = (other[:, 12:] + 1) % 101
    with torch.no_grad():
        a, b = model(ids).logits, model(other).logits
    assert torch.equal(a[:, :12], b[:, :12])
    assert (a[:, 12:] != b[:, 12:]).any()


def test_output_reads_as_attribute_key_and_tuple():
    ours, theirs = pair()
    ids, _ = padded_batch(101, [5], 5)
    a, b = ours(ids, labels=ids), theirs(ids, labels=ids, use_cache=False)
    assert list(a) == list(b) == ["loss", "logits"]
    assert a["loss"] is a.loss is a[0] is a.to_tuple()[0] is a.get("loss")
    assert a[:2] == (a.loss, a.logits)
    assert "hidden_states" not in a
    assert a.hidden_states is None
    assert len(a) == 2
    with pytest.raises(KeyError):
        a["hidden_states"]
    as_tuple = ours(ids, labels=ids, return_dict=False)
    assert isinstance(as_tuple, tuple)
    torch.testing.assert_close(as_tuple[1], a.logits)
    assert pickle.loads(pickle.dumps(a)).loss == a.loss


def test_base_model_is_transformers():
    ours, theirs = pair(cls=GPT2Model, their_cls=transformers.GPT2Model)
    ids, _ = padded_batch(101, [8, 8], 8)
    with torch.no_grad():
        a, b = ours(ids), theirs(ids)
    torch.testing.assert_close(a.last_hidden_state, b.last_hidden_state, rtol=0, atol=LOGITS)
    assert a[0] is a.last_hidden_state


@pytest.mark.parametrize(
    ("mask", "bounds"),
    [
        ([[1, 1, 1], [1, 1, 1]], None),
        ([[1, 1, 0], [1, 1, 1]], ([0, 0], [2, 3])),
        ([[0, 1, 1], [0, 0, 1]], ([1, 2], [3, 3])),
        ([[0, 1, 0], [0, 0, 0]], ([1, 0], [2, 0])),
    ],
    ids=["none", "right", "left", "both"],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32], ids=str)
def test_a_mask_becomes_bounds(mask, bounds, dtype):
    start, end = padding_bounds(torch.tensor(mask, dtype=dtype), 2, 3)
    if bounds is None:
        assert start is None
        assert end is None
    else:
        assert (start.tolist(), end.tolist()) == bounds
        assert start.dtype == end.dtype == torch.int32


IDS = torch.zeros(2, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give input_ids or inputs_embeds, and not both"),
        ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 4, 48)}, "and not both"),
        ({"input_ids": IDS[0]}, r"input_ids must be \[B, T\]; its shape is \(4,\)"),
        ({"inputs_embeds": torch.zeros(2, 4, 47)}, r"must be \[B, T, n_embd = 48\]; its shape is \(2, 4, 47\)"),
        ({"input_ids": torch.zeros(1, 65, dtype=torch.long)}, "the input has 65 tokens; n_positions is 64"),
        ({"input_ids": IDS + 101}, "input_ids range from 101 to 101; .* below vocab_size = 101"),
        ({"input_ids": IDS - 1}, "input_ids range from -1 to -1"),
        ({"input_ids": IDS, "position_ids": torch.full((2, 4), 64)}, "position_ids range .* below n_positions = 64"),
        ({"input_ids": IDS, "position_ids": torch.zeros(2, 3).long()}, r"position_ids has shape \(2, 3\)"),
        ({"input_ids": IDS, "token_type_ids": torch.zeros(1, 4).long()}, r"token_type_ids has shape \(1, 4\)"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 5)}, r"its shape is \(2, 5\); it must be .* \(2, 4\)"),
        ({"input_ids": IDS, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]])}, "row 1 has a hole"),
        ({"input_ids": IDS, "labels": IDS[:1]}, r"labels has shape \(1, 4\); it must be \(2, 4\)"),
        ({"input_ids": IDS, "labels": IDS, "logits_to_keep": 1}, "leave logits_to_keep at 0"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_refuses_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        GPT2(tiny_config())(**arguments)


def test_refuses_what_the_backend_cannot_do():
    with pytest.raises(ValueError, match="attn_implementation='flash' is unknown; choose one of: auto, eager"):
        GPT2(tiny_config(), attn_implementation="flash")
    with pytest.raises(ValueError, match=r"'sdpa' does not support attention weights.*could serve it: eager"):
        GPT2(tiny_config(), attn_implementation="sdpa")(IDS, output_attentions=True)
    with pytest.raises(ValueError, match="activation_function='gelu_11' is not supported; choose one of gelu_new"):
        GPT2(tiny_config(activation_function="gelu_11"))
    config = tiny_config()
    config.n_head = 5
    with pytest.raises(ValueError, match="n_embd 48 is not divisible by n_head 5"):
        GPT2(config)
