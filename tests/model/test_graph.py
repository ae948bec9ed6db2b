"""The captured decode step: it says what the ordinary step says, and it is captured, kept and let go as it should be.

Where there is no GPU, `Recording` stands in for the CUDA graph. The tests under the mark `gpu` use real ones.
"""

import copy
import gc
import logging
import os
import pickle
import subprocess
import sys
import weakref
from contextlib import ExitStack, contextmanager

import pytest
import torch
from lanes import across_lanes
from peers import TALKATIVE, spread, tiny_config
from test_decode_step import Counting
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from kernels.decode import Weights, persistent
from kernels.simulator import simulate
from model import GPT2
from model import cache as cache_module
from model.attention import attention, register_attention, registry
from model.cache import KVCache
from model.generation import decoding
from model.generation import graph as graph_module
from model.generation.decoding import Decoding
from model.generation.graph import MAX_GRAPHS, DecodeGraphs, DecodeStep, GraphedSteps, Kind
from model.generation.settings import Settings

PROMPTS = [[5, 17, 80, 2, 9, 11], [7], [20, 21, 22]]
UNIFORM = [[5, 17, 80], [90, 1, 33]]
STEP = 8  # the cache's, so that tiny models go through several capacities


class Recording(TorchDispatchMode):
    """A CUDA graph's stand-in: the operations of one step with their arguments, run again on the same memory.

    As in a CUDA graph, the numbers of the host are those of the capture and every tensor stays at its address.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.replays = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, outputs))
        return outputs

    def replay(self):
        self.replays += 1
        for function, args, kwargs, outputs in self.calls:
            for old, new in zip(_tensors(outputs), _tensors(function(*args, **kwargs)), strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():  # neither a view nor in place
                    old.copy_(new)


def _tensors(outputs):
    return [x for x in (outputs if isinstance(outputs, list | tuple) else [outputs]) if isinstance(x, torch.Tensor)]


class Again:
    """A CUDA graph's stand-in for launches that are no operations of torch's: the step itself, once more."""

    def __init__(self, step, device):
        step()
        self.replay = step


class Unseen(Again):
    """The same, its operations counted by nobody."""

    def __init__(self, step, device):
        def unseen():
            with _disable_current_modes():
                step()

        super().__init__(unseen, device)


class Captures(list):
    """The recordings made, in their order. As `capture` does, it runs the step before."""

    def __call__(self, step, device):
        step()
        with Recording() as recording:
            step()
        self.append(recording)
        return recording

    @property
    def replays(self):
        return [recording.replays for recording in self]


@pytest.fixture(autouse=True)
def _small_steps(monkeypatch):
    monkeypatch.setattr(cache_module, "STEP", STEP)


@pytest.fixture
def captures(monkeypatch):
    """Lets a CPU capture, by Recording."""
    made = Captures()
    monkeypatch.setattr(graph_module, "DEVICES", ("cpu",))
    monkeypatch.setattr(graph_module, "capture", made)
    return made


def talkative(backend="sdpa", **fields):
    return spread(GPT2(tiny_config(**fields), attn_implementation=backend), TALKATIVE).eval()


@pytest.fixture
def model():
    return talkative(n_layer=2)


def say(model, prompts, *, max_new_tokens=12, **options):
    options = {"eos_token_id": [], "return_dict_in_generate": True, "output_scores": True, **options}
    return model.generate(prompts, max_new_tokens=max_new_tokens, **options)


def assert_says_the_same(model, prompts, *, exactly=False, **options):
    """With graphs as without: the tokens, and the scores that they were chosen by."""
    options = {"decode_kernel": "plain"} | options if exactly else options
    graphed = say(model, prompts, **options)
    plain = say(model, prompts, **(options | {"cuda_graph": False, "decode_kernel": "plain"}))
    assert torch.equal(graphed.sequences, plain.sequences)
    assert graphed.forward_passes == plain.forward_passes
    for ours, theirs in zip(graphed.scores, plain.scores, strict=True):
        if exactly:
            assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)
    assert graphed.past_key_values.lengths == plain.past_key_values.lengths
    return graphed


class TestTheStep:
    @pytest.mark.parametrize("prompts", [UNIFORM, PROMPTS, PROMPTS[:1]], ids=["uniform", "ragged", "one"])
    @pytest.mark.parametrize("backend", ["eager", "sdpa"])
    def test_says_what_the_ordinary_step_says(self, captures, backend, prompts):
        """Over three capacities of the cache, with a graph for each."""
        assert_says_the_same(talkative(backend), prompts, max_new_tokens=20)
        longest = max(map(len, prompts))
        held = range(longest, longest + 19)  # before each step
        assert captures.replays == [sum(t // STEP == n for t in held) for n in sorted({t // STEP for t in held})]

    @pytest.mark.parametrize(
        "options",
        [
            {"do_sample": True, "seed": 3, "top_p": 0.9},
            {"do_sample": True, "seed": 3, "num_return_sequences": 2},
            {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[4], [5, 6]]},
            {"min_new_tokens": 6, "eos_token_id": list(range(0, 101, 2))},
            {"stopping_criteria": [lambda ids, scores: ids[:, -1] > 80]},
            {"logits_processor": [lambda ids, scores: scores.mul_(-1)]},
            {"max_new_tokens": None, "max_length": 64},
            {"max_new_tokens": 90, "sliding_window": True},
        ],
        ids=lambda options: "+".join(options),
    )
    def test_in_every_kind_of_decoding(self, captures, options, model):
        assert_says_the_same(model, PROMPTS, **options)
        assert sum(captures.replays) > 3

    @across_lanes()
    def test_with_our_kernels_to_the_bit(self, lane, monkeypatch):
        if lane.device == "cpu":
            monkeypatch.setattr(graph_module, "DEVICES", ("cpu",))
            monkeypatch.setattr(graph_module, "capture", Captures())
        config = tiny_config(n_layer=1)
        model = GPT2(config, attn_implementation="triton", kernel_implementation="triton")
        model = spread(model, TALKATIVE).eval().to(lane.device)
        assert_says_the_same(model, PROMPTS, exactly=True, max_new_tokens=5)
        assert len(model._graphs.kept) == 2

    @across_lanes(lanes=("sm_80", "sm_90", "gpu"))
    @pytest.mark.parametrize("kernel", ["fused", "persistent"])
    def test_by_kernels_of_its_own(self, lane, monkeypatch, kernel):
        """The tokens of the ordinary step, ragged, over two capacities, in five launches a layer or one a token."""
        if lane.device == "cpu":
            monkeypatch.setattr(persistent, "PROGRAMS", 2)
            monkeypatch.setattr(persistent, "BYTES", 4)
            monkeypatch.setattr(graph_module, "DEVICES", ("cpu",))
            monkeypatch.setattr(graph_module, "capture", Again)
        model = GPT2(tiny_config(n_layer=1), attn_implementation="triton", kernel_implementation="triton")
        model = spread(model, TALKATIVE).eval().to(lane.device)
        graphed = assert_says_the_same(model, PROMPTS, max_new_tokens=5, decode_kernel=kernel)
        by_itself = say(model, PROMPTS, max_new_tokens=5, decode_kernel=kernel, output_scores=False)
        assert torch.equal(by_itself.sequences, graphed.sequences)
        assert [key[-1] for key in model._graphs.kept] == [Kind(True, persistent=kernel == "persistent")] * 2

    @across_lanes(lanes=("sm_80", "sm_90", "gpu"))
    @pytest.mark.parametrize("weights", ["model", "int8"])
    def test_drafts_verified_by_kernels_of_its_own(self, lane, monkeypatch, weights):
        """The tokens of greedy decoding, from fewer steps, whatever the draft; texts one after the other."""
        if lane.device == "cpu":
            monkeypatch.setattr(graph_module, "DEVICES", ("cpu",))
            monkeypatch.setattr(graph_module, "capture", Again)
        model = GPT2(tiny_config(n_layer=1), attn_implementation="triton", kernel_implementation="triton")
        model = spread(model, TALKATIVE).eval().to(lane.device)
        prompts = [[5, 17, 5, 17, 5], [20, 21]]
        options = {"output_scores": False, "max_new_tokens": 9, "weights": weights}
        greedy = say(model, prompts, **options)
        drafted = say(model, prompts, prompt_lookup_num_tokens=3, **options)
        assert torch.equal(drafted.sequences, greedy.sequences)
        if weights == "model":
            plain = say(model, prompts, prompt_lookup_num_tokens=3, **options, cuda_graph=False)
            assert torch.equal(drafted.sequences, plain.sequences)
            assert drafted.forward_passes == plain.forward_passes
        assert {key[-1] for key in model._graphs.kept} == {Kind(True, weights, 1), Kind(True, weights, 4)}

    @across_lanes(lanes=("sm_90", "gpu"))
    @pytest.mark.parametrize("weights", ["model", "int8"])
    def test_packed_weights_follow_the_models(self, lane, monkeypatch, weights):
        """They are packed once for a model, in place where something has changed, and int8 only then."""
        if lane.device == "cpu":
            monkeypatch.setattr(graph_module, "DEVICES", ("cpu",))
            monkeypatch.setattr(graph_module, "capture", Again)
        model = GPT2(tiny_config(n_layer=1), attn_implementation="triton", kernel_implementation="triton")
        model = spread(model, TALKATIVE).eval().to(lane.device)
        other = {name: x.flatten().roll(1).view(x.shape) for name, x in model.state_dict().items()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=1.0)
        written = []
        write = Weights.write
        monkeypatch.setattr(Weights, "write", lambda *given: written.append(1) or write(*given))

        def scores():
            """Of the last token; None where nothing was packed anew."""
            before = len(written)
            last = say(model, UNIFORM[:1], max_new_tokens=2, weights=weights).scores[-1]
            return last, len(written) - before

        def step():
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()

        seen = [scores()]
        (kept,), (packed,) = model._graphs.kept.values(), model._graphs.packed.values()
        assert scores()[1] == (weights == "model")
        for change in (
            lambda: model.transformer.h[0].mlp.c_fc.weight.data[3:4].mul_(-1.5),  # of which torch counts no version
            lambda: model.load_state_dict(other),
            step,
        ):
            change()
            seen.append(scores())
        assert list(model._graphs.kept.values()) == [kept]
        assert list(model._graphs.packed.values()) == [packed]
        assert all(count == 1 for _, count in seen)
        assert all(not torch.equal(a, b) for i, (a, _) in enumerate(seen) for b, _ in seen[:i])
        if weights == "model":
            assert_says_the_same(model, UNIFORM[:1], max_new_tokens=2)
        model.half()
        assert scores()[1] == 1
        assert list(model._graphs.packed.values()) != [packed]
        assert copy.deepcopy(model)._graphs is None

    def test_all_graphs_of_a_model_read_one_packed_copy_which_goes_with_it(self, monkeypatch):
        monkeypatch.setattr(graph_module, "DEVICES", ("cpu",))
        monkeypatch.setattr(graph_module, "capture", lambda step, device: None)
        model = GPT2(tiny_config(n_layer=1), attn_implementation="triton", kernel_implementation="triton").eval()
        graphs = DecodeGraphs()
        steps = [graphs.take(model, B, 8 * B, Kind(True))[1].step.fused for B in (1, 2)]
        assert steps[0].packed is steps[1].packed is graphs.packed["model"]
        packed = weakref.ref(steps[0].packed)
        del steps, graphs
        gc.collect()
        assert packed() is None
        assert not [name for name in model.state_dict() if "packed" in name]

    def test_reads_nothing_beyond_a_rows_end_and_writes_one_slot(self, model):
        with torch.no_grad():
            step = DecodeStep(model, 2, 16)
            step.lengths.of([5, 2])
            step.data.normal_()
            before = step.data.clone()
            step.run(model)
            logits, changed = step.logits.clone(), (step.data != before).any(-1)  # [n_layer, 2, B, H, capacity]
            assert changed.sum((0, 1, 3)).tolist() == [[0] * n + [2 * 2 * 3] + [0] * (15 - n) for n in (5, 2)]
            assert torch.equal(step.ids[:, 0], logits.argmax(1))
            assert torch.equal(step.said[[0, 1], [5, 2]], logits.argmax(1))
            step.ids.zero_()
            step.lengths.tensor.sub_(1)
            step.data[:, :, 0, :, 6:] = 99.0
            step.data[:, :, 1, :, 3:] = -99.0
            step.run(model)
        assert torch.equal(step.logits, logits)
        assert step.lengths.tensor.tolist() == [6, 3]

    def test_keeps_its_addresses_and_advances_in_place(self, model):
        with torch.no_grad():
            step = DecodeStep(model, 3, 16)
            state = (step.ids, step.lengths.tensor, step.data, step.logits, step.said)
            addresses = [tensor.data_ptr() for tensor in state]
            for t in range(1, 5):
                step.run(model)
                assert [tensor.data_ptr() for tensor in state] == addresses
                assert state == (step.ids, step.lengths.tensor, step.data, step.logits, step.said)
                assert step.lengths.tensor.tolist() == [t] * 3


@contextmanager
def no_waiting():
    """Refuses what would make a GPU's host wait, for tensors on "meta", which stands for the GPU.

    That is to read a value, to learn the size of a result from its values, and to copy from the host.
    """
    with FromTheHost(), ToTheHost():
        yield


class FromTheHost(TorchFunctionMode):
    """Refuses tensors made of host numbers: on "meta" torch makes them without a copy that the other mode could see."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor), f"{function} copies"
        return function(*args, **(kwargs or {}))


