"""The decode step as a CUDA graph: one launch for each token, where the ordinary step makes hundreds.

A graph is captured for a number of rows and a capacity of the cache, 256 slots or a multiple. Whatever it reads and
writes stands at one address: the new ids, the lengths of the rows, the cache's memory, the logits. The lengths are on
the device and advance there, inside the graph; attention goes over the whole capacity and reads no key beyond a row's
end. No number of the host enters, so that a replayed step is right at every length. Where model/generation/fused.py
can, the step goes by kernels of its own, five a layer; only these verify drafts, several tokens of one text at once.

The graphs of a model are kept from call to call, each with its cache memory; GPT2.release_graphs() gives it back.
"""

import logging
import threading
from functools import lru_cache
from typing import NamedTuple

import torch

from model.attention import attention, get_attention
from model.cache import KVCache, PerRow, grown_capacity, next_places, store
from model.generation.fused import MAX_TEXTS, MOST_UNASKED, FusedStep, PackedModel, addresses
from model.generation.fused import refusal as fused_refusal

DEVICES = ("cuda",)
INSISTENT = ("fused", "persistent")  # decode_kernel: these or a ValueError
MAX_GRAPHS = 8  # kept by a model: two batch sizes at GPT-2's four capacities
WARM_UPS = 2  # steps before the capture, in which kernels are compiled and libraries make their handles

logger = logging.getLogger(__name__)
_capturing = threading.Lock()  # torch has one capture at a time, and ours have one stream


def refusal(model, settings, prompts=None):
    """Why this call of generate() cannot replay its decode steps, in words, or None if it can."""
    positions, past = (None, None) if prompts is None else (prompts.positions, prompts.past)
    device, config = model.device, model.config
    if device.type not in DEVICES:
        return f"the model is on {device.type}"
    request = {"device": device, "dtype": model.dtype, "head_dim": config.head_dim}
    backend = get_attention(model.transformer.attn_implementation, **request)
    cannot = backend.refusal(**request, padding=True, unequal_lengths=True)
    drafts = settings.prompt_lookup_num_tokens
    for holds, reason in (
        (torch.version.hip is not None, "on AMD GPUs nobody has tried it"),
        (not settings.use_cache, "use_cache=False keeps no cache"),
        (settings.num_beams > 1, "beam search reorders the cache at each step"),
        (
            drafts > 0 and settings.decode_kernel == "plain",
            "prompt lookup feeds several tokens at once, which the decode kernels alone capture",
        ),
        (
            drafts > 0 and settings.decode_kernel == "persistent",
            "prompt lookup feeds several tokens of a text at once, and one launch takes one of each",
        ),
        (settings.output_attentions, "output_attentions is read on the host"),
        (settings.output_hidden_states, "output_hidden_states is read on the host"),
        (positions is not None, "position_ids count on from the caller's own"),
        (past is not None and past.starts is not None, "past_key_values holds padding on the left"),
        (model.training, "the model is in training mode"),
        (torch.is_autocast_enabled(device.type), "autocast is on"),
        (
            any(map(_is_watched, model.modules())),
            "a module has forward hooks or another forward, which run on the host",
        ),
        (not backend.capturable, f"attention backend {backend.name!r} is not declared capturable"),
        (cannot is not None, f"attention backend {backend.name!r} does not support {cannot}"),
    ):
        if holds:
            return reason
    if drafts > 0:
        reason = fused_refusal(model, 1, drafts=drafts)
        return None if reason is None else f"prompt lookup is captured by the decode kernels alone, and {reason}"
    return None


def refuse(decode_kernel, weights, reason):
    """ValueError with the reason, where settings insist on what cannot be."""
    asked = [f"decode_kernel={decode_kernel!r}"] if decode_kernel in INSISTENT else []
    asked += [f"weights={weights!r}"] if weights != "model" else []
    if asked:
        raise ValueError(f"generate: {' and '.join(asked)} cannot serve this call: {reason}")


def capture(step, device):
    """The CUDA graph of step(), which runs WARM_UPS times before. Raises what the step or the capture raises."""
    current, side = torch.cuda.current_stream(device), _side_stream(device)
    # Entered once more, the current stream comes back when a capture fails: torch.cuda.graph leaves its own behind.
    with _capturing, torch.cuda.device(device), torch.cuda.stream(current):
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                step()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do with the GPU meanwhile neither fails nor spoils the capture.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            step()
    return graph


@lru_cache
def _side_stream(device):
    """The stream of all captures: cuBLAS keeps a workspace, 32 MiB on an H100, for each that it has worked on."""
    return torch.cuda.Stream(device)


class Kind(NamedTuple):
    """Which step is captured: by the decode kernels or not, with which weights, of how many tokens a row."""

    fused: bool = False
    weights: str = "model"
    T: int = 1
    persistent: bool = False  # in one launch


