"""What the tests of the row-wise kernels share: gradients of an op, the tolerance rule over all of them."""

import numerics
import torch


def with_gradients(function, inputs, output_gradients):
    """The outputs of function(*inputs) and the gradients of its floating inputs, in two tuples."""
    inputs = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = [x for x in inputs if x.is_floating_point()]
    gradients = torch.autograd.grad(outputs, leaves, output_gradients)
    return tuple(y.detach() for y in outputs), gradients


def check_against_oracle(function, plain, inputs, output_gradients, beside=()):
    """The tolerance rule for every output and every gradient; plain is the same op of kernels.reference.

    beside: of the gradients' terms, where they cancel; see numerics.py.
    """

    def wide(tensors):
        return [x.double() if x.is_floating_point() else x for x in tensors]

    ours, our_gradients = with_gradients(function, inputs, output_gradients)
    baseline, baseline_gradients = with_gradients(plain, inputs, output_gradients)
    oracle, oracle_gradients = with_gradients(plain, wide(inputs), wide(output_gradients))
    for i, triple in enumerate(zip(ours, baseline, oracle)):
        numerics.assert_close(*triple, what=f"output {i}")
    for i, triple in enumerate(zip(our_gradients, baseline_gradients, oracle_gradients)):
        numerics.assert_gradient_close(*triple, what=f"gradient {i}", beside=beside)


def assert_bit_identical(first, second):
    """Both are what with_gradients returns."""
    for one, other in zip((*first[0], *first[1]), (*second[0], *second[1])):
        assert torch.equal(one, other)


def poisoned():
    """torch.empty gives NaN while this fixture's body waits, so that an element no kernel wrote cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
