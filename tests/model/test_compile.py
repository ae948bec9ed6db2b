"""torch.compile traces the whole model, kernels and all, without a graph break, and gives the same bits."""

import pytest
import torch
from lanes import across_lanes

from model import GPT2, GPT2Config


@across_lanes(lanes=("interpret", "gpu"))
@pytest.mark.parametrize("pdrop", [0.0, 0.1], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_training_step_is_one_graph(lane, kernels, pdrop):
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
        loss = call(ids, labels=ids).loss
        return loss, *torch.autograd.grad(loss, list(model.parameters()))

    for eager, traced in zip(step(model), step(compiled)):
        assert torch.equal(eager, traced)
