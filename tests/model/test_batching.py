"""A row of a batch gets what it gets alone: on a CPU to the bit, in each backend, padded on either side or not."""

import copy
import pickle

import pytest
import torch
from lanes import across_lanes
from peers import TALKATIVE, spread, tiny_config

from model import GPT2, GPT2Config
from model.layers import onednn
from model.layers.linear import Conv1D, Head, Linear

PROMPTS = [[5, 17, 80, 2, 9, 11, 63, 40, 3], [7], [20, 21, 22, 20, 21], [90, 1, 90, 1, 90, 33, 2]]


def padded(prompts, side, fill=0):
    T = max(map(len, prompts))
    rows, masks = [], []
    for prompt in prompts:
        gap, ones = [fill] * (T - len(prompt)), [1] * len(prompt)
        zeros = [0] * len(gap)
        rows.append(prompt + gap if side == "right" else gap + prompt)
        masks.append(ones + zeros if side == "right" else zeros + ones)
    return torch.tensor(rows), torch.tensor(masks)


# Its products of one row and of several, packed and not, differ in the last bits of fp32: README.md says so.
same_bits = pytest.mark.skipif(torch.__version__ < "2.12", reason="the oneDNN of torch 2.11 sums in another order")


def assert_rows_are_as_alone(model, prompts, **options):
    """Tokens, and the scores that they were chosen by."""
    options = {
        "max_new_tokens": 20,
        "eos_token_id": [],
        "return_dict_in_generate": True,
        "output_scores": True,
        **options,
    }
    T = max(map(len, prompts))
    alone = [model.generate([prompt], **options) for prompt in prompts]
    batches = {
        "list": model.generate(prompts, **options),
        "right": model.generate(*padded(prompts, "right"), **options),
        "left": model.generate(*padded(prompts, "left", fill=42), **options),
    }
    for name, batch in batches.items():
        for b, one in enumerate(alone):
            assert torch.equal(batch.sequences[b, T - len(prompts[b]) :], one.sequences[0]), (name, b)
            for step, (together, by_itself) in enumerate(zip(batch.scores, one.scores, strict=True)):
                assert torch.equal(together[b], by_itself[0]), (name, b, step)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
