"""One micro-batch on several devices: each has some of the heads and some of the MLP's columns, by torch's DTensor.

Shoeybi et al. 2019, "Megatron-LM", section 3. The packed projection's weight [C, 3C] is three [C, C], each of which is
split by heads; so a process has the packed projection of its own heads, and computes with the kernels as ever. What
goes into attention and MLP is the same everywhere, what comes out is summed: two sums forward and two backward a block.
Embeddings, norms, biases behind a sum and the residual stream are everywhere whole.
"""

from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

BY_HEADS = {"split_factor": 3}  # q, k and v, each split by itself
PLAN = {  # of weight and bias; what is not named is whole
    ("attn", "c_attn"): (_StridedShard(1, **BY_HEADS), _StridedShard(0, **BY_HEADS)),
    ("attn", "c_proj"): (Shard(0), Replicate()),
    ("mlp", "c_fc"): (Shard(1), Shard(0)),
    ("mlp", "c_proj"): (Shard(0), Replicate()),
}


def split_by_heads(model: Any, mesh: DeviceMesh) -> None:
    """Makes DTensors of a GPT2's parameters, and sums what attention and MLP give. precision.Held computes with them.

    Raises ValueError where heads or columns do not divide, and for dropout, which processes would draw alike.
    """
    config, size = model.config, mesh.size()
    for name, number in (("n_head", config.n_head), ("n_inner", config.inner_dim)):
        if number % size:
            raise ValueError(f"training: {size} processes split the model; its {name} {number} is no multiple of it")
    if config.embd_pdrop or config.attn_pdrop or config.resid_pdrop:
        raise ValueError("training: a model whose tensors are split has no dropout; set it to 0")
    placements: dict = {}
    for block in model.transformer.h:
        for (part, layer), (of_weight, of_bias) in PLAN.items():
            linear = getattr(getattr(block, part), layer)
            placements |= {linear.weight: of_weight, linear.bias: of_bias}
        block.attn.num_heads //= size
        for part in (block.attn, block.mlp):
            part.register_forward_pre_hook(lambda part, args: (_summed_backward(args[0], mesh), *args[1:]))
            part.register_forward_hook(lambda part, args, output: _summed(output, mesh))
    split: dict = {}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                if weight not in split:  # a tied one once
                    placement = placements.get(weight, Replicate())
                    split[weight] = torch.nn.Parameter(distribute_tensor(weight.detach(), mesh, [placement]))
                module._parameters[name] = split[weight]
    for block in model.transformer.h:
        for (part, layer), (_, of_bias) in PLAN.items():
            if of_bias == Replicate():
                getattr(getattr(block, part), layer).bias.is_summed_by = size


def local(weight):
    """A DTensor's part of this process; of a bias that is summed, its share. Gradients come whole."""
    part = weight.to_local()
    number = getattr(weight, "is_summed_by", 1)
    return part if number == 1 else part - part.detach() * (1 - 1 / number)


def _summed_backward(x, mesh):
    return DTensor.from_local(x, mesh, [Replicate()], run_check=False).to_local(grad_placements=[Partial()])


def _summed(output, mesh):
    if isinstance(output, tuple):
        return (_summed(output[0], mesh), *output[1:])
    return DTensor.from_local(output, mesh, [Partial()], run_check=False).redistribute(mesh, [Replicate()]).to_local()