class ToTheHost(TorchDispatchMode):
    VALUES = ("_local_scalar_dense", "nonzero", "item", "masked_select", "unique", "is_nonzero", "equal")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert not name.startswith(self.VALUES), f"{function} waits for the device"
        devices = {tensor.device.type for tensor in _flat([*args, *(kwargs or {}).values()])}
        result = function(*args, **(kwargs or {}))
        devices |= {tensor.device.type for tensor in _flat([result])}
        assert len(devices) <= 1, f"{function} copies between host and device"
        return result


def _flat(values):
    if isinstance(values, torch.Tensor):
        return [values]
    return [x for value in values for x in _flat(value)] if isinstance(values, list | tuple) else []


@pytest.fixture
def on_meta():
    model = GPT2(tiny_config(), attn_implementation="triton", kernel_implementation="triton")
    return model.to("meta").eval()


class TestNothingWaits:
    def test_the_guard_itself(self):
        x = torch.ones(3, device="meta")
        waiting = (
            lambda: torch.tensor([1, 2], device="meta"),
            lambda: x.new_tensor([1, 2]),
            lambda: x.where(x > 1, torch.tensor(2.0)),
            lambda: x.to("cpu"),
            lambda: x.sum().item(),
            lambda: x[x > 1],
        )
        for wait in waiting:
            with no_waiting(), pytest.raises((AssertionError, RuntimeError)):
                wait()

    @pytest.mark.parametrize("backend", ["triton", "sdpa", "eager"])
    def test_in_the_captured_step(self, on_meta, backend):
        on_meta.set_attn_implementation(backend)
        with torch.no_grad():
            step = DecodeStep(on_meta, 3, 16)
            with no_waiting():
                step.run(on_meta)

    @pytest.mark.parametrize("lengths", [[4, 4, 4], [4, 1, 2]], ids=["uniform", "ragged"])
    def test_in_the_ordinary_step(self, on_meta, lengths):
        """The first step after a prefill may bring the lengths to the device; the others find them there."""
        cache = KVCache(on_meta.config, 3, capacity=16, device="meta")
        ids = torch.zeros(3, 1, dtype=torch.long, device="meta")
        with torch.no_grad():
            cache.lengths = list(lengths)
            on_meta(ids, past_key_values=cache)
            with no_waiting():
                for _ in range(3):
                    on_meta(ids, past_key_values=cache)
        assert cache.lengths == [length + 4 for length in lengths]

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[4], [5, 6]], "min_length": 20},
            {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "min_p": 0.1},
        ],
        ids=["greedy", "processors", "warpers"],
    )
    @pytest.mark.parametrize("prompts", [UNIFORM, PROMPTS], ids=["uniform", "ragged"])
    def test_in_the_choice_of_tokens(self, monkeypatch, on_meta, prompts, options):
        """What stands between two steps: from a guarded first step to the next one's call."""
        guard, steps = ExitStack(), []
        monkeypatch.setattr("model.generation.decoding.Decoding.prefill", lambda run, *given: logits.clone())

        def decode(run, ids, first, end):
            guard.close()
            if len(steps) == 5:
                raise StopIteration
            steps.append(end)
            guard.enter_context(no_waiting())
            return logits.clone()

        monkeypatch.setattr("model.generation.decoding.Decoding.decode", decode)
        logits = torch.zeros(len(prompts), 101, device="meta")
        with pytest.raises(StopIteration):
            on_meta.generate(prompts, max_new_tokens=20, eos_token_id=[3, 4], **options)