class DecodeStep:
    """The step that is captured: one token for each of B rows. Implements KVCache's interface, so the
    forward pass is captured unchanged. With `kind.fused` the kernels of kernels/decode take the forward pass's place.

    ids [B, T], lengths [B] int32 and data, as KVCache has it, go in; logits [B T, V] fp32 come out. Where T is 1 the
    step goes on by itself: the arg max of each row comes into ids, and into said [B, capacity] at the row's length, -1
    where there is none (kernels/decode/choose.py), and lengths advances. Else it verifies drafts: counts [B] int32 of
    the T tokens are some; ids and lengths stay.
    """

    is_uniform = False  # as far as the host knows

    def __init__(self, model, B, capacity, kind=None, packed=None):
        config, device = model.config, model.device
        kind = kind or Kind()
        self.batch_size = B
        self.fused = None
        if kind.fused:
            self.fused = FusedStep(model, B, capacity, kind.T, kind.weights, packed, kind.persistent)
        self.ids = torch.zeros(B, kind.T, dtype=torch.long, device=device)
        self.lengths = PerRow(B, device)
        self.counts = PerRow(B, device) if kind.T > 1 else None
        self.data = KVCache(config, B, capacity=capacity, device=device, dtype=model.dtype).data
        self.logits = torch.zeros(B * kind.T, config.vocab_size, dtype=torch.float32, device=device)
        self.said = torch.zeros(B, self.data.shape[4], dtype=torch.long, device=device)

    def run(self, model):
        if self.counts is not None:
            self.fused.run(self.ids, self.lengths.tensor, self.data, self.logits, self.counts.tensor)
            return
        if self.fused is not None:
            self.fused.say(self.ids, self.lengths.tensor, self.data, self.logits, self.said)
            return
        x = model.transformer(self.ids, past_key_values=self, return_dict=True).last_hidden_state  # [B, 1, C]
        self.logits.copy_(model.lm_head(x[:, -1]))
        self._choose()

    def _choose(self):
        """kernels/decode/choose.py by operations of torch's, lengths having advanced."""
        token = self.logits.argmax(-1)
        is_none = ~(self.logits.amax(-1) > -torch.inf)
        self.said.scatter_(1, self.lengths.tensor.long()[:, None] - 1, token.masked_fill(is_none, -1)[:, None])
        self.ids.copy_(token.masked_fill(is_none, 0)[:, None])

    def reserve(self, T):
        self.places = next_places(self.lengths.tensor, T)
        self.ends = self.lengths.tensor + T  # [B]

    def positions(self, T):
        return self.places[1]

    def attend(self, layer, q, k, v, counts, **options):
        keys, values = self.data[layer]  # each [B, H, capacity, D]
        store(keys, k, self.places)
        store(values, v, self.places)
        # For a single query the causal bound and the end of its row are one.
        return attention(q, keys, values, causal=False, kv_end=self.ends, **options)

    def advance(self, counts):
        self.lengths.tensor.add_(1)


class DecodeGraph:
    """A captured DecodeStep and its memory."""

    def __init__(self, model, B, capacity, kind, packed=None):
        # Made in inference mode, its tensors could not be written outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self.step = DecodeStep(model, B, capacity, kind, packed)
            self.graph = capture(lambda: self.step.run(model), model.device)
        self.step.lengths.known = None  # the warm-ups have advanced it

    @property
    def data(self):
        return self.step.data

    @property
    def capacity(self):
        return self.data.shape[4]

    def __call__(self, ids, cache):
        """Logits [B T, V] fp32 after ids [B, T], in memory that the next call overwrites; `cache` lies in `data`.

        Where the graph is one for drafts, T may be less than what it was captured for.
        """
        T = ids.shape[1]
        self._begin(ids, cache)
        if self.step.counts is not None:
            self.step.counts.of([T] * cache.batch_size)
        self.graph.replay()
        cache.advance([T] * cache.batch_size)
        if self.step.counts is None:
            self.step.lengths.known = list(cache.lengths)
        return self.step.logits[:T] if cache.batch_size == 1 else self.step.logits

    def say(self, ids, cache, count):
        """The next `count` ids [B, count] after ids [B, 1], by so many replays; -1 where there was none to choose."""
        self._begin(ids, cache)
        for _ in range(count):
            self.graph.replay()
        cache.advance([count] * cache.batch_size)
        self.step.lengths.known = list(cache.lengths)
        first = self.step.lengths.tensor.long() - count  # [B]
        return self.step.said.gather(1, first[:, None] + torch.arange(count, device=ids.device))

    def _begin(self, ids, cache):
        self.step.ids[:, : ids.shape[1]].copy_(ids)
        self.step.lengths.of(cache.lengths)


