"""kernel_implementation: the same model by our kernels and by PyTorch's, and what a step then launches."""

import pytest
import torch
from lanes import across_lanes
from torch.utils._python_dispatch import TorchDispatchMode

from bench.lib.live_bytes import LiveBytes
from model import GPT2, GPT2Config

SIZES = {"n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 32, "vocab_size": 101}
NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}


def model_and_tokens(device="cpu", **options):
    torch.manual_seed(0)
    model = GPT2(GPT2Config(**SIZES, **(NO_DROPOUT | options)), attn_implementation="triton").to(device)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model, torch.randint(SIZES["vocab_size"], (2, 9), device=device)


def step(model, tokens, name, **options):
    """Logits (or None), loss and all gradients of a training step."""
    model.set_kernel_implementation(name)
    model.zero_grad()
    output = model(tokens, labels=tokens, **options)
    output.loss.backward()
    return output.logits, output.loss, {key: p.grad.clone() for key, p in model.named_parameters()}


@across_lanes(lanes=("interpret", "sm_90", "gpu"))
def test_triton_and_torch_give_the_same_step(lane):
    model, tokens = model_and_tokens(lane.device)
    ours, theirs = (step(model, tokens, name) for name in ("triton", "torch"))
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    _, loss, gradients = step(model, tokens, "triton", return_logits=False)
    torch.testing.assert_close((loss, gradients), ours[1:], atol=2e-5, rtol=1e-4)


@across_lanes(torch.float16, lanes=("interpret", "sm_90", "gpu"))
@pytest.mark.parametrize("return_logits", [True, False], ids=["logits", "no logits"])
def test_mixed_precision_goes_through_the_kernels(lane, dtype, return_logits, monkeypatch):
    """Under autocast, where the H100's first steps of training went to PyTorch: no LayerNorm, GELU or loss does, the
    parameters' gradients are fp32, and the step is PyTorch's within what two bytes round."""
    model, tokens = model_and_tokens(lane.device)

    def mixed(name):
        with torch.autocast(lane.device, dtype):
            return step(model, tokens, name, return_logits=return_logits)

    expected = mixed("torch")
    for name in ("layer_norm", "gelu", "cross_entropy"):
        monkeypatch.setattr(torch.nn.functional, name, None)
    logits, loss, gradients = mixed("triton")
    assert loss.dtype == torch.float32
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
    if return_logits:
        assert logits.dtype == dtype
    torch.testing.assert_close((logits, loss), expected[:2], atol=2e-2, rtol=2e-2)
    for name, gradient in gradients.items():
        difference = (gradient - expected[2][name]).norm() / expected[2][name].norm()
        assert difference < 2e-2, f"{name}: {difference:.1e}"


@across_lanes(torch.float16, lanes=("gpu",))
def test_rows_of_wide_logits_begin_on_cache_lines(lane, dtype):
    """And the gradients are those of PyTorch's linear, within the two bytes' rounding."""
    config = GPT2Config(**(SIZES | {"vocab_size": 2001}), **NO_DROPOUT)
    model, tokens = GPT2(config).to(lane.device, dtype), torch.randint(2001, (2, 9), device=lane.device)
    hidden = torch.randn(2, 9, SIZES["n_embd"], device=lane.device, dtype=dtype, requires_grad=True)
    logits = model.lm_head(hidden)
    assert logits.shape == (2, 9, 2001)
    assert logits.stride() == (9 * 2048, 2048, 1)
    expected = torch.nn.functional.linear(hidden, model.lm_head.weight)
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)
    for gradient in (torch.randn_like(logits), torch.randn(2, 9, 2001, device=lane.device, dtype=dtype)):
        ours = torch.autograd.grad(logits, [hidden, model.lm_head.weight], gradient, retain_graph=True)
        theirs = torch.autograd.grad(expected, [hidden, model.lm_head.weight], gradient, retain_graph=True)
        torch.testing.assert_close(ours, theirs, atol=2e-2, rtol=2e-3)
    assert model(tokens, labels=tokens).loss.isfinite()


