"""Our kernels inside transformers' models: what their own attention computes, or a refusal with its reason."""

import numerics
import pytest
import torch
from lanes import across_lanes
from optional import Optional, transformers
from peers import their_config, tiny_config

ours = Optional("model.integrations.transformers")
NAME = "triton_flash"
F32 = torch.float32
LENGTHS = [9, 4, 7]


@pytest.fixture(autouse=True)
def _registered():
    assert transformers.GPT2Config  # or the test is skipped
    ours.register()


def theirs(lane, *, attn, **fields):
    torch.manual_seed(0)
    config = their_config(tiny_config(n_layer=2, **fields), attn_implementation=attn)
    return transformers.GPT2LMHeadModel(config).to(lane.device).eval()


def llama(lane, *, attn, **fields):
    torch.manual_seed(0)
    values = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    values |= {"num_key_value_heads": 2, "vocab_size": 101, "max_position_embeddings": 64, "pad_token_id": 0}
    config = transformers.LlamaConfig(**{**values, **fields}, attn_implementation=attn)
    return transformers.LlamaForCausalLM(config).to(lane.device).eval()


def batch(lane, side):
    torch.manual_seed(1)
    ids, T = torch.randint(1, 101, (3, 9)), torch.arange(9)
    if side is None:
        return ids.to(lane.device), None
    lengths = torch.tensor(LENGTHS)[:, None]
    mask = (lengths > T if side == "right" else lengths >= 9 - T).long()
    return (ids * mask).to(lane.device), mask.to(lane.device)


def results(model, ids, mask):
    """Logits of the tokens, the loss over them, and all gradients. What a padded query says counts nowhere."""
    labels = ids
    if mask is not None:
        is_first = (mask.cumsum(1) == 1) & (mask == 1)
        labels = ids.masked_fill((mask == 0) | is_first, -100)
    out = model(ids, attention_mask=mask, labels=labels)
    model.zero_grad()
    out.loss.backward()
    logits = out.logits if mask is None else out.logits[mask.bool()]
    return [logits.detach(), out.loss.detach(), *(p.grad for p in model.parameters())]


def assert_same(found, baseline, oracle):
    for fused, plain, exact in zip(found, baseline, oracle):
        numerics.assert_gradient_close(fused, plain, exact, beside=(oracle[0] * 0.02,))


@across_lanes(F32, lanes=("interpret", "sm_90", "gpu"))
@pytest.mark.parametrize("side", [None, "right", "left"])
@pytest.mark.parametrize("build", [theirs, llama])
def test_logits_loss_and_gradients_are_their_attentions(lane, dtype, build, side):
    ids, mask = batch(lane, side)
    fused, plain = build(lane, attn=NAME), build(lane, attn="eager")
    assert fused.config._attn_implementation == NAME
    exact = build(lane, attn="eager").double()
    assert_same(*(results(model, ids, mask) for model in (fused, plain, exact)))


@across_lanes(F32, lanes=("interpret", "sm_90", "gpu"))
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 2}], ids=str)
@pytest.mark.parametrize("build", [theirs, llama])
def test_generation_with_their_caches(lane, dtype, build, options):
    ids, mask = batch(lane, "left")
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "disable_compile": True, **options}
    said = [build(lane, attn=name).generate(ids, attention_mask=mask, **options) for name in (NAME, "eager")]
    assert torch.equal(*said)


@across_lanes(F32, lanes=("interpret", "sm_90", "gpu"))
@pytest.mark.parametrize("side", [None, "right"])
def test_a_patched_gpt2_computes_what_it_computed(lane, dtype, side):
    ids, mask = batch(lane, side)
    patched, plain, exact = (theirs(lane, attn="eager") for _ in range(3))
    patched.set_attn_implementation(NAME)
    before = {name: module.forward for name, module in patched.named_modules()}
    patch = ours.patch_gpt2(patched)
    found = results(patched, ids, mask)
    assert_same(found, results(plain, ids, mask), results(exact.double(), ids, mask))
    patch.undo()
    patch.undo()
    assert {name: module.forward for name, module in patched.named_modules()} == before
    patched.set_attn_implementation("eager")
    assert all(map(torch.equal, results(patched, ids, mask), results(plain, ids, mask)))


@across_lanes(F32, lanes=("interpret", "gpu"))
def test_a_patched_gpt2_trains(lane, dtype):
    """Five steps of AdamW, and generation after them."""
    ids, _ = batch(lane, None)
    losses = []
    for attn in (NAME, "sdpa"):
        model = theirs(lane, attn=attn, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()
        patch = ours.patch_gpt2(model) if attn == NAME else ours.Patch()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(5):
            loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append((loss.item(), model.eval().generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)))
        patch.undo()
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-4)
    assert torch.equal(losses[0][1], losses[1][1])


