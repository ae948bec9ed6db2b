"""The heads beside the language model give what transformers' give, and exchange checkpoints with them."""

import logging

import pytest
import torch
from lanes import across_lanes
from optional import transformers
from peers import padded_batch, pair, spread, tiny_config

import model.heads as heads
from model import GPT2, GPT2Config

DOUBLE, SEQUENCE, TOKEN, ANSWER = NAMES = [
    "GPT2DoubleHeadsModel",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2ForQuestionAnswering",
]
EVERY_HEAD = pytest.mark.parametrize("name", NAMES)
BACKENDS = pytest.mark.parametrize("attn", ["eager", "sdpa"])
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0.0}
PAD = 7
TOLERANCE = {"rtol": 0, "atol": 2e-4}


def peers(name, attn="eager", **fields):
    """(ours, theirs) with one head, their dropout off."""
    config = tiny_config(**{"num_labels": 3, "pad_token_id": PAD, **fields})
    return pair(config, attn=attn, cls=getattr(heads, name), their_cls=getattr(transformers, name), std=0.2)


def ids_of(*shape):
    """Random ids without the padding token."""
    ids = torch.randint(0, 100, shape)
    return ids + (ids >= PAD)


def labels_for(name, ids):
    """The labels that give each model all of its losses."""
    B = len(ids)
    return {
        DOUBLE: {"labels": ids, "mc_labels": torch.arange(B) % 2},
        SEQUENCE: {"labels": torch.arange(B) % 3},
        TOKEN: {"labels": ids % 3},
        ANSWER: {"start_positions": torch.arange(B), "end_positions": torch.arange(B) + 2},
    }[name]


def ids_for(name):
    return ids_of(3, 2, 11) if name == DOUBLE else ids_of(3, 11)


def assert_equal_outputs(ours, theirs, *arguments, their_arguments=None, **options):
    """Every tensor of both outputs under one name, within tolerance; returns ours."""
    with torch.no_grad():
        a = ours(*arguments, use_cache=False, **options)
        b = theirs(*(their_arguments or arguments), use_cache=False, **options)
    assert list(a) == list(b)
    for key in a:
        if key not in ("hidden_states", "attentions"):
            assert a[key].shape == b[key].shape, key
            torch.testing.assert_close(a[key], b[key], **TOLERANCE)
        else:
            for x, y in zip(a[key], b[key], strict=True):
                torch.testing.assert_close(x, y.view(x.shape), **TOLERANCE)
    return a


@BACKENDS
@EVERY_HEAD
def test_logits_and_losses_are_transformers(name, attn):
    ours, theirs = peers(name, attn)
    ids = ids_for(name)
    out = assert_equal_outputs(ours, theirs, ids, **labels_for(name, ids))
    losses = [key for key in out if key.endswith("loss")]
    assert losses == (["loss", "mc_loss"] if name == DOUBLE else ["loss"])
    assert all(out[key].item() > 0.1 for key in losses)
    assert all(out[key].std() > 0.1 for key in out if "logits" in key)  # flat ones would agree by themselves
    assert_equal_outputs(ours, theirs, ids)


@EVERY_HEAD
def test_other_inputs_and_outputs_are_transformers(name):
    ours, theirs = peers(name)
    ids = ids_for(name)
    options = {"token_type_ids": ids.flip(-1), "output_hidden_states": True, "output_attentions": True}
    out = assert_equal_outputs(ours, theirs, ids, position_ids=torch.arange(5, 16)[None], **options)
    assert (len(out.hidden_states), len(out.attentions)) == (4, 3)
    flat = ids.view(-1, 11)
    assert_equal_outputs(ours, theirs, inputs_embeds=torch.randn(*flat.shape, 48))

    with torch.no_grad():
        a = ours(ids, **labels_for(name, ids), return_dict=False, output_hidden_states=True)
        b = theirs(ids, **labels_for(name, ids), return_dict=False, output_hidden_states=True)
    assert isinstance(a, tuple)
    assert len(a) == len(b)
    tensors = [(x, y) for x, y in zip(a, b) if isinstance(x, torch.Tensor)]
    assert len(tensors) == {DOUBLE: 4, SEQUENCE: 2, TOKEN: 2, ANSWER: 3}[name]
    for x, y in tensors:
        torch.testing.assert_close(x, y, **TOLERANCE)


