"""GPT-2 under each backend, or compiled, and transformers' on the same weights: what the benches of the model time.

Weights are random, from one seed, and the same for every provider. A mode of a Provider does what is not timed and
returns the call that is.
"""

import importlib.util
from contextlib import nullcontext

import torch

from bench.lib.cli import UsageError
from bench.lib.gate import FORWARD_FACTOR, judge
from bench.lib.lanes import DTYPES
from model import GPT2, GPT2Config, attention_backends
from model.attention import get_attention
from model.cache import KVCache
from model.generation.rounded import rounded
from model.generation.settings import Settings
from model.layers.onednn import using
from model.training.captured import CapturedGradients
from model.training.loop import DTYPES as PRECISIONS
from model.training.loop import PURE
from model.training.optimizer import adamw, clip_gradients
from model.training.precision import Held

THEIRS = ("transformers-eager", "transformers-sdpa")
COMPILED = "sdpa-compiled"  # our module on PyTorch's own operations, for inductor to fuse; of a training step alone
PYTORCHS = ("eager", "sdpa", "flex")  # backends of PyTorch's own operations
# Ways of a captured decode step, by the settings of generate(); "triton" alone takes the one that generate() takes.
PATHS = {
    "triton-plain": {"decode_kernel": "plain"},
    "triton-fused": {"decode_kernel": "fused"},
    "triton-persistent": {"decode_kernel": "persistent"},
    "triton-int8": {"decode_kernel": "fused", "weights": "int8"},
}
GATE_STEPS = 4  # of a decode step's gate, behind a prompt
GATE_TOKENS = 64
NEW_TOKENS = 32  # that generate says