class TestGreedy:
    @pytest.fixture(autouse=True)
    def _threads(self, threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        yield
        torch.set_num_threads(before)

    def test_prompts_of_different_lengths(self, backend, threads):
        model = spread(GPT2(tiny_config(), attn_implementation=backend), TALKATIVE).eval()
        assert_rows_are_as_alone(model, PROMPTS)

    def test_prompts_of_one_length(self, backend, threads):
        model = spread(GPT2(tiny_config(), attn_implementation=backend), TALKATIVE).eval()
        assert_rows_are_as_alone(model, [prompt[:1] * 6 for prompt in PROMPTS])

    def test_with_processors_and_no_cache(self, backend, threads):
        model = spread(GPT2(tiny_config(n_layer=1), attn_implementation=backend), TALKATIVE).eval()
        assert_rows_are_as_alone(model, PROMPTS, repetition_penalty=1.3, no_repeat_ngram_size=2, max_new_tokens=8)
        assert_rows_are_as_alone(model, PROMPTS, use_cache=False, max_new_tokens=4)

    @same_bits
    def test_at_gpt2s_width(self, backend, threads):
        model = spread(
            GPT2(GPT2Config(n_layer=2, vocab_size=1000, bos_token_id=0, eos_token_id=0), attn_implementation=backend)
        ).eval()
        prompts = [list(range(a, a + n)) for a, n in ((0, 70), (100, 1), (200, 33))]
        assert_rows_are_as_alone(model, prompts, max_new_tokens=5)


@across_lanes()
def test_rows_are_as_alone_with_our_kernels(lane):
    model = spread(GPT2(tiny_config(n_layer=1), attn_implementation="triton"), TALKATIVE).eval().to(lane.device)
    prompts = PROMPTS[:3]
    batch = model.generate(prompts, max_new_tokens=3, eos_token_id=[])
    for b, prompt in enumerate(prompts):
        alone = model.generate([prompt], max_new_tokens=3, eos_token_id=[])
        assert torch.equal(batch[b, 9 - len(prompt) :], alone[0])


@pytest.mark.parametrize(
    "options", [{"do_sample": True, "seed": [4, 5, 6, 7]}, {"num_beams": 3}], ids=["sampling", "beams"]
)
def test_sampled_and_searched_rows_are_as_alone(options):
    model = spread(GPT2(tiny_config()), TALKATIVE).eval()
    batch = model.generate(PROMPTS, max_new_tokens=10, eos_token_id=[], **options)
    for b, prompt in enumerate(PROMPTS):
        seed = {"seed": options["seed"][b]} if "seed" in options else {}
        alone = model.generate([prompt], max_new_tokens=10, eos_token_id=[], **{**options, **seed})
        assert torch.equal(batch[b, 9 - len(prompt) :], alone[0])


def test_a_pad_token_in_the_ids_is_padding_where_it_cannot_be_text():
    model = spread(GPT2(tiny_config(eos_token_id=3)), TALKATIVE).eval()
    ids, mask = padded(PROMPTS, "left", fill=100)
    assert torch.equal(model.generate(ids, pad_token_id=100), model.generate(ids, mask, pad_token_id=100))


def exchange_rows(weight):
    weight.data[[0, 1]] = weight.data[[1, 0]].clone()


# Torch counts the first of them alone as changes.
CHANGES = {
    "in place": lambda weight: weight.mul_(3),
    "data": lambda weight: weight.data.mul_(3),
    "least": lambda weight: weight.data[3, 4].copy_(weight.data[3, 4].nextafter(torch.tensor(9.0))),
    "lerp": lambda weight: weight.data.lerp_(torch.ones(()), 0.1),
    "copy": lambda weight: weight.data.copy_(weight.data.roll(1)),
    "negated": lambda weight: weight.data.neg_(),
    "every second negated": lambda weight: weight.data[:, 1::2].neg_(),
    "numpy": lambda weight: weight.detach().numpy().__imul__(3),
    "rows exchanged": exchange_rows,
    "columns exchanged": lambda weight: exchange_rows(weight.data.t()),
    "other storage": lambda weight: setattr(weight, "data", weight.data + 1),
}


class TestLinear:
    """What the above rests on: oneDNN's result for a row, whatever stands beside it."""

    @pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
    @pytest.mark.parametrize(("inputs", "outputs"), [(768, 2304), (3072, 768), (768, 1009), (48, 144), (1600, 400)])
    @torch.no_grad()
    def test_a_rows_product_depends_on_no_other_row(self, inputs, outputs, packed):
        layer = Conv1D(inputs, outputs)
        layer.weight.normal_(0, 0.02)
        layer.bias.normal_()
        x = torch.randn(130, inputs)
        expected = layer(x)  # not packed
        with onednn.using([layer.pack()] if packed else []):
            for rows in (1, 2, 3, 5, 8, 16, 17, 64, 129):
                assert torch.equal(layer(x[:rows]), expected[:rows])
                assert torch.equal(layer(x[-rows:]), expected[-rows:])
        torch.testing.assert_close(expected, torch.addmm(layer.bias, x, layer.weight), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("shape", [(30, 20), (31, 21)], ids=["even", "odd"])
    @pytest.mark.parametrize("kind", [Head, Conv1D])
    @pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
    @torch.no_grad()
    def test_packed_weights_follow_the_weights(self, change, kind, shape):
        """Regression: what torch does not count as a change left the old weights in use."""
        layer = Head(torch.nn.Parameter(torch.empty(shape))) if kind is Head else Conv1D(*shape)
        layer.weight.normal_()
        if kind is Conv1D:
            layer.bias.zero_()
        first = layer.pack()
        assert layer.pack() is first
        change(layer.weight)
        second = layer.pack()
        assert second is not first
        assert layer.pack() is second
        x = torch.randn(4, layer.out_in().shape[1])
        for blocks in ([], [second]):
            with onednn.using(blocks):
                torch.testing.assert_close(layer(x), x @ layer.out_in().t())

    @same_bits
    def test_packed_weights_are_used_within_their_block_alone(self):
        layer = Head(torch.nn.Parameter(torch.randn(30, 20)))
        x = torch.randn(4, 20)
        with torch.no_grad():
            packed = layer.pack()
            old = layer(x)
            with onednn.using([packed]):
                layer.weight.data.mul_(3)
                assert torch.equal(layer(x), old)  # this is why: within the block they must not change
            torch.testing.assert_close(layer(x), 3 * old)
        copied = copy.deepcopy(layer)
        assert copied.packed is None
        assert pickle.loads(pickle.dumps(layer)).packed is None
        assert layer(x).requires_grad
        assert layer.train().packed is None

    def test_generate_sees_weights_that_changed_unseen(self):
        model = spread(GPT2(tiny_config(), attn_implementation="sdpa"), TALKATIVE).eval()
        ids = torch.arange(8)[None]
        options = {"max_new_tokens": 8, "eos_token_id": [], "return_dict_in_generate": True, "output_scores": True}
        model.generate(ids, **options)
        for parameter in model.parameters():
            parameter.data.mul_(1.5)
        out = model.generate(ids, **options)
        with torch.no_grad():
            logits = model(out.sequences, use_cache=False).logits
        torch.testing.assert_close(torch.stack(out.scores, 1), logits[:, 7:-1], rtol=0, atol=1e-4)

    def test_only_generate_packs_and_training_lets_go(self):
        model = spread(GPT2(tiny_config())).eval()
        layers = [module for module in model.modules() if isinstance(module, Linear)]
        assert len(layers) == 13
        with torch.no_grad():
            model(torch.ones(1, 3, dtype=torch.long))
        assert all(layer.packed is None for layer in layers)
        model.generate([[1]], max_new_tokens=2)
        assert all(layer.packed is not None for layer in layers)
        model.train()
        assert all(layer.packed is None for layer in layers)