def test_the_loss_without_logits_is_the_loss_in_plain_pytorch_too():
    model, tokens = model_and_tokens()
    model.transformer.set_attn_implementation("eager")
    logits, *expected = step(model, tokens, "torch")
    none, *actual = step(model, tokens, "torch", return_logits=False)
    assert none is None
    assert logits.shape == (2, 9, 101)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@across_lanes(lanes=("interpret", "gpu"))
def test_hidden_states_do_not_depend_on_who_adds_them_up(lane):
    model, tokens = model_and_tokens(lane.device)
    states = []
    for name in ("triton", "torch"):
        model.set_kernel_implementation(name)
        states.append(model(tokens, output_hidden_states=True).hidden_states)
    assert len(states[0]) == SIZES["n_layer"] + 1
    torch.testing.assert_close(*states, atol=2e-5, rtol=1e-4)


@across_lanes(lanes=("interpret", "gpu"))
def test_residual_dropout_is_inside_the_fused_addition(lane):
    model, tokens = model_and_tokens(lane.device, resid_pdrop=0.5)
    model.set_kernel_implementation("triton")
    trained = [model.train()(tokens).logits for _ in range(2)]
    assert not torch.equal(*trained)
    evaluated = [model.eval()(tokens).logits for _ in range(2)]
    assert torch.equal(*evaluated)


def test_auto_is_torch_on_a_cpu():
    model, tokens = model_and_tokens()
    model.transformer.set_attn_implementation("auto")
    assert torch.equal(step(model, tokens, "auto")[1], step(model, tokens, "torch")[1])


def test_an_unknown_implementation_is_refused():
    message = "kernel_implementation='cuda' is unknown; choose one of: auto, triton, torch"
    with pytest.raises(ValueError, match=message):
        GPT2(GPT2Config(**SIZES), kernel_implementation="cuda")
    model, _ = model_and_tokens()
    with pytest.raises(ValueError, match=message):
        model.set_kernel_implementation("cuda")


def test_from_pretrained_takes_it(tmp_path):
    model, _ = model_and_tokens()
    model.save_pretrained(tmp_path)
    loaded = GPT2.from_pretrained(tmp_path, kernel_implementation="torch")
    assert loaded.transformer.kernel_implementation == "torch"


def peak_of_a_training_step(**options):
    """Bytes at the peak of forward and backward of a narrow GPT-2 at B = 8, T = 1024 with the whole vocabulary."""
    config = GPT2Config(n_embd=64, n_head=1, n_layer=2, **NO_DROPOUT)
    with torch.device("meta"):
        model = GPT2(config, attn_implementation="sdpa", kernel_implementation="torch")
        embeddings, labels = torch.empty(8, 1024, 64), torch.empty(8, 1024, dtype=torch.int64)
    with LiveBytes() as live:
        model(inputs_embeds=embeddings, labels=labels, **options).loss.backward()
    return live.peak


def test_without_logits_the_peak_of_a_training_step_is_below_their_size():
    logits = 4 * 8 * 1024 * 50257
    assert peak_of_a_training_step(return_logits=False) < 0.8 * logits
    assert peak_of_a_training_step() > 2 * logits


# What a step launches


class Launches(TorchDispatchMode):
    """Names, in order, our kernels and every operation of PyTorch that is no view and does not just allocate."""

    SILENT = ("empty", "new_empty", "detach", "alias", "unbind", "_unsafe_view", "_reshape_alias", "lift_fresh")

    def __init__(self, monkeypatch):
        super().__init__()
        from triton.runtime.interpreter import GridExecutor

        self.names = []
        run = GridExecutor.__call__

        def recorded(executor, *args, **kwargs):
            self.names.append(executor.fn.__name__)
            return run(executor, *args, **kwargs)

        monkeypatch.setattr(GridExecutor, "__call__", recorded)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        aliases = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        if function.namespace in ("aten", "mkldnn") and not aliases and not name.startswith(self.SILENT):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