@pytest.fixture
def looks(monkeypatch):
    """Lets a CPU be asked as a GPU is, but after every four tokens."""
    monkeypatch.setattr(decoding, "SYNC_EVERY", 4)
    monkeypatch.setattr(decoding, "ASKED_ALWAYS", ())


class TestTheStepChooses:
    """Greedy decoding where nobody sees the logits: the captured step itself goes on from token to token."""

    @pytest.fixture(autouse=True)
    def _chosen(self, captures, monkeypatch):
        """Counts the ids that were chosen so."""
        self.chosen, say = 0, GraphedSteps.say

        def counted(steps, ids, cache, most):
            said = say(steps, ids, cache, most)
            self.chosen += 0 if said is None else said[0].shape[1]
            return said

        monkeypatch.setattr(GraphedSteps, "say", counted)

    def both(self, model, prompts, **options):
        options = {"output_scores": False, "max_new_tokens": 20} | options
        return [say(model, prompts, cuda_graph=graphed, **options) for graphed in (True, False)]

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"eos_token_id": list(range(0, 101, 7)), "pad_token_id": 3},
            {"max_new_tokens": None, "max_length": 20},
            {"max_new_tokens": 90, "sliding_window": True},
        ],
        ids=lambda options: "+".join(options),
    )
    @pytest.mark.parametrize("prompts", [UNIFORM, PROMPTS], ids=["uniform", "ragged"])
    def test_what_the_host_would_choose(self, model, prompts, options):
        graphed, plain = self.both(model, prompts, **options)
        assert torch.equal(graphed.sequences, plain.sequences)
        assert graphed.forward_passes == plain.forward_passes
        assert graphed.past_key_values.lengths == plain.past_key_values.lengths
        assert self.chosen > 0

    @pytest.mark.parametrize("options", [{}, {"eos_token_id": list(range(0, 101, 7)), "pad_token_id": 3}], ids=str)
    def test_several_at_a_look(self, looks, model, options):
        """Over two changes of capacity; what comes behind a row's end is filling."""
        for prompts in (UNIFORM, PROMPTS):
            graphed, plain = self.both(model, prompts, **options)
            assert torch.equal(graphed.sequences, plain.sequences)
        if not options:
            assert self.chosen == 2 * 19

    def test_a_streamer_gets_every_token_when_it_is_said(self, looks, model):
        class Streamer(list):
            def put(self, ids):
                self.append(ids.tolist())

            def end(self):
                pass

        streamed = Streamer()
        out = model.generate(UNIFORM[:1], max_new_tokens=9, eos_token_id=[], streamer=streamed)
        assert streamed == [UNIFORM[0], *([token] for token in out[0, 3:].tolist())]
        assert self.chosen == 8

    @pytest.mark.parametrize("is_asked_late", [False, True])
    def test_where_there_is_none_to_choose_it_says_so(self, request, model, is_asked_late):
        if is_asked_late:
            request.getfixturevalue("looks")
        with torch.no_grad():
            model.transformer.wpe.weight[6] = torch.nan
        with pytest.raises(ValueError, match=r"row 1 for new token 4 (are|hold) NaN"):
            self.both(model, [[5], [5, 17, 80, 2]], max_new_tokens=6)
        assert self.chosen == 3

    @pytest.mark.parametrize(
        "options",
        [{"do_sample": True, "seed": 1}, {"output_scores": True}, {"max_time": 1e3}, {"repetition_penalty": 1.1}]
        + [{"stopping_criteria": [lambda ids, scores: ids[:, -1] < 0]}, {"renormalize_logits": True}],
        ids=lambda options: next(iter(options)),
    )
    def test_the_host_chooses_where_it_must(self, model, options):
        graphed, plain = self.both(model, UNIFORM, **options)
        assert torch.equal(graphed.sequences, plain.sequences)
        assert self.chosen == 0

    def test_operations_beside_the_replays(self, looks, monkeypatch, model):
        """For a GPU each is a launch. Of 32 tokens more, in looks of 16, and where the host chooses (max_time)."""
        monkeypatch.setattr(decoding, "SYNC_EVERY", 16)
        monkeypatch.setattr(cache_module, "STEP", 128)
        monkeypatch.setattr(graph_module, "capture", Unseen)

        def operations(tokens, **options):
            with Counting() as counting:
                model.generate(UNIFORM, max_new_tokens=tokens, eos_token_id=[100], **options)
            return counting.operations.total()

        a_token = [(operations(49, **options) - operations(17, **options)) / 32 for options in ({}, {"max_time": 1e3})]
        assert a_token[0] < 3.5
        assert a_token[1] > 12