@EVERY_HEAD
def test_arguments_are_transformers_in_transformers_order(name):
    import inspect

    ours, theirs = (list(inspect.signature(getattr(m, name).forward).parameters) for m in (heads, transformers))
    assert [key for key in ours if key not in ("return_dict", "options")] == [k for k in theirs if k != "kwargs"]


@pytest.mark.parametrize("place", ["cls_index", "last", "first", "mean"])
@pytest.mark.parametrize("proj", [{}, {"summary_proj_to_labels": False}, {"summary_use_proj": False}], ids=str)
def test_each_summary_is_transformers(place, proj):
    ours, theirs = peers(DOUBLE, summary_type=place, summary_activation="tanh", **proj)
    ids = ids_of(3, 11)
    assert_equal_outputs(ours, theirs, ids)
    assert_equal_outputs(ours, theirs, ids, mc_token_ids=torch.tensor([0, 10, 4]))


@BACKENDS
def test_choices_are_scored_at_the_tokens_that_are_named(attn):
    ours, theirs = peers(DOUBLE, attn)
    ids = ids_of(2, 3, 9)
    at = torch.tensor([[8, 0, 4], [1, 2, 3]])
    mask = (torch.arange(9) <= at[..., None]).long()
    with torch.no_grad():
        a = ours(ids, attention_mask=mask, mc_token_ids=at, mc_labels=torch.tensor([2, 0]))
        b = theirs(ids, attention_mask=mask, mc_token_ids=at, mc_labels=torch.tensor([2, 0]))
    torch.testing.assert_close(a.mc_logits, b.mc_logits, **TOLERANCE)
    torch.testing.assert_close(a.mc_loss, b.mc_loss, **TOLERANCE)
    torch.testing.assert_close(a.logits[mask.bool()], b.logits[mask.bool()], **TOLERANCE)
    last = ours(ids).mc_logits
    torch.testing.assert_close(last, ours(ids, mc_token_ids=torch.full((2, 3), 8)).mc_logits)


def test_a_summary_of_choices_stays_within_its_choice():
    """transformers' would take the last choice, not the last token."""
    for place in ("last", "first", "mean"):
        ours, _ = peers(DOUBLE, summary_type=place)
        ids = ids_of(2, 3, 9)
        torch.testing.assert_close(ours(ids).mc_logits, ours(ids.view(6, 9)).mc_logits.view(2, 3))


def test_double_heads_generate_as_the_language_model_does():
    ours, _ = peers(DOUBLE)
    plain = GPT2(tiny_config(pad_token_id=PAD)).eval()
    plain.load_state_dict(ours.state_dict(), strict=False)
    ids = ids_of(2, 5)
    assert torch.equal(ours.generate(ids, max_new_tokens=6), plain.generate(ids, max_new_tokens=6))
    assert ours.lm_head.weight is ours.transformer.wte.weight


@pytest.mark.parametrize("side", ["right", "left"])
@BACKENDS
class TestPadding:
    def test_a_text_is_judged_by_its_last_token(self, attn, side):
        """From the mask, and from pad_token_id alone; each as transformers, which always reads pad_token_id."""
        ours, theirs = peers(SEQUENCE, attn)
        _, mask = padded_batch(101, [11, 1, 6], 11, side=side)
        ids = ids_of(3, 11).masked_fill(mask == 0, PAD)
        labels = torch.tensor([0, 1, 2])
        masked = assert_equal_outputs(ours, theirs, ids, attention_mask=mask, labels=labels)
        assert_equal_outputs(ours, theirs, ids, labels=labels)
        ours.config.pad_token_id = None
        with torch.no_grad():
            torch.testing.assert_close(ours(ids, attention_mask=mask).logits, masked.logits)
            embeds = ours.transformer.wte(ids)
            torch.testing.assert_close(ours(inputs_embeds=embeds, attention_mask=mask).logits, masked.logits)
            for row in range(3):
                own = ours(ids[row, mask[row].bool()][None], position_ids=torch.arange(11)[None, mask[row].bool()])
                torch.testing.assert_close(own.logits[0], masked.logits[row], **TOLERANCE)

    @pytest.mark.parametrize("name", [TOKEN, ANSWER])
    def test_tokens_of_a_padded_row_are_transformers(self, attn, side, name):
        ours, theirs = peers(name, attn)
        ids, mask = padded_batch(101, [11, 1, 6], 11, side=side)
        with torch.no_grad():
            a, b = ours(ids, attention_mask=mask), theirs(ids, attention_mask=mask)
        for key in a:
            torch.testing.assert_close(a[key][mask.bool()], b[key][mask.bool()], **TOLERANCE)