@across_lanes(F32, lanes=("interpret", "gpu"))
def test_what_stands_in_a_modules_place_is_called(lane, dtype):
    """A hook on ln_2 or c_fc, and a module of another class, as adapters put there, see what they saw before."""
    ids, _ = batch(lane, None)

    class Adapted(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x) * 1.5

    for change in ("ln_2", "c_fc", "adapter"):
        logits, seen = [], []
        for is_patched in (True, False):
            model = theirs(lane, attn="eager")
            patch = ours.patch_gpt2(model) if is_patched else ours.Patch()
            block = model.transformer.h[1]
            if change == "adapter":
                block.mlp.c_fc = Adapted(block.mlp.c_fc)
            else:
                module = block.ln_2 if change == "ln_2" else block.mlp.c_fc
                module.register_forward_hook(lambda module, args, y, seen=seen: seen.append(y) or y + 1)
            with torch.no_grad():
                logits.append(model(ids).logits)
            patch.undo()
        assert len(seen) == (0 if change == "adapter" else 2)
        assert torch.allclose(*logits, atol=1e-5)


def test_other_models_are_not_patched():
    class Lane:
        device = "cpu"

    with pytest.raises(TypeError, match="model is LlamaForCausalLM; a GPT-2 of transformers is required"):
        ours.patch_gpt2(llama(Lane, attn="eager"))


def bidirectional_mask_function(batch, head, query, key):
    """transformers has one of this name where encoders' masks go through its interface."""
    return True


class TestBounds:
    def test_nothing_is_made_where_nothing_is_padded(self):
        for mask in (None, torch.ones(2, 5, dtype=torch.bool)):
            assert ours.bounds(2, 5, 5, attention_mask=mask) is None
            assert ours.bounds(2, 1, 5, q_offset=4, attention_mask=mask) is None

    def test_padding_and_a_static_cache(self):
        mask = torch.tensor([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
        assert ours.bounds(2, 2, 5, q_offset=3, attention_mask=mask)[:, 0, 0].tolist() == [[3, 1, 4], [3, 0, 5]]
        assert ours.bounds(2, 1, 8, q_offset=4, attention_mask=mask)[:, 0, 0].tolist() == [[4, 1, 4], [4, 0, 5]]
        assert ours.bounds(2, 3, 8, q_offset=0, device="cpu")[:, 0, 0].tolist() == [[0, 0, 8]] * 2

    def test_full_attention_stands_after_all_keys(self):
        mask = torch.tensor([[0, 1, 1, 1, 0]])
        full = bidirectional_mask_function
        assert ours.bounds(1, 5, 5, mask_function=full) is None
        assert ours.bounds(1, 5, 5, mask_function=full, attention_mask=mask)[:, 0, 0].tolist() == [[5, 1, 4]]

    def test_transformers_4_gives_positions(self):
        mask = torch.tensor([[0, 1, 1]])
        assert ours.bounds(1, cache_position=torch.tensor([1, 2]), kv_length=3, attention_mask=mask)[
            :, 0, 0
        ].tolist() == [[1, 1, 3]]

    def test_other_masks_are_refused(self):
        with pytest.raises(ValueError, match="row 0 has a hole"):
            ours.bounds(1, 3, 3, attention_mask=torch.tensor([[1, 0, 1]]))
        with pytest.raises(ValueError, match="the model masks by and_mask, which is neither"):
            ours.bounds(1, 3, 3, mask_function=transformers.masking_utils.sliding_window_causal_mask_function(2))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"softcap": 30.0}, "softcap=30"),
        ({"sliding_window": 4}, "sliding_window=4"),
        ({"output_attentions": True}, "output_attentions needs the weights"),
        ({"attention_mask": torch.zeros(2, 1, 4, 4)}, r"a mask \(2, 1, 4, 4\) of torch.float32 of its own"),
    ],
    ids=str,
)
def test_what_the_kernels_do_not_do_is_named(options, words):
    q = torch.zeros(2, 3, 4, 16)
    with pytest.raises(ValueError, match=f"triton_flash: .*{words}"):
        ours.attention(torch.nn.Module(), q, q, q, **{"attention_mask": None, **options})


@across_lanes(F32, lanes=("interpret", "sm_90", "gpu"))
def test_bounds_decide_what_is_causal(lane, dtype):
    """transformers 4's GPT-2 says is_causal=False wherever it was given a mask; bounds of full attention say so."""
    q, k, v = (torch.randn(2, 2, 6, 16, device=lane.device) for _ in range(3))
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]], device=lane.device)
    full = bidirectional_mask_function
    for options, visible in (({}, torch.ones(6, 6).tril()), ({"mask_function": full}, torch.ones(6, 6))):
        bounds = ours.bounds(2, 6, 6, attention_mask=mask, device=lane.device, **options)
        o, _ = ours.attention(torch.nn.Module(), q, k, v, bounds, is_causal=False)
        seen = (visible.to(lane.device).bool() & mask[:, None, None].bool()).double()
        p = (q.double() @ k.double().mT / 4).exp() * seen
        expected = (p / p.sum(-1, keepdim=True).clamp(min=1e-30)) @ v.double()
        assert torch.allclose(o.transpose(1, 2).double(), expected, atol=1e-5)


def test_sliding_windows_of_a_model_are_refused():
    class Lane:
        device = "cpu"

    config = transformers.MistralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=101, sliding_window=4, attn_implementation=NAME,
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config)
    with pytest.raises(ValueError, match="the model masks by and_mask"):
        model(torch.arange(9)[None])