class Provider:
    """A model under a backend: ours, or transformers', on the same weights. Or ours under one of PATHS."""

    def __init__(self, name, ours):
        self.name = name
        self.backend = "triton" if name in PATHS else name
        self.settings = Settings(**PATHS.get(name, {}))
        self.ours = ours
        if name == COMPILED:
            self.model = _on_sdpa(ours)
        else:
            self.model = ours if name not in THEIRS else _transformers(name, ours)
        self.run, self.compiled_for = self.model, None
        self.case = self.steps = None  # decode steps, kept while the case is the same

    def use(self, training=False, case=None):
        """The model in its mode, and its packed weights, as generate() has them. Our backends share one model.

        case: whose captured steps stay; those of any other are let go.
        """
        if case != self.case:
            self.case, self.steps = case, None
        model = self.model.train(training)
        if model is not self.ours:
            return model, ()
        model.set_attn_implementation(self.backend)
        # Beside our attention our other kernels; beside PyTorch's, PyTorch's, so that a backend stands for all of it.
        ours = "triton" if self.name in PATHS else "auto"
        model.set_kernel_implementation("torch" if self.backend in PYTORCHS else ours)
        return model, () if training else model.pack_weights()

    def held_mb(self):
        """The weights, and packed copies of them where there are some, in MB of 2**20 bytes."""
        packed = [layer.packed for layer in self.model.modules() if getattr(layer, "packed", None) is not None]
        tensors = (*self.model.parameters(), *(copy.blocks for copy in packed))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**20

    def logits(self, ids):
        with torch.no_grad():
            return self.use()[0](ids, use_cache=False).logits

    def decoded(self, ids):
        """Logits [1, GATE_STEPS, V] of the captured decode step, token by token, after those before them."""
        model, _ = self.use()
        graphed = model.graphed_steps(self.settings)
        return stepped(model, lambda new, cache: graphed.step(new, cache)[:, None].clone(), ids)

    def bytes_a_step(self, B, T):
        """What a decode step must read, T - 1 tokens cached: matrices and biases, norms, and the head; keys and values.

        Each once, but for the embeddings' B rows; in int8 the matrices take a byte, and a scale of 4 for each output.
        """
        config, size = self.ours.config, self.ours.dtype.itemsize
        C, inner, V, L = config.n_embd, config.inner_dim, config.vocab_size, config.n_layer
        matrices, outputs = L * (4 * C * C + 2 * C * inner) + V * C, L * (5 * C + inner) + V
        weights = matrices * size
        if self.settings.weights == "int8":
            weights = matrices + 4 * outputs
        return weights + size * (L * (9 * C + inner) + 2 * C) + size * 2 * L * B * (T - 1) * C

    def training(self, B, T):
        """Forward and backward of the loss, no optimiser."""
        (model, _), ids = self.use(training=True), random_ids(self.ours, B, T)

        def step():
            model.zero_grad(set_to_none=True)
            model(ids, labels=ids, use_cache=False).loss.backward()

        return step

    def optimizer_step(self, B, T, precision, capture=False):
        """A whole step of training in fp32 weights: loss, gradients, their norm clipped, AdamW.

        precision: one of model.train's --dtype, as there, but that fp16's loss is not scaled.
        capture: loss and gradients of ours as one CUDA graph. COMPILED compiles its model here, once for a case.
        """
        (model, _), ids = self.use(training=True), random_ids(self.ours, B, T)
        optimizer = adamw(model, lr=1e-4)
        # Theirs make all logits, and so does what inductor is to fuse the loss into.
        options = {"return_logits": False} if model is self.ours else {}
        dtype, is_pure = PRECISIONS[precision], precision == PURE
        held = Held(model, dtype) if is_pure else nullcontext

        def loss_of(ids):
            with torch.autocast(ids.device.type, dtype, enabled=dtype is not None and not is_pure):
                return self.run(ids, labels=ids, use_cache=False, **options).loss

        case = B, T, precision
        if self.name == COMPILED and self.compiled_for != case:
            torch.compiler.reset()  # dynamo compiles a second length for any, and a ninth not at all
            self.run, self.compiled_for = torch.compile(model, dynamic=False, fullgraph=True), case
            with held():
                loss_of(ids).backward()  # compiles, outside of what is timed
        model.zero_grad(set_to_none=True)
        captured = None
        if capture and model is self.ours:
            captured = CapturedGradients(loss_of, model.parameters(), ids, around=held)

        def step():
            if captured is None:
                with held():
                    loss_of(ids).backward()
            else:
                captured(ids)
            clip_gradients(model.parameters(), optimizer, 1.0)
            optimizer.step()
            if captured is None:
                optimizer.zero_grad(set_to_none=True)
            else:
                captured.zero()

        return step

    def decoding(self, B, T):
        """One token after T - 1 in the cache. These are random keys and values, which take the time of any others.

        On a GPU ours replay a CUDA graph, as generate() does. It is captured once for a case: rounds share it.
        """
        (model, packed), ids = self.use(case=(B, T)), random_ids(self.ours, B, 1)
        config = self.ours.config
        if model is self.ours:
            self.steps = self.steps or model.graphed_steps(self.settings)
            cache = KVCache(config, B, capacity=T, device=model.device, dtype=model.dtype)
            cache.data.normal_()
            cache.advance([T - 1] * B)
        else:
            from transformers import DynamicCache

            cache = DynamicCache(config=model.config)
            for layer in range(config.n_layer):
                held = torch.randn(2, B, config.n_head, T - 1, config.head_dim, device=model.device, dtype=model.dtype)
                cache.update(held[0], held[1], layer)

        graphed = self.steps

        @torch.no_grad()
        def step():
            with using(packed):
                if graphed is None or graphed.step(ids, cache) is None:
                    model(ids, past_key_values=cache, logits_to_keep=1)
            cache.crop(-1)

        return step

    def inference(self, B, T):
        """A forward pass without a cache, logits of the last position."""
        return self._forward(B, T, use_cache=False)

    def prefill(self, B, T):
        """A forward pass that fills a new cache, logits of the last position."""
        return self._forward(B, T, use_cache=True)

    def _forward(self, B, T, use_cache):
        (model, packed), ids = self.use(), random_ids(self.ours, B, T)

        @torch.no_grad()
        def forward():
            with using(packed if use_cache else ()):  # only generate() packs
                model(ids, use_cache=use_cache, logits_to_keep=1)

        return forward

    def generate(self, B, T):
        """The library's own generate(): T tokens of prompt and NEW_TOKENS more, greedy. The call returns the ids."""
        (model, _), ids = self.use(), random_ids(self.ours, B, T)
        never = self.ours.config.vocab_size  # no such token: nothing ends early
        options = {"max_new_tokens": NEW_TOKENS, "eos_token_id": never, "pad_token_id": 0, "do_sample": False}
        options["attention_mask"] = torch.ones_like(ids)
        options |= PATHS.get(self.name, {})
        return lambda: model.generate(ids, **options)


def _transformers(name, ours):
    import transformers

    values = {key: value for key, value in ours.config.to_dict().items() if key != "model_type"}
    config = transformers.GPT2Config(**values, attn_implementation=name.removeprefix("transformers-"))
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config)
    model.load_state_dict(ours.state_dict(), assign=True)
    model.tie_weights()
    return model.eval()


