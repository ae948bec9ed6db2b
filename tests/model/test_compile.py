"""torch.compile and torch.export trace the whole model without a graph break, and it computes what it does eagerly."""

import shutil

import pytest
import torch
from lanes import across_lanes
from peers import padded_batch, spread, tiny_config
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch.utils import _pytree as pytree

from model import GPT2, GPT2Config, GPT2ForQuestionAnswering, GPT2ForSequenceClassification, outputs
from model.layers.blocks import Blocks


@across_lanes(lanes=("interpret", "gpu"))
@pytest.mark.parametrize("pdrop", [0.0, 0.1], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("logits", [True, False], ids=["logits", "no logits"])
def test_a_training_step_is_one_graph(lane, kernels, pdrop, logits, monkeypatch):
    """Beside the modules, which are what is traced; tests/model/test_block.py holds blocks of launches against them."""
    monkeypatch.setattr(Blocks, "of", classmethod(lambda cls, *arguments, **options: None))
    torch._dynamo.reset()
    config = GPT2Config(
        n_layer=2,
        n_head=2,
        n_embd=32,
        n_positions=64,
        vocab_size=100,
        attn_pdrop=pdrop,
        resid_pdrop=pdrop,
        embd_pdrop=0.0,
    )
    model = GPT2(config, attn_implementation="triton", kernel_implementation=kernels).to(lane.device).train()
    ids = torch.randint(100, (2, 20), device=lane.device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")

    def step(call):
        torch.manual_seed(1)
        loss = call(ids, labels=ids, return_logits=logits).loss
        return loss, *torch.autograd.grad(loss, list(model.parameters()))

    for eager, traced in zip(step(model), step(compiled)):
        assert torch.equal(eager, traced)


@across_lanes(lanes=("interpret", "gpu"))
def test_reduce_overhead_replays_a_step_as_cuda_graphs(lane):
    """Warm-up, recording, two replays on other ids: the losses and gradients of each, and no graph is passed over.

    Without a GPU there are no CUDA graphs, and the rest of inductor is held: its passes, and its plan for memory, in
    code that calls PyTorch's operations and ours; C++ for them would take half a minute to compile.
    """
    torch.compiler.reset()
    counters["inductor"].clear()
    on_gpu = lane.device != "cpu"
    rates = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0)
    config = GPT2Config(n_layer=1, n_head=2, n_embd=32, n_positions=64, vocab_size=100, **rates)
    model = GPT2(config, attn_implementation="triton", kernel_implementation="triton").to(lane.device).train()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)

    def step(call, ids):
        if call is compiled:
            torch.compiler.cudagraph_mark_step_begin()  # results of the step before may be written over
        loss = call(ids, labels=ids, return_logits=False).loss
        return [x.clone() for x in (loss, *torch.autograd.grad(loss, list(model.parameters())))]

    with inductor_config.patch(fallback_by_default=not on_gpu):
        for _ in range(4 if on_gpu else 2):
            ids = torch.randint(100, (2, 20) if on_gpu else (1, 5), device=lane.device)
            for found, expected in zip(step(compiled, ids), step(model, ids)):
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert counters["inductor"]["extern_calls"] > 0
    assert counters["inductor"]["cudagraph_skips"] == (0 if on_gpu else 1)  # "cpu device", and nothing before that


PADDINGS = ["none", "left"]


def inputs(lengths, T, padding):
    ids, mask = padded_batch(101, lengths, T, side="right" if padding == "none" else padding)
    return {"input_ids": ids} if padding == "none" else {"input_ids": ids, "attention_mask": mask}


def assert_same_logits(found, expected, attention_mask=None, **_):
    valid = ... if attention_mask is None else attention_mask.bool()
    torch.testing.assert_close(found.logits[valid], expected.logits[valid], rtol=0, atol=1e-5)
    assert type(found) is type(expected)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
class TestWithoutAutograd:
    """oneDNN's products, the default cache and reading the mask were a graph break each."""

    @torch.no_grad()
    def test_a_forward_pass_is_one_graph_for_all_sizes(self, backend, padding):
        torch._dynamo.reset()
        model = spread(GPT2(tiny_config(n_layer=1), attn_implementation=backend)).eval()
        compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
        for lengths, T in (([7, 4], 7), ([11, 11, 2], 11)):
            given = inputs(lengths, T, padding)
            assert_same_logits(compiled(**given), model(**given), **given)

    @torch.no_grad()
    def test_an_exported_model_takes_all_sizes(self, backend, padding):
        model = spread(GPT2(tiny_config(n_layer=1), attn_implementation=backend)).eval()
        B, T = torch.export.Dim("B", max=64), torch.export.Dim("T", min=2, max=64)
        given = inputs([7, 4], 7, padding)
        program = torch.export.export(model, (), given, dynamic_shapes={name: {0: B, 1: T} for name in given})
        for other in (given, inputs([1, 13, 9], 13, padding)):
            assert_same_logits(program.module()(**other), model(**other), **other)


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="AOTInductor needs a C++ compiler")
@torch.no_grad()
def test_a_compiled_package_takes_all_sizes(tmp_path):
    """AOTInductor on a CPU: the file that it writes needs neither the model's code nor its weights' file."""
    model = spread(GPT2(tiny_config(n_layer=1), attn_implementation="sdpa")).eval()
    B, T = torch.export.Dim("B", max=64), torch.export.Dim("T", min=2, max=64)
    given = inputs([7, 4], 7, "left")
    program = torch.export.export(model, (), given, dynamic_shapes={name: {0: B, 1: T} for name in given})
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "gpt2.pt2"))
    compiled = torch._inductor.aoti_load_package(path)
    for other in (given, inputs([1, 13, 9], 13, "left")):
        assert_same_logits(compiled(**other), model(**other), **other)


@pytest.mark.parametrize("cls", [GPT2ForSequenceClassification, GPT2ForQuestionAnswering])
@torch.no_grad()
def test_other_heads_are_exported(cls):
    model = spread(cls(tiny_config(n_layer=1, pad_token_id=0))).eval()
    given = inputs([7, 4], 7, "right")
    T = torch.export.Dim("T", min=2, max=64)
    program = torch.export.export(model, (), given, dynamic_shapes={name: {1: T} for name in given})
    given = inputs([9, 2], 9, "right")
    valid = given["attention_mask"].bool()
    for name, found in program.module()(**given).items():
        expected = model(**given)[name]
        rows = ... if found.shape != valid.shape else valid
        torch.testing.assert_close(found[rows], expected[rows], rtol=0, atol=1e-5)


OUTPUTS = [cls for cls in vars(outputs).values() if isinstance(cls, type) and issubclass(cls, outputs.ModelOutput)]


@pytest.mark.parametrize("cls", [cls for cls in OUTPUTS if cls is not outputs.ModelOutput])
def test_outputs_are_pytrees(cls):
    names = list(cls.__dataclass_fields__)
    output = cls(**{names[0]: torch.ones(2), names[-1]: (torch.zeros(3),)})
    doubled = pytree.tree_map(lambda tensor: 2 * tensor, output)
    assert type(doubled) is cls
    assert list(doubled) == [names[0], names[-1]]  # what was None still is
    assert torch.equal(doubled[0], 2 * output[0])
    spec = pytree.tree_structure(output)
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec  # as torch.export.save writes it