def test_a_mask_counts_a_padding_token_inside_the_text():
    """Where pad_token_id is also the end of a text; transformers would judge by the token before it."""
    ours, theirs = peers(SEQUENCE)
    ids = ids_of(1, 6)
    ids[0, -1] = PAD
    with torch.no_grad():
        by_id = theirs(ids, attention_mask=torch.ones(1, 6)).logits
        torch.testing.assert_close(ours(ids).logits, by_id, **TOLERANCE)
        masked = ours(ids, attention_mask=torch.ones(1, 6)).logits
    theirs.config.pad_token_id = None
    torch.testing.assert_close(masked, theirs(ids).logits, **TOLERANCE)
    assert (masked - by_id).abs().max() > 0.05


CLASSES = torch.tensor([0, 2, 1])
NUMBERS = torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.0, 3.0], [0.1, 0.2, 0.3]])


@pytest.mark.parametrize(
    ("fields", "labels", "problem_type"),
    [
        ({"num_labels": 1}, NUMBERS[0], "regression"),
        ({"num_labels": 1}, NUMBERS[0][:, None], "regression"),
        ({"num_labels": 3}, CLASSES, "single_label_classification"),
        ({"num_labels": 3}, CLASSES.int().long()[:, None], "single_label_classification"),
        ({"num_labels": 3}, (NUMBERS > 0.4).float(), "multi_label_classification"),
        ({"num_labels": 3, "problem_type": "regression"}, NUMBERS, "regression"),
        ({"num_labels": 1, "problem_type": "multi_label_classification"}, torch.ones(3, 1), None),
        ({"num_labels": 3, "problem_type": "single_label_classification"}, torch.tensor([0, -100, 1]), None),
    ],
    ids=["number", "numbers-B-1", "classes", "classes-B-1", "multi", "vectors", "one-multi", "ignored"],
)
def test_each_problem_type_is_transformers(fields, labels, problem_type):
    ours, theirs = peers(SEQUENCE, **fields)
    assert_equal_outputs(ours, theirs, ids_of(3, 11), labels=labels)
    assert ours.config.problem_type == theirs.config.problem_type == (problem_type or fields["problem_type"])


def test_one_row_needs_no_padding_token():
    ours, theirs = peers(SEQUENCE, pad_token_id=None, num_labels=1)
    assert_equal_outputs(ours, theirs, ids_of(1, 9), labels=torch.tensor([0.5]))


def test_answers_outside_the_text_are_ignored_as_transformers_does():
    ours, theirs = peers(ANSWER)
    starts, ends = torch.tensor([[3], [40], [-2]]), torch.tensor([[5], [2], [11]])
    assert_equal_outputs(ours, theirs, ids_of(3, 11), start_positions=starts, end_positions=ends)


def test_a_cache_serves_a_text_in_two_parts():
    ours, _ = peers(SEQUENCE)
    ids = ids_of(2, 9)
    with torch.no_grad():
        cache = ours(ids[:, :5]).past_key_values
        torch.testing.assert_close(ours(ids[:, 5:], cache).logits, ours(ids).logits, **TOLERANCE)
    assert not ours(ids, use_cache=True).logits.requires_grad


@EVERY_HEAD
def test_a_training_step_is_transformers(name):
    assert_equal_training_step(name, "sdpa", "cpu")


