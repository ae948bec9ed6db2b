"""What int8 weights do to a model: the model with the weights that they stand for, and the error of each layer.

generate(weights="int8") reads the layers' matrices and the head as integers (kernels/decode/pack.py); the forward pass
cannot, but it can compute with the same numbers: so does `python -m model.evaluate text --weights int8`.
"""

import copy

import torch

from kernels.decode import from_int8, to_int8
from model.generation.fused import matrices


def rounded(model):
    """A copy of the model whose matrices and head are what int8 ones stand for; the embeddings stay as they are."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        head = model.lm_head.weight  # the embedding too, if the two are tied
        model.lm_head.weight = torch.nn.Parameter(from_int8(*to_int8(head)).to(head.dtype))
        for block in model.transformer.h:
            for linear in matrices(block):
                linear.out_in().copy_(from_int8(*to_int8(linear.out_in())))
    return model


@torch.no_grad()
def product_errors(model, ids):
    """[{"layer": 0, "qkv": 0.004, "out": ..., "fc": ..., "proj": ...}, ..., {"layer": "head", "head": ...}].

    Of each product x W on the way of ids [B, T] through the model: the norm of x (W_int8 - W) over that of x W in fp64.
    """
    inputs, places = {}, {}
    for i, block in enumerate(model.transformer.h):
        places |= {linear: (i, name) for linear, name in zip(matrices(block), ("qkv", "out", "fc", "proj"))}
    places[model.lm_head] = ("head", "head")

    def keep(linear, given):
        inputs[linear] = given[0].detach()

    hooks = [linear.register_forward_pre_hook(keep) for linear in places]
    try:
        model(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    errors = {}
    for linear, (layer, name) in places.items():
        x, weight = inputs[linear].flatten(0, -2).double(), linear.out_in().double()  # [M, in], [out, in]
        integers, scale = to_int8(linear.out_in())
        difference = integers.double() * scale.double()[:, None] - weight
        error = (x @ difference.t()).norm() / (x @ weight.t()).norm()
        errors.setdefault(layer, {"layer": layer})[name] = float(error)
    return list(errors.values())
