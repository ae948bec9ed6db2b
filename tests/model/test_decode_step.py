"""What one decode step does: the operations dispatched and the bytes allocated, counted."""

from collections import Counter

import pytest
import torch
from peers import tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from model import GPT2
from model.cache import KVCache
from model.generation.graph import DecodeStep


class Counting(TorchDispatchMode):
    """Counts operations that compute or copy, by name, and the bytes of the storages that they bring into being."""

    def __init__(self):
        super().__init__()
        self.operations, self.bytes = Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        known = {_storage(x) for x in _tensors(args)}
        made = {_storage(x): x.nbytes for x in _tensors(outputs) if _storage(x) not in known}
        if made or function._schema.is_mutable:
            self.operations[function.overloadpacket.__name__] += 1
        self.bytes += sum(made.values())
        return outputs


class ByName(TorchDispatchMode):
    """Counts operations other than views, by name, also where there is no memory."""

    def __init__(self):
        super().__init__()
        self.operations = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aliases = [result.alias_info for result in function._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in aliases):
            self.operations[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def _tensors(values):
    if isinstance(values, torch.Tensor):
        return [values] if values.layout == torch.strided else []  # oneDNN's blocks have no storage
    if isinstance(values, list | tuple):
        return [tensor for value in values for tensor in _tensors(value)]
    return []


def _storage(tensor):
    return tensor.untyped_storage().data_ptr()


def count(model, B, held):
    """One step of B rows of which each has `held` tokens in the cache."""
    cache = KVCache(model.config, B, capacity=held + 1)
    with torch.no_grad():
        model(torch.ones(B, held, dtype=torch.long), past_key_values=cache)
        token = torch.ones(B, 1, dtype=torch.long)
        with Counting() as counting:
            model(token, past_key_values=cache, logits_to_keep=1)
    return counting


@pytest.fixture(scope="module")
def model():
    model = GPT2(tiny_config(n_positions=512), attn_implementation="sdpa").eval()
    model.pack_weights()
    return model


def test_one_row(model):
    """A layer: two norms, four products, a GELU, two additions, one write each for k and v, one attention."""
    layers = model.config.n_layer
    counted = count(model, 1, 40).operations
    assert counted.pop("native_layer_norm") == 2 * layers + 1
    assert counted.pop("_linear_pointwise") == 4 * layers + 1
    assert counted.pop("gelu") == layers
    assert counted.pop("add") == 2 * layers + 1  # and token + position
    assert counted.pop("copy_") == 2 * layers
    assert counted.pop("_scaled_dot_product_flash_attention_for_cpu") == layers
    assert counted.pop("embedding") == 1
    assert not counted


def test_a_step_costs_the_same_however_much_is_held(model):
    short, long = count(model, 1, 20), count(model, 1, 480)
    assert short.operations == long.operations
    assert short.bytes == long.bytes


def test_a_step_allocates_its_activations_and_logits_and_no_more(model):
    """Per layer, in units of C: qkv 3, attention 1, projection 1, MLP 4 + 4 + 1, norms and sums 4; all within 20."""
    config = model.config
    for B in (1, 4):
        floats = config.n_layer * 20 * config.n_embd + 4 * config.n_embd + config.vocab_size
        assert count(model, B, 40).bytes <= 4 * 2 * B * floats


def test_the_captured_step_with_our_kernels():
    """Counted on "meta": the operations that a GPU would be given.

    A layer: four products, a GELU with its bias, two additions with their norms, one write each for k and v, and one
    attention (the split-KV kernel and its merge). Once: embeddings, the first norm, the head, where the token goes, and
    the choice of the next one.
    """
    model = GPT2(tiny_config(), attn_implementation="triton", kernel_implementation="triton").to("meta").eval()
    layers = model.config.n_layer
    with torch.no_grad():
        step = DecodeStep(model, 2, 256)
        with ByName() as counted:
            step.run(model)
    counted = counted.operations
    assert counted.pop("addmm") == 3 * layers
    assert counted.pop("mm") == layers + 1  # and the head
    assert counted.pop("bias_gelu_forward") == layers
    assert counted.pop("add_layer_norm_forward") == 2 * layers
    assert counted.pop("index_put_") == 2 * layers
    assert counted.pop("attention_decode") == layers
    assert counted.pop("layer_norm_forward") == 1
    assert counted.pop("embedding") == 2
    assert counted.pop("add") == 3  # token + position; the slot; the end of the row
    assert counted.pop("arange") == 2
    assert counted.pop("_to_copy") == 2
    assert counted.pop("copy_") == 2  # logits; ids
    assert counted.pop("add_") == 1
    choice = {"argmax": 1, "amax": 1, "gt": 1, "bitwise_not": 1, "masked_fill": 2, "sub": 1, "scatter_": 1}
    assert counted == choice