@across_lanes(torch.float32, lanes=("interpret", "gpu"))
@EVERY_HEAD
def test_a_training_step_is_transformers_with_our_kernels(lane, dtype, name):
    assert_equal_training_step(name, "triton", lane.device)


def assert_equal_training_step(name, attn, device):
    """The losses and every gradient."""
    ours, theirs = (m.train().to(device) for m in peers(name, attn, **NO_DROPOUT))
    ours.set_kernel_implementation("triton" if attn == "triton" else "torch")
    for part in (getattr(ours, "dropout", None), getattr(theirs, "dropout", None)):
        if part is not None:
            part.p = 0.0
    ids = ids_for(name).to(device)
    labels = {key: value.to(device) for key, value in labels_for(name, ids.cpu()).items()}
    for m in (ours, theirs):
        out = m(ids, **labels)
        (out.loss + out["mc_loss"] if name == DOUBLE else out.loss).backward()
    gradients = dict(theirs.named_parameters())
    for key, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[key].grad, rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        (TOKEN, {}),
        (TOKEN, {"hidden_dropout": 0.6}),
        (TOKEN, {"hidden_dropout": 0.6, "classifier_dropout": 0.3}),
        (DOUBLE, {"summary_first_dropout": 0.5}),
        (DOUBLE, {"summary_last_dropout": 0.5}),
    ],
    ids=str,
)
def test_dropout_falls_where_transformers_lets_it_fall(name, fields):
    """From one seed both draw the same numbers in the same order."""
    ours, theirs = (m.train() for m in peers(name, **{**NO_DROPOUT, **fields}))
    ids, outputs = ids_for(name), []
    for m in (ours, theirs):
        torch.manual_seed(3)
        outputs.append(m(ids)["mc_logits" if name == DOUBLE else "logits"])
    torch.testing.assert_close(*outputs, **TOLERANCE)
    key = "mc_logits" if name == DOUBLE else "logits"
    assert (ours.eval()(ids)[key] - outputs[0]).abs().max() > 0.05


@EVERY_HEAD
def test_checkpoints_go_both_ways(name, tmp_path, caplog):
    ours, theirs = peers(name, classifier_dropout=0.25)
    ids = ids_for(name)
    ours.save_pretrained(tmp_path / "ours")
    loaded, info = getattr(transformers, name).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.config.architectures == [name]
    assert_equal_outputs(ours, loaded.eval(), ids)

    theirs.save_pretrained(tmp_path / "theirs")
    caplog.clear()
    again = getattr(heads, name).from_pretrained(tmp_path / "theirs", attn_implementation="eager")
    assert not caplog.records
    assert_equal_outputs(again, theirs, ids)
    assert again.config.classifier_dropout == 0.25
    assert again.config.num_labels == ours.config.num_labels


@EVERY_HEAD
def test_a_plain_checkpoint_gets_a_new_head(name, tmp_path, caplog):
    cls = getattr(heads, name)
    plain = spread(GPT2(tiny_config())).eval()
    plain.bfloat16().save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="model.checkpoints.pretrained"):
        ours = cls.from_pretrained(tmp_path, num_labels=3, hidden_dropout=0.2)
    new = [key for key in ours.state_dict() if key.startswith(cls.head_name)]
    assert [record.getMessage() for record in caplog.records] == [
        f"{name}.from_pretrained: {', '.join(new)}: not in the checkpoint, so new; to be trained"
    ]
    state = ours.state_dict()
    for key in new:
        if key.endswith("bias"):
            assert not state[key].any()
        else:
            assert 0.01 < state[key].float().std() < 0.03
    assert all(p.requires_grad and p.dtype == torch.bfloat16 and not p.is_meta for p in ours.parameters())
    assert ours.config.num_labels == (1 if name == DOUBLE else 3)
    assert torch.equal(state["transformer.wte.weight"], plain.transformer.wte.weight)