class DecodeGraphs:
    """The graphs that a model keeps, at most MAX_GRAPHS: the one used longest ago goes first.

    A graph in use is not among them, so that two threads never share one. (Their replays must still follow each other,
    as they do unless threads choose CUDA streams of their own: all share cuBLAS's workspace.) One whose weights were
    replaced by others is let go; weights changed in place are the same weights. packed: what all graphs by
    kernels/decode read, {"model" or "int8": PackedModel}.
    """

    def __init__(self):
        self.kept, self.failed, self.told, self.packed = {}, {}, set(), {}

    def tell(self, reason, level=logging.INFO):
        """Logs, once per reason, why decoding runs without a graph."""
        if reason not in self.told:
            self.told.add(reason)
            logger.log(level, "generate: decoding without a CUDA graph: %s", reason)

    def take(self, model, B, capacity, kind):
        """(key, graph), captured if none is kept; the graph is None if its capture failed, now or before."""
        weights = (
            *addresses((*model.parameters(), *model.buffers())),
            *model.modules(),
        )  # the modules too: one without weights may take another's place
        self.kept = {key: graph for key, graph in self.kept.items() if key[0] == weights}
        kernels, name = model.transformer.kernel_implementation, model.transformer.attn_implementation
        key = (weights, kernels, name, B, capacity, kind)
        graph = self.kept.pop(key, None)
        packed = self._packed(model, kind.weights) if kind.fused and key not in self.failed else None
        if graph is None and key not in self.failed:
            while len(self.kept) >= MAX_GRAPHS:
                del self.kept[next(iter(self.kept))]
            try:
                graph = DecodeGraph(model, B, capacity, kind, packed)
            except Exception as error:
                self.failed[key] = f"{type(error).__name__}: {error}"
                self.tell(f"its capture failed: {self.failed[key]}", logging.WARNING)
        return key, graph

    def _packed(self, model, weights):
        """The weights as they are now, packed."""
        self.packed = {name: packed for name, packed in self.packed.items() if packed.is_of(model)}
        if weights in self.packed:
            self.packed[weights].refresh()
        else:
            with torch.inference_mode(False):
                self.packed[weights] = PackedModel(model, weights)
        return self.packed[weights]

    def give_back(self, key, graph):
        self.kept[key] = graph
        while len(self.kept) > MAX_GRAPHS:
            del self.kept[next(iter(self.kept))]

    def __deepcopy__(self, memo):
        return None  # the copy's weights are others

    def __reduce__(self):
        return type(None), ()


class GraphedSteps:
    """The decode steps of one call of generate(): from graph to graph as its cache grows.

    Used in a `with` block: at its end the last graph goes back to those that the model keeps, and the cache leaves its
    memory if keeps_cache, because the caller has it.
    """

    def __init__(self, model, graphs, keeps_cache, settings):
        self.model, self.graphs, self.keeps_cache = model, graphs, keeps_cache
        self.decode_kernel, self.weights = settings.decode_kernel, settings.weights
        self.drafts = settings.prompt_lookup_num_tokens
        self.cache = None
        self.key = self.graph = None
        self.has_failed = False

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.keeps_cache and self.cache is not None:
            self.detach(self.cache)
        self._give_back()

    def step(self, ids, cache):
        """Logits [B, V] after ids [B, 1], overwritten by the next step, or None where the ordinary step must do.

        With drafts, [T, V] after ids [1, T], the last token and T - 1 drafts. After the former `cache` lies in a
        graph's memory, and detach() takes it out; after the latter it has its own.
        """
        return self.graph(ids, cache) if self._is_ready(cache, ids.shape[1]) else None

    def say(self, ids, cache, most):
        """(ids [B, n], the last logits) that the graph itself chooses after ids [B, 1], n at most `most`.

        None where decode() must do: there is no graph, or a row has come to n_positions. Logits are overwritten by the
        next step.
        """
        if cache.get_seq_length() >= cache.n_positions or not self._is_ready(cache, 1):
            return None
        count = min(most, self.graph.capacity - cache.get_seq_length())
        return self.graph.say(ids, cache, count), self.graph.step.logits

    def _is_ready(self, cache, T):
        """Whether there is a graph, with the cache in its memory and room for T tokens more; if need be another one."""
        self.cache = cache
        needed = cache.get_seq_length() + T
        if not self.has_failed:
            if self.graph is None or self.graph.capacity < needed:
                self._change_to(grown_capacity(needed, cache.n_positions), cache)
            elif cache.data is not self.graph.data:  # another text's
                cache.move(self.graph.data)
        return not self.has_failed

    def _change_to(self, capacity, cache):
        kind = self._kind(cache.batch_size)
        key, graph = self.graphs.take(self.model, cache.batch_size, capacity, kind)
        if graph is None:
            refuse(self.decode_kernel, self.weights, f"its capture failed: {self.graphs.failed[key]}")
            self.has_failed = True
            self.detach(cache)
            return
        cache.move(graph.data)
        self._give_back()
        self.key, self.graph = key, graph

    def _kind(self, B):
        """The step of B rows. ValueError where the decode kernels were asked for and cannot."""
        if self.decode_kernel == "plain":
            return Kind()
        asked = self.decode_kernel in INSISTENT or self.weights != "model"
        reason = fused_refusal(self.model, B, MAX_TEXTS if asked else MOST_UNASKED, self.drafts)
        if reason is not None:
            refuse(self.decode_kernel, self.weights, reason)
            return Kind()
        return Kind(True, self.weights, 1 + self.drafts, self.decode_kernel == "persistent")

    def detach(self, cache):
        """Gives the cache memory of its own."""
        if self.graph is not None and cache.data is self.graph.data:
            cache.data = cache.data.clone()

    def _give_back(self):
        if self.graph is not None:
            self.graphs.give_back(self.key, self.graph)
        self.key = self.graph = None


def _is_watched(module):
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