def _on_sdpa(ours):
    """Our model on SDPA and PyTorch's other operations, with the same weights. A module of its own, so that nothing
    that the others set on theirs is compiled anew."""
    with torch.device("meta"):
        model = GPT2(ours.config, attn_implementation="sdpa", kernel_implementation="torch")
    model.load_state_dict(ours.state_dict(), assign=True)
    model.tie_weights()
    return model.eval()


def random_ids(model, B, T):
    generator = torch.Generator().manual_seed(T)
    return torch.randint(0, model.config.vocab_size, (B, T), generator=generator).to(model.device)


def build(size, device, dtype, **overrides):
    """Our model on the device, random weights, dropout 0: with it there would be nothing to compare."""
    torch.manual_seed(0)
    config = GPT2Config.preset(size, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, **overrides)
    return GPT2(config).to(device, DTYPES[dtype]).eval()


@torch.no_grad()
def stepped(model, step, ids):
    """Logits [1, GATE_STEPS, V] by step(ids [1, 1], cache), after a prefill of what is before."""
    first = ids.shape[1] - GATE_STEPS
    cache = KVCache(model.config, 1, capacity=ids.shape[1], device=model.device, dtype=model.dtype)
    model(ids[:, :first], past_key_values=cache, logits_to_keep=1)
    return torch.cat([step(ids[:, t : t + 1], cache) for t in range(first, ids.shape[1])], 1)


def _forward_of(model):
    return lambda new, cache: model(new, past_key_values=cache).logits


def _judge_path(provider, ours, oracle_model, ids):
    """As gate(), of a decode step. In int8 the steps' weights are what the integers stand for; the prompt's are not."""
    baseline_model, _ = Provider("eager", ours).use()
    models = [(model, rounded(model)) for model in (baseline_model, oracle_model)]
    if provider.settings.weights == "model":
        models = [(model, model) for model, _ in models]
    baseline, oracle = (stepped(model, _forward_of(steps), ids) for model, steps in models)
    actual = provider.decoded(ids).to(baseline.dtype)
    return judge({"logits": (actual, baseline, oracle)}, factor=FORWARD_FACTOR)


def gate(providers, ours):
    """{name: (error, status)}: logits of 64 tokens against those of the same weights in float64, by the tests' rule.

    Of PATHS the logits are those of the decode step.
    """
    ids = random_ids(ours, 1, GATE_TOKENS)
    with torch.no_grad():
        oracle_model = GPT2(ours.config, attn_implementation="eager").to(ours.device, torch.float64).eval()
        oracle_model.load_state_dict(ours.state_dict())
        oracle = oracle_model(ids, use_cache=False).logits
    baseline = Provider("eager", ours).logits(ids)
    judged = {}
    for provider in providers:
        if provider.name in PATHS:
            judged[provider.name] = _judge_path(provider, ours, oracle_model, ids)
            continue
        results = {"logits": (provider.logits(ids), baseline, oracle)}
        judged[provider.name] = judge(results, factor=FORWARD_FACTOR)
    return judged


def refuse_lengths(args):
    """UsageError if a model of args.size has no positions for one of args.seq_lens."""
    most = GPT2Config.preset(args.size).n_positions
    for T in args.seq_lens or ():
        if not 2 <= T <= most:
            raise UsageError(f"--seq-lens {T}: between 2 and n_positions = {most} is required")


def refuse(option, name, args, trains=False, **needs):
    """UsageError if the provider that the option names cannot serve args.size, args.dtype and args.device.

    trains: whether a training step is all that is asked for. needs: of AttentionBackend.refusal, such as
    unequal_lengths=True for decoding.
    """
    if name in THEIRS:
        if importlib.util.find_spec("transformers") is None:
            raise UsageError(f"{option} {name}: transformers is not installed here")
        return
    if name == COMPILED and trains:
        name = "sdpa"
    if name in PATHS:
        if args.device.type != "cuda":
            raise UsageError(f"{option} {name}: a captured decode step, which takes a GPU")
        name = "triton"
    if name not in attention_backends():
        raise UsageError(f"{option} {name}: unknown; choose from {', '.join((*attention_backends(), *PATHS, *THEIRS))}")
    if name.startswith("triton") and args.device.type != "cuda":
        raise UsageError(f"{option} {name}: not timed without a GPU; bench/attention_sweep.py checks it here")
    head_dim = GPT2Config.preset(args.size).head_dim
    request = {"device": args.device, "dtype": DTYPES[args.dtype], "head_dim": head_dim}
    reason = get_attention(name).refusal(**request, **needs)
    if reason is not None:
        raise UsageError(f"{option} {name} does not support {reason}")