class TestWhatIsKept:
    def test_a_graph_serves_later_calls(self, captures, model):
        say(model, UNIFORM)
        before = len(captures)
        say(model, UNIFORM, do_sample=True)
        assert len(captures) == before == 2  # capacities 8 and 16
        say(model, UNIFORM[:1])
        assert len(captures) == 4
        assert len(model._graphs.kept) == 4

    def test_no_more_than_a_few(self, captures, model):
        for rows in range(1, MAX_GRAPHS + 3):
            say(model, [[1]] * rows, max_new_tokens=3)
        assert len(captures) == MAX_GRAPHS + 2
        assert len(model._graphs.kept) == MAX_GRAPHS
        say(model, [[1]] * rows, max_new_tokens=3)
        assert len(captures) == MAX_GRAPHS + 2
        say(model, [[1]], max_new_tokens=3)  # the first, which has gone
        assert len(captures) == MAX_GRAPHS + 3

    def test_weights_changed_in_place_are_seen_and_others_are_not_confused_with_them(self, monkeypatch, captures):
        """A graph reads the weights where they were when it was captured."""
        monkeypatch.setattr(GPT2, "pack_weights", lambda model: ())  # a recording would keep what was packed
        model = talkative(n_layer=2)
        other = talkative(n_layer=2)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.copy_(parameter.flatten().roll(1).view(parameter.shape))
        first = assert_says_the_same(model, UNIFORM, max_new_tokens=4)
        assert len(captures) == 1
        model.load_state_dict(other.state_dict())
        second = assert_says_the_same(model, UNIFORM, max_new_tokens=4)
        assert len(captures) == 1
        assert not torch.equal(first.scores[-1], second.scores[-1])
        model.load_state_dict(talkative(n_layer=2).state_dict(), assign=True)
        assert_says_the_same(model, UNIFORM, max_new_tokens=4)
        assert len(captures) == 2
        assert len(model._graphs.kept) == 1
        assert_says_the_same(model.double(), UNIFORM, max_new_tokens=4)
        assert len(captures) == 3

    def test_a_module_without_weights_that_was_replaced_is_seen(self, captures, model):
        """Regression: a graph was looked up by its weights alone, and the old activation was replayed."""
        before = say(model, UNIFORM)
        model.transformer.h[0].mlp.act = torch.nn.Sigmoid()
        after = assert_says_the_same(model, UNIFORM, max_new_tokens=12)
        assert not torch.equal(after.sequences, before.sequences)

    def test_a_graph_for_each_backend(self, captures, model):
        for name in ("sdpa", "eager", "sdpa"):
            model.set_attn_implementation(name)
            assert_says_the_same(model, UNIFORM, max_new_tokens=4)
        assert len(captures) == 2

    def test_training_and_release_let_go_and_copies_have_none(self, captures, model):
        say(model, UNIFORM)
        assert copy.deepcopy(model)._graphs is None
        assert pickle.loads(pickle.dumps(model))._graphs is None
        model.release_graphs()
        assert model._graphs is None
        say(model, UNIFORM)
        assert model._graphs.kept
        assert model.train()._graphs is None
        say(model.eval(), UNIFORM)
        assert len(captures) == 6

    def test_what_is_returned_stays_as_it_is(self, captures, model):
        out = say(model, UNIFORM)
        cache, scores = out.past_key_values, [score.clone() for score in out.scores]
        data = cache.data.clone()
        say(model, [[1, 2], [3, 4]])
        assert torch.equal(cache.data, data)
        assert all(torch.equal(a, b) for a, b in zip(out.scores, scores))
        plain = say(model, UNIFORM, cuda_graph=False).past_key_values
        with torch.no_grad():
            ours, theirs = (model(out.sequences[:, -1:], past_key_values=held).logits for held in (cache, plain))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)

    def test_a_graph_in_use_is_nobody_elses(self, captures, model):
        """A call of generate inside another, as another thread might make it."""
        inner = []

        def criterion(ids, scores):
            inner.append(model.generate(UNIFORM, max_new_tokens=4, eos_token_id=[]))
            return torch.zeros(len(ids), dtype=torch.bool)

        out = assert_says_the_same(model, [[8, 9], [3, 1]], stopping_criteria=[criterion], max_new_tokens=6)
        assert torch.equal(out.sequences, say(model, [[8, 9], [3, 1]], max_new_tokens=6).sequences)
        assert all(torch.equal(one, inner[0]) for one in inner)

    def test_in_inference_mode_and_out_of_it(self, captures, model):
        with torch.inference_mode():
            say(model, UNIFORM, max_new_tokens=4)
        assert_says_the_same(model, UNIFORM, max_new_tokens=4)
        assert len(captures) == 1