FORWARD_BLOCK = [
    "addmm",  # c_attn
    "_attention_forward_kernel",
    "addmm",  # c_proj
    "_layer_norm_forward_kernel",  # after the residual addition, in one
    "mm",  # c_fc
    "_gelu_forward_kernel",  # after c_fc's bias, in one
    "addmm",  # c_proj
    "_layer_norm_forward_kernel",  # after the residual addition, in one: the next block's norm
]
MATRICES = ["mm", "mm"]  # gradients of a linear layer's input and weight
NORM_BACKWARD = ["_layer_norm_backward_kernel", "_column_sums_kernel"]  # with the residual stream's gradient added
BACKWARD_BLOCK = [
    *NORM_BACKWARD,
    *MATRICES,
    "sum",  # of c_proj's bias
    "_gelu_backward_kernel",
    "_column_sums_kernel",
    *MATRICES,
    *NORM_BACKWARD,
    *MATRICES,
    "sum",
    "_attention_dq_kernel",
    "_attention_dkdv_kernel",
    *MATRICES,
    "sum",
]


@pytest.mark.parametrize("return_logits", [True, False])
def test_a_fully_masked_micro_batch_has_gradients_of_zero(return_logits):
    model, tokens = model_and_tokens()
    model.transformer.set_attn_implementation("eager")
    model(tokens, labels=torch.full_like(tokens, -100), return_logits=return_logits).loss.backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters() if p.grad is not None)


@pytest.mark.interpret
def test_a_training_step_launches_nothing_but_what_is_named_here(monkeypatch):
    model, tokens = model_and_tokens()
    model.set_kernel_implementation("triton")
    launches = Launches(monkeypatch)
    with launches:
        loss = model(tokens, labels=tokens).loss
    assert launches.names == [
        *("embedding", "add"),
        "_layer_norm_forward_kernel",
        *FORWARD_BLOCK * SIZES["n_layer"],
        "mm",  # the head
        "constant_pad_nd",  # the labels, shifted
        *("_count_targets_kernel", "_cross_entropy_forward_kernel", "_reduce_losses_kernel"),
    ]
    launches.names.clear()
    with launches:
        loss.backward()
    assert launches.names == [
        "ones_like",  # the loss' own gradient
        "_cross_entropy_backward_kernel",
        *MATRICES,
        *BACKWARD_BLOCK * SIZES["n_layer"],
        *NORM_BACKWARD,
        "add",  # the residual stream's gradient and that of the first norm's input
        *("sum", "slice_backward"),  # position embeddings
        "embedding_dense_backward",
        "add",  # the head's gradient and the embedding's: one weight
    ]


@pytest.mark.interpret
def test_a_decode_step_launches_nothing_but_what_is_named_here(monkeypatch):
    model, tokens = model_and_tokens()
    model.eval().set_kernel_implementation("triton")
    launches = Launches(monkeypatch)
    with torch.no_grad():
        cache = model(tokens[:1], use_cache=True).past_key_values
        launches.names.clear()
        with launches:
            model(tokens[:1, :1], past_key_values=cache)
    linear = "_linear_pointwise"  # on a CPU without autograd; addmm on a GPU
    block = [
        linear,
        *("copy_", "copy_"),  # k and v, into the cache
        *("_attention_decode_kernel", "_attention_merge_kernel"),
        linear,
        "_layer_norm_forward_kernel",
        "mm",
        "_gelu_forward_kernel",
        linear,
        "_layer_norm_forward_kernel",
    ]
    assert launches.names == [
        *("copy_", "zero_"),  # the cache was full and moves into a larger one
        *("embedding", "add"),
        "_layer_norm_forward_kernel",
        *block * SIZES["n_layer"],
        linear,
    ]