def test_what_else_a_checkpoint_lacks_is_an_error(tmp_path):
    ours = heads.GPT2ForTokenClassification(tiny_config())
    ours.classifier.bias = None
    ours.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the checkpoint lacks classifier\.bias"):
        heads.GPT2ForTokenClassification.from_pretrained(tmp_path)
    ours.classifier.bias = torch.nn.Parameter(torch.zeros(2))
    ours.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"wrong shapes: classifier\.weight \(2, 48\), the config asks for \(5, 48\)"):
        heads.GPT2ForTokenClassification.from_pretrained(tmp_path, num_labels=5)
    del ours.transformer.ln_f
    ours.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the checkpoint lacks transformer\.ln_f\.weight"):
        heads.GPT2ForSequenceClassification.from_pretrained(tmp_path)


IDS = torch.zeros(2, 4, dtype=torch.long)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (SEQUENCE, {}, "give input_ids or inputs_embeds"),
        (SEQUENCE, {"input_ids": IDS}, r"2 rows without attention_mask, and config\.pad_token_id is None; .* required"),
        (SEQUENCE, {"inputs_embeds": torch.zeros(2, 4, 48)}, "2 rows without attention_mask"),
        (SEQUENCE, {"input_ids": IDS[:1], "labels": torch.tensor([2])}, "labels range from 2 to 2; .* below 2"),
        (SEQUENCE, {"input_ids": IDS[:1], "labels": IDS}, r"labels has shape \(2, 4\); it must be \(1,\) or \(1, 1\)"),
        (
            SEQUENCE,
            {"input_ids": IDS[:1], "labels": torch.ones(1, 3)},
            r"labels has shape \(1, 3\); it must be \(1, 2\)",
        ),
        (TOKEN, {"input_ids": IDS, "labels": IDS[:1]}, r"labels has shape \(1, 4\); it must be \(2, 4\)"),
        (TOKEN, {"input_ids": IDS, "labels": IDS.float()}, r"labels are torch\.float32; they must be integers"),
        (TOKEN, {"input_ids": IDS, "labels": IDS - 1}, "labels range from -1 to -1; they must be at least 0"),
        (ANSWER, {"input_ids": IDS, "start_positions": IDS[:, 0]}, "start_positions came alone; give start_positions"),
        (ANSWER, {"input_ids": IDS, "end_positions": IDS[:, 0]}, "end_positions came alone"),
        (ANSWER, {"input_ids": IDS, "start_positions": IDS[0], "end_positions": IDS[0]}, r"has shape \(4,\)"),
        (DOUBLE, {"input_ids": IDS[0]}, r"input_ids must be \[B, T\]; its shape is \(4,\)"),
        (DOUBLE, {"input_ids": IDS, "labels": IDS[:1]}, r"labels has shape \(1, 4\)"),
        (DOUBLE, {"input_ids": IDS, "mc_token_ids": IDS[0]}, r"mc_token_ids has shape \(4,\); it must be \(2,\)"),
        (DOUBLE, {"input_ids": IDS, "mc_token_ids": IDS[:, 0] + 4}, "mc_token_ids range from 4 to 4; .* below 4"),
        (DOUBLE, {"input_ids": IDS, "mc_labels": IDS[0]}, "4 mc_labels came; there must be one for each of 1"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_refuses_wrong_arguments(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(heads, name)(tiny_config())(**arguments)


def test_refuses_what_the_config_cannot_mean():
    with pytest.raises(ValueError, match="summary_activation='sigmoid' is not supported; choose one of gelu_new"):
        heads.GPT2DoubleHeadsModel(tiny_config(summary_activation="sigmoid"))
    with pytest.raises(ValueError, match=r"need one score for each choice, but mc_logits are \(2, 48\); set summary_"):
        heads.GPT2DoubleHeadsModel(tiny_config(summary_use_proj=False))(IDS, mc_labels=torch.tensor([1]))
    with pytest.raises(ValueError, match="num_labels is 0; it must be from 1 to"):
        heads.GPT2ForTokenClassification(tiny_config(num_labels=0))
    with pytest.raises(ValueError, match="classifier_dropout is 2; it must be between 0 and 1"):
        GPT2Config(classifier_dropout=2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'mc_labels'"):
        heads.GPT2ForTokenClassification(tiny_config())(IDS, mc_labels=IDS)