class TestFallingBack:
    def said(self, caplog):
        return [record.getMessage() for record in caplog.records if record.name == "model.generation.graph"]

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"use_cache": False}, "use_cache=False keeps no cache"),
            ({"num_beams": 2, "output_scores": False}, "beam search reorders the cache at each step"),
            (
                {"prompt_lookup_num_tokens": 3, "output_scores": False},
                "prompt lookup is captured by the decode kernels alone, and attention backend 'sdpa' was chosen",
            ),
        ],
        ids=["use_cache", "beams", "lookup"],
    )
    def test_what_is_not_captured_is_said_once(self, captures, caplog, model, options, reason):
        caplog.set_level(logging.INFO, "model.generation.graph")
        for _ in range(2):
            say(model, UNIFORM[:1], **options)
        assert self.said(caplog) == [f"generate: decoding without a CUDA graph: {reason}"]
        assert not captures

    def test_models_that_are_not_captured(self, captures, caplog, model):
        caplog.set_level(logging.INFO, "model.generation.graph")
        say(model.train(), UNIFORM)
        hook = model.eval().transformer.h[0].register_forward_hook(lambda *_: None)
        say(model, UNIFORM)
        hook.remove()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            say(model, UNIFORM)
        assert [reason.rpartition(": ")[2] for reason in self.said(caplog)] == [
            "the model is in training mode",
            "a module has forward hooks or another forward, which run on the host",
            "autocast is on",
        ]
        say(model, UNIFORM, cuda_graph=False)
        assert len(self.said(caplog)) == 3
        assert not captures

    def test_on_a_cpu(self, caplog, model):
        caplog.set_level(logging.INFO, "model.generation.graph")
        say(model, UNIFORM)
        assert self.said(caplog) == ["generate: decoding without a CUDA graph: the model is on cpu"]

    @pytest.mark.parametrize(
        ("capabilities", "reason"),
        [
            ({"padding": True}, "attention backend 'mine' is not declared capturable"),
            ({"capturable": True}, "attention backend 'mine' does not support padding"),
        ],
        ids=["undeclared", "no-padding"],
    )
    def test_backends_from_outside(self, captures, caplog, monkeypatch, model, capabilities, reason):
        monkeypatch.setattr(registry, "_BACKENDS", dict(registry._BACKENDS))

        @register_attention("mine", unequal_lengths=True, **capabilities)
        def mine(q, k, v, **options):
            return attention(q, k, v, backend="sdpa", **options)

        model.set_attn_implementation("mine")
        caplog.set_level(logging.INFO, "model.generation.graph")
        say(model, UNIFORM)
        assert self.said(caplog) == [f"generate: decoding without a CUDA graph: {reason}"]

    @pytest.mark.parametrize("good", [0, 1, 2], ids=["at-once", "second", "third"])
    def test_a_capture_that_fails(self, monkeypatch, captures, caplog, model, good):
        """In the first capacity or a later one: the tokens are right, and each failure is tried and logged once."""
        tried = []

        def capture(step, device):
            tried.append(step)
            if len(tried) > good:
                step()
                raise RuntimeError("operation not permitted when stream is capturing")
            return captures(step, device)

        monkeypatch.setattr(graph_module, "capture", capture)
        out = assert_says_the_same(model, PROMPTS, max_new_tokens=24)
        assert len(tried) == good + 1
        [record] = [record for record in caplog.records if record.name == "model.generation.graph"]
        assert record.levelno == logging.WARNING
        assert record.getMessage().endswith(
            "its capture failed: RuntimeError: operation not permitted when stream is capturing"
        )
        say(model, PROMPTS)
        assert len(tried) == good + 1
        cache = out.past_key_values
        with torch.no_grad():
            model(out.sequences[:, -1:], past_key_values=cache)
        assert cache.lengths == [len(prompt) + 24 for prompt in PROMPTS]


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        (lambda model: model.set_attn_implementation("sdpa"), {}, "attention backend 'sdpa' was chosen"),
        (lambda model: model.set_kernel_implementation("torch"), {}, "PyTorch's operations were chosen"),
        (
            lambda model: None,
            {"num_return_sequences": 17, "do_sample": True},
            "there are 17 rows; at most 16 are served",
        ),
        (lambda model: None, {"cuda_graph": False}, "it is for captured steps; cuda_graph=False has none"),
        (lambda model: None, {"num_beams": 2}, "beam search reorders the cache at each step"),
        (
            lambda model: setattr(model.transformer.h[0].mlp, "act", torch.nn.ReLU()),
            {},
            "a layer was replaced, or something observes it",
        ),
        (
            lambda model: None,
            {"prompt_lookup_num_tokens": 17, "output_scores": False},
            "prompt lookup is captured by the decode kernels alone, and there are 17 drafts; at most 16 are verified",
        ),
    ],
    ids=["attention", "kernels", "rows", "no graph", "beams", "replaced", "drafts"],
)
@pytest.mark.parametrize(
    "asked",
    [{"decode_kernel": "fused"}, {"decode_kernel": "persistent"}, {"weights": "int8"}],
    ids=["fused", "persistent", "int8"],
)
def test_kernels_of_its_own_that_cannot_serve_are_refused_by_name(monkeypatch, change, options, reason, asked):
    monkeypatch.setattr(graph_module, "DEVICES", ("cpu",))
    monkeypatch.setattr(graph_module, "capture", Again)
    model = GPT2(tiny_config(n_layer=1), attn_implementation="triton", kernel_implementation="triton").eval()
    change(model)
    ((name, value),) = asked.items()
    if value == "persistent" and "prompt_lookup_num_tokens" in options:
        reason = "prompt lookup feeds several tokens of a text at once, and one launch takes one of each"
    with simulate("sm_90"), pytest.raises(ValueError, match=rf"{name}='{value}' cannot serve this call: {reason}"):
        say(model, [[1, 2]], **asked, **options)


