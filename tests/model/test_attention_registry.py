"""A backend does what it declares and nothing else; what it cannot do is refused before anything is computed."""

import re
from pathlib import Path

import pytest
import torch
from lanes import across_lanes
from peers import spread, tiny_config

import model.attention
from kernels import reference
from model import GPT2
from model.attention import attention, attention_backends, get_attention, register_attention, registry

README = Path(__file__).parents[2] / "model/README.md"
IDS = torch.tensor([[5, 17, 80, 3, 41, 2, 9]])
EVERY_CAPABILITY = dict.fromkeys(("padding", "dropout", "unequal_lengths", "upcast", "weights"), True)


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_BACKENDS", dict(registry._BACKENDS))


def tiny(backend, **fields):
    return spread(GPT2(tiny_config(**fields), attn_implementation=backend)).eval()


def readme_example():
    """Runs the README's example, with the definition of attention for its kernel."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    [block] = [block for block in blocks if "register_attention" in block]
    block = block.replace("torch.float16", "torch.float32")  # a model in fp32 is told apart from another more sharply

    def my_kernel(q, k, v, scale, causal):
        return reference.attention(q, k, v, scale=scale, causal=causal)[0]

    exec(block, {"torch": torch, "my_kernel": my_kernel})


class TestTheReadmesExample:
    """Regression: it trained without dropout and decoded with the wrong mask, silently."""

    def test_computes_what_the_other_backends_compute(self):
        readme_example()
        model = tiny("mine", scale_attn_by_inverse_layer_idx=True)
        out = model(IDS).logits
        model.set_attn_implementation("eager")
        torch.testing.assert_close(out, model(IDS).logits)

    @pytest.mark.parametrize(
        ("use", "refused"),
        [
            (lambda model: model.train()(IDS), "attention dropout"),
            (lambda model: model(IDS, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1, 1]])), "padding"),
            (lambda model: model.generate(IDS, max_new_tokens=3), "queries and keys of different lengths"),
            (lambda model: model(IDS, output_attentions=True), r"attention weights \(output_attentions=True\)"),
        ],
        ids=["training", "padding", "decoding", "weights"],
    )
    def test_refuses_the_rest(self, use, refused):
        readme_example()
        with pytest.raises(ValueError, match=f"'mine' does not support {refused}; backends that could .*: eager"):
            use(tiny("mine"))

    def test_refuses_upcast_scores(self):
        readme_example()
        model = tiny("mine", reorder_and_upcast_attn=True)
        with pytest.raises(ValueError, match="'mine' does not support upcast scores"):
            model(IDS)


def test_a_backend_is_given_the_options_that_it_declares():
    given = []
    for what in EVERY_CAPABILITY:

        @register_attention(what, **{what: True})
        def record(q, k, v, **options):
            given.append(set(options) - {"scale", "causal"})
            return q, None

        attention(*[torch.zeros(1, 1, 3, 8)] * 3, backend=what)
    assert given == [{"kv_start", "kv_end"}, {"dropout_p"}, {"q_start"}, {"upcast"}, {"return_weights"}]


def test_a_projection_is_given_the_options_that_it_declares():
    def read_in_place(qkv, num_heads, *, scale):
        return qkv[..., :16]

    @register_attention("packed", projection=read_in_place)
    def forward(q, k, v, *, scale, causal):
        pytest.fail("not asked for")

    assert model.attention.self_attention(torch.zeros(1, 3, 48), 2, backend="packed").shape == (1, 3, 16)
    with pytest.raises(TypeError, match=r"projection of 'padded' takes \(qkv, num_heads, \*, scale\).*'kv_start'"):
        register_attention("padded", projection=read_in_place, padding=True)(lambda q, k, v, **options: q)


@pytest.mark.parametrize("what", EVERY_CAPABILITY)
def test_a_function_that_cannot_take_what_it_declares_is_refused(what):
    def plain(q, k, v, *, scale, causal):
        return q, None

    option = registry._OPTIONS[what][0]
    message = rf"the function of 'bold' takes \(q, k, v, \*, scale, causal\), .* unexpected keyword argument '{option}'"
    with pytest.raises(TypeError, match=message):
        register_attention("bold", **{what: True})(plain)
    assert "bold" not in attention_backends()


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (lambda q, k, v, *, scale: q, "unexpected keyword argument 'causal'"),
        (lambda q, k, v, *, scale, causal, dropout_p: q, "missing a required argument: 'dropout_p'"),
        (lambda q, k, *, scale, causal: q, "too many positional arguments"),
        ("mine", "the function of 'odd' is 'mine'; it must be a function"),
    ],
    ids=["no-causal", "more-than-declared", "no-v", "no-function"],
)
def test_a_function_that_cannot_be_called_is_refused(function, error):
    with pytest.raises(TypeError, match=error):
        register_attention("odd")(function)


def test_a_backend_may_declare_the_only_head_dims_that_it_has():
    request = {"device": "cpu", "dtype": torch.float16}
    backend = get_attention("triton-hopper")
    assert backend.refusal(**request, head_dim=128) is None
    assert backend.refusal(**request, head_dim=80) == "head_dim 80 (it computes 64, 128)"


@pytest.mark.parametrize(
    ("capabilities", "error"),
    [
        ({"paddding": True}, "'mine' declares 'paddding', which is no capability; choose from projection, devices,"),
        ({"forward": print}, "'mine' declares 'forward', which is no capability"),
        ({"padding": 1}, "'mine' declares padding=1; it must be True or False"),
        ({"devices": "cuda"}, "'mine' declares devices='cuda'; it must be a tuple of str"),
        ({"dtypes": ("float16",)}, r"'mine' declares dtypes=\('float16',\); it must be a tuple of dtype"),
        ({"dtypes": torch.float16}, "declares dtypes=torch.float16; it must be a tuple of dtype"),
        ({"max_head_dim": 0}, "'mine' declares max_head_dim=0; it must be a positive integer or None"),
        ({"max_head_dim": True}, "declares max_head_dim=True; it must be a positive integer"),
        ({"head_dims": (64, "128")}, r"declares head_dims=\(64, '128'\); it must be a tuple of int"),
        ({"projection": "packed"}, "'mine' declares projection='packed'; it must be a function or None"),
    ],
    ids=lambda value: "-".join(map(str, value.items())) if isinstance(value, dict) else "",
)
def test_wrong_capabilities_are_refused(capabilities, error):
    with pytest.raises(TypeError, match=f"register_attention: .*{error}"):
        register_attention("mine", **capabilities)


def test_wrong_names_are_refused():
    def mine(q, k, v, *, scale, causal):
        return q, None

    with pytest.raises(TypeError, match=r"register_attention: name is <function .*as in @register_attention\('mine'\)"):
        register_attention(mine)
    with pytest.raises(ValueError, match="'auto' is the registry's own choice"):
        register_attention("auto")
    with pytest.raises(ValueError, match="'sdpa' is already registered; pass replace=True"):
        register_attention("sdpa")
    register_attention("sdpa", replace=True)(mine)
    assert get_attention("sdpa").forward is mine


def test_what_the_cpu_cannot_run_is_not_recommended():
    """Regression: a refusal on a CPU recommended triton, which then refused the CPU."""
    q = torch.zeros(1, 1, 3, 8)
    with pytest.raises(ValueError, match=r"'flex' does not support device cpu .*could serve it: eager, sdpa$"):
        attention(q, q, q, backend="flex")


@across_lanes(lanes=("interpret", "sm_90"))
def test_triton_is_recommended_where_it_runs(lane):
    q = torch.zeros(1, 1, 3, 8)
    with pytest.raises(ValueError, match=r"could serve it: eager, sdpa, triton, triton-portable$"):
        attention(q, q, q, backend="flex")


def test_auto_takes_a_backend_that_gives_weights_where_weights_are_wanted():
    """Regression: auto refused output_attentions in the name of sdpa, which nobody had chosen."""
    model = tiny("auto")
    output = model(IDS, output_attentions=True)
    model.set_attn_implementation("eager")
    expected = model(IDS, output_attentions=True)
    torch.testing.assert_close(output.logits, expected.logits)
    for weights, wanted in zip(output.attentions, expected.attentions, strict=True):
        assert torch.equal(weights, wanted)