def test_int8_weights_are_refused_where_no_kernel_reads_them(monkeypatch):
    model = GPT2(tiny_config(n_layer=1), attn_implementation="triton", kernel_implementation="triton").eval()
    with pytest.raises(ValueError, match=r"weights is 'int4'; it must be 'model' or 'int8'"):
        say(model, UNIFORM, weights="int4")
    with pytest.raises(ValueError, match=r"weights='int8' is for the decode kernels; decode_kernel='plain' does"):
        say(model, UNIFORM, weights="int8", decode_kernel="plain")
    with pytest.raises(ValueError, match=r"weights='int8' cannot serve this call: the model is on cpu"):
        say(model, UNIFORM, weights="int8")

    def fails(step, device):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(graph_module, "DEVICES", ("cpu",))
    monkeypatch.setattr(graph_module, "capture", fails)
    with simulate("sm_90"), pytest.raises(ValueError, match=r"'int8' cannot .*its capture failed: .*out of memory"):
        say(model, UNIFORM, weights="int8")


@pytest.mark.parametrize("value", ["whole", 1, True, torch.ones(1)], ids=str)
def test_an_unknown_kernel_is_refused(model, value):
    with pytest.raises(
        ValueError, match=r"decode_kernel is .*; it must be 'auto' or 'fused' or 'persistent' or 'plain'"
    ):
        say(model, UNIFORM, decode_kernel=value)


def test_a_graph_is_asked_for_by_name(captures, model):
    assert model.graphed_steps(Settings(cuda_graph=False)) is None
    assert isinstance(model.graphed_steps(Settings()).graphs, DecodeGraphs)


@pytest.mark.gpu
class TestOnAGPU:
    """The real thing. The tokens of the Triton kernels do not depend on the buffer, so they are equal to the bit."""

    @pytest.fixture
    def model(self):
        return talkative("triton", n_layer=2).cuda()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("prompts", [UNIFORM, PROMPTS, PROMPTS[:1]], ids=["uniform", "ragged", "one"])
    def test_says_what_the_ordinary_step_says_to_the_bit(self, model, prompts, dtype):
        model.to(dtype)
        assert_says_the_same(model, prompts, exactly=True, max_new_tokens=30)
        assert model._graphs.kept
        assert not model._graphs.failed

    @pytest.mark.parametrize("backend", ["sdpa", "eager"])
    def test_other_backends_are_captured(self, model, backend):
        model.set_attn_implementation(backend)
        assert_says_the_same(model, PROMPTS, max_new_tokens=20)
        assert not model._graphs.failed

    def test_one_launch_for_each_token_and_no_waiting(self, model):
        """Fewer tokens than SYNC_EVERY, through two capacities, with torch told to raise where the host waits."""
        say(model, UNIFORM, max_new_tokens=14)
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        decode, launches = Decoding.decode, []

        def watched(run, *arguments):
            torch.cuda.set_sync_debug_mode("default" if len(launches) == 11 else "error")
            launches.append(run.forward_passes)
            return decode(run, *arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Decoding, "decode", watched)
            try:
                with torch.profiler.profile(activities=activities) as profile:
                    say(model, UNIFORM, max_new_tokens=13)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert len(launches) == 12
        counts = {event.key: event.count for event in profile.key_averages()}
        assert counts["cudaGraphLaunch"] == 12

    def test_where_nobody_sees_the_logits_a_token_is_one_launch(self, model):
        """Six tokens more within one look, through the same two capacities."""

        def launches(tokens):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                model.generate(UNIFORM, max_new_tokens=tokens, eos_token_id=[])
            counts = {event.key: event.count for event in profile.key_averages()}
            return counts["cudaGraphLaunch"], sum(counts.get(f"{x}LaunchKernel", 0) for x in ("cuda", "cu"))

        launches(13)
        (few, beside_few), (many, beside_many) = launches(7), launches(13)
        assert (few, many) == (6, 12)
        assert beside_many <= beside_few + 2

    def test_memory_stays_as_it_is_from_token_to_token(self, model):
        say(model, UNIFORM, max_new_tokens=14)
        held = []

        def criterion(ids, scores):
            held.append(torch.cuda.memory_allocated())
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        model.generate(UNIFORM, max_new_tokens=14, eos_token_id=[], stopping_criteria=[criterion])
        assert len(set(held[7:])) == 1  # the last capacity

    def test_a_capture_that_fails_leaves_the_stream_and_the_model_usable(self):
        """In a process of its own: torch before 2.12 loses count of its captures where one fails."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        assert "its capture failed" in done.stderr

    def test_release_gives_the_memory_back(self, model):
        model.generate(UNIFORM, max_new_tokens=14)
        model.release_graphs()
        before = torch.cuda.memory_allocated()  # what cuBLAS keeps is in it
        model.generate(UNIFORM, max_new_tokens=14)
        assert torch.cuda.memory_allocated() > before
        model.release_graphs()
        assert torch.cuda.memory_allocated() == before


def fail_to_capture():
    """A backend that waits for the device where it says that it does not."""

    @register_attention("waits", capturable=True, padding=True, unequal_lengths=True)
    def waits(q, k, v, **options):
        q.sum().item()
        return attention(q, k, v, backend="sdpa", **options)

    model = talkative("waits", n_layer=2).cuda()
    stream = torch.cuda.current_stream()
    assert_says_the_same(model, UNIFORM, max_new_tokens=4)
    assert torch.cuda.current_stream() == stream
    assert model._graphs.failed


if __name__ == "__main__":
    fail_to_capture()
