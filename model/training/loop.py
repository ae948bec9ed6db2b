"""The training loop: next-token prediction on shards of text, resumable to the bit.

    run = Training(model, "data", "out", Settings(steps=1000))
    run.train()

One step takes `accumulate` micro-batches [batch, seq_len] per process, averages their gradients, clips them by their
norm and moves the weights by AdamW. The logits of a micro-batch never exist (return_logits=False).
"""

import dataclasses
import json
import math
import signal
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from kernels.checks import check_flag, check_number
from model.checkpoints.atomic import write_file
from model.config import brief
from model.gpt2 import GPT2
from model.training.captured import CapturedGradients
from model.training.captured import refusal as cannot_capture
from model.training.data import Batches, Tokens
from model.training.log import Log, bar
from model.training.optimizer import adamw, clip_gradients, flops_per_token, learning_rate, peak_flops
from model.training.precision import Held
from model.training.processes import Processes
from model.training.state import (
    FOLDER,
    load_split,
    load_state,
    random_state,
    save_split,
    save_state,
    saved_steps,
    set_random_state,
)

DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16, "pure-bfloat16": torch.bfloat16}
PURE = "pure-bfloat16"
SETTINGS = "training.json"
MICRO_BATCHES = "accumulate times the number of processes"
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # gathered from all processes, for the first


@dataclass
class Settings:
    """How to train. What a run may change when it is resumed is below the line; the rest it must keep.

    dtype: "bfloat16" and "float16" multiply in 16 bits, by autocast; the residual stream is fp32. "pure-bfloat16" has
    that in bf16, too: the model is one of bf16 weights, rounded from fp32 ones at each micro-batch (precision.py).
    Weights, summed gradients and AdamW's moments are fp32 with all. lr: the highest learning rate, reached after
    `warmup` steps; it ends at `least_lr`, by default a tenth. once: epochs of windows side by side instead of windows
    that begin anywhere. clip: the largest norm of the gradient; 0 for no clipping. capture: loss and gradients of a
    micro-batch are one CUDA graph (model/training/captured.py).
    """

    batch: int = 8
    accumulate: int = 1
    seq_len: int = 256
    lr: float = 6e-4
    least_lr: float | None = None
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    dtype: str = "float32"
    seed: int = 0
    once: bool = False
    # -- what follows changes nothing of the steps before
    steps: int = 1000
    save_every: int = 500
    keep: int = 2
    eval_every: int = 250
    eval_batches: int = 8
    compile: bool = False
    capture: bool = False

    def __post_init__(self):
        for name, least in (
            ("batch", 1), ("accumulate", 1), ("seq_len", 2), ("warmup", 0), ("seed", 0), ("steps", 1),
            ("save_every", 1), ("keep", 1), ("eval_every", 0), ("eval_batches", 1),
        ):  # fmt: skip
            check_number(
                "training", getattr(self, name), name, f"at least {least}", lambda n, m=least: n >= m, integer=True
            )
        if self.least_lr is None:
            self.least_lr = self.lr / 10
        for name in ("lr", "least_lr", "weight_decay", "clip"):
            words = "finite, and positive" if name == "lr" else "finite, and at least 0"
            low = 0.0 if name != "lr" else math.ulp(0.0)
            check_number("training", getattr(self, name), name, words, lambda x, low=low: low <= x < math.inf)
        for name in ("once", "compile", "capture"):
            check_flag("training", getattr(self, name), name)
        if not isinstance(self.dtype, str) or self.dtype not in DTYPES:
            raise ValueError(f"training: dtype is {brief(self.dtype)}; it must be one of {', '.join(DTYPES)}")

    @classmethod
    def fixed(cls):
        """The names of what a resumed run must keep."""
        names = [field.name for field in dataclasses.fields(cls)]
        return names[: names.index("steps")]


class Training:
    """A run: `directory` holds its newest weights, its log and what it needs to go on; `data` the shards."""

    def __init__(self, model, data, directory, settings, *, processes=None, resume=False, show=True):
        """Raises ValueError where the directory has another run, or this one without resume=True."""
        self.directory, self.settings = Path(directory), settings
        self.processes = processes or Processes(model.device)
        self.device, self.show = self.processes.device, show and self.processes.is_first
        if settings.seq_len > model.config.n_positions:
            raise ValueError(
                f"training: seq_len is {settings.seq_len}; the model has n_positions {model.config.n_positions}"
            )
        if settings.capture:
            reason = cannot_capture(self.device, processes=self.processes.size, compiled=settings.compile)
            if reason is not None:
                raise ValueError(f"training: capture cannot be served: {reason}")
        if settings.compile and self.processes.tensor:
            raise ValueError("training: nobody has tried compile with tensor_parallel")
        self.model = model.to(self.device).train()
        self.tokens = Tokens(data, "train", settings.seq_len)
        self.batches = Batches(
            self.tokens,
            settings.batch,
            seed=settings.seed,
            once=settings.once,
            vocab_size=model.config.vocab_size,
            device=self.device,
        )
        self.validation = self._validation(data)
        is_pure = settings.dtype == PURE
        self.parallel = self.processes.parallel(self.model, DTYPES[PURE] if is_pure else None)
        self.precision = nullcontext  # around a loss and its gradients
        if self.processes.tensor or (is_pure and not self.processes.shard):
            self.precision = Held(self.model, DTYPES[PURE] if is_pure else torch.float32)
        self.optimizer = adamw(self.model, lr=settings.lr, weight_decay=settings.weight_decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.dtype == "float16")
        self.step, self.best = 0, math.inf
        self._begin(resume)
        self.run = torch.compile(self.parallel) if settings.compile else self.parallel
        self.captured = None  # CapturedGradients, made at the first step, when a batch is at hand

    def _validation(self, data):
        try:
            tokens = Tokens(data, "val", self.settings.seq_len)
        except (FileNotFoundError, ValueError) as error:  # a small corpus may have none, or none of this length
            if self.settings.eval_every and self.show:
                print(f"training: there will be no validation: {error}", file=sys.stderr)
            return None
        B = min(self.settings.batch, tokens.cells)
        return Batches(tokens, B, seed=0, once=True, vocab_size=self.model.config.vocab_size, device=self.device)

    def _begin(self, resume):
        """From the newest state, or from the start, in a directory that holds no other run."""
        settings, path = self.settings, self.directory / SETTINGS
        saved = saved_steps(self.directory)
        if path.exists() and not resume:
            raise ValueError(f"training: {self.directory} has a run already; resume it, or choose another directory")
        if resume:
            if not path.exists():
                raise ValueError(f"training: {self.directory} has no run to resume: {SETTINGS} is not there")
            before = _read_record(path)
            for name, now in self._kept().items():
                if (was := before.get(name)) != now:
                    raise ValueError(f"training: {name} was {was} and is {now} now; a resumed run keeps it")
            if saved:
                self._restore(saved[-1][1])
            elif (self.directory / "model.safetensors").exists():
                raise ValueError(
                    f"training: {self.directory / FOLDER} holds no state, though weights were saved; it cannot be "
                    "resumed: begin another run with them (--from)"
                )
            elif self.show:
                print("training: nothing was saved yet; the run begins again", file=sys.stderr)
            if settings.steps < self.step:
                raise ValueError(f"training: {self.step} steps are done; steps is {settings.steps}")
        if not (resume and saved):
            torch.manual_seed(settings.seed + self.processes.reader)  # of dropout
        self.processes.wait()
        if self.processes.is_first:
            self.directory.mkdir(parents=True, exist_ok=True)
            record = {**dataclasses.asdict(settings), **self._kept()}
            write_file(path, json.dumps(record, indent=2) + "\n")

    def _kept(self):
        """What a run keeps when it is resumed, by name, as JSON has it."""
        settings = {name: getattr(self.settings, name) for name in Settings.fixed()}
        settings[MICRO_BATCHES] = settings.pop("accumulate") * self.processes.readers
        model = {f"the model's {name}": value for name, value in self.model.config.to_dict().items()}
        kept = {**settings, **model, "the number of training tokens": self.tokens.number}
        return json.loads(json.dumps(kept))

    def _restore(self, path):
        """From what any number of processes has saved, split or not."""
        if path.is_dir():
            state = load_split(path, self.model, self.optimizer, self.processes)
        else:
            state = load_state(path)
            set_state_dict(
                self.model,
                self.optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
                options=StateDictOptions(full_state_dict=True),
            )
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.best = state["step"], state["best"]
        if len(state["random"]) != self.processes.size:
            torch.manual_seed(self.settings.seed + self.processes.reader + self.step)  # another number of processes
        else:
            set_random_state(state["random"][self.processes.rank], self.device)

    def save(self):
        """Saves the state, then the weights where GPT2.from_pretrained(directory) finds them."""
        processes, place = self.processes, (self.directory, self.step)
        state = {
            "step": self.step,
            "best": self.best,
            "scaler": self.scaler.state_dict(),
            "random": processes.gather(random_state(self.device)),
        }
        weights = None
        if processes.shard:
            save_split(*place, self.model, self.optimizer, state, self.settings.keep, processes)
            weights = get_model_state_dict(self.model, options=WHOLE)
        elif processes.is_first or processes.tensor:
            named = dict(zip(("model", "optimizer"), get_state_dict(self.model, self.optimizer, options=WHOLE)))
            if processes.is_first:
                save_state(*place, state | named, self.settings.keep)
            weights = named["model"] if processes.tensor else None
        if processes.is_first:
            self._plain(weights).save_pretrained(self.directory)
        self.processes.wait()

    def _plain(self, weights):
        """The model, or, where it is split among processes, one on the CPU that has all its weights."""
        if weights is None:
            return self.model
        with torch.device("meta"):
            model = GPT2(self.model.config)
        model.load_state_dict(weights, assign=True)
        model.tie_weights()
        return model

    def train(self, sample=None):
        """Runs the steps that are left; returns the last training loss. sample(model): called at each evaluation.

        Ctrl-C and SIGTERM end the run after the step at hand, with everything saved.
        """
        settings, log, loss = self.settings, None, math.nan
        if self.processes.is_first:
            log = Log(self.directory, self.step)
        progress = bar(settings.steps, self.step, self.show)
        try:
            with _until_signal() as stopped, progress:
                while self.step < settings.steps:
                    row = self.take_step()
                    loss, is_last = row["loss"], self.step == settings.steps
                    asked = self.processes.any(stopped.is_set())
                    if log is not None:
                        log.add(**row)
                    progress.update()
                    progress.set_postfix_str(_told(row))
                    if settings.eval_every and (self.step % settings.eval_every == 0 or is_last):
                        self._evaluate(log, sample)
                    if self.step % settings.save_every == 0 or is_last or asked:
                        self.save()
                        if log is not None:
                            log.draw()
                    if asked:
                        raise KeyboardInterrupt
        finally:
            if log is not None:
                log.close()
        return loss

    def take_step(self):
        """One step; what the log says of it."""
        settings, processes, start = self.settings, self.processes, time.perf_counter()
        lr = learning_rate(
            self.step, lr=settings.lr, warmup=settings.warmup, steps=settings.steps, least=settings.least_lr
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        total = torch.zeros((), device=self.device)
        numbers = [self._number(i) for i in range(settings.accumulate)]
        for i, number in enumerate(numbers):
            is_last = i + 1 == len(numbers)
            ids = self.batches.batch(number, self._number(i + 1))
            with nullcontext() if is_last else processes.without_averaging(self.parallel):
                total += self._add_gradients(ids)
        self.scaler.unscale_(self.optimizer)
        scaled = self.scaler.is_enabled()
        norm = clip_gradients(self.model.parameters(), self.optimizer, settings.clip, scaled=scaled)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        loss, norm = float(processes.mean(total)), float(norm)
        if not math.isfinite(loss):
            shards = ", ".join(sorted({path for number in numbers for path in self.batches.shards_of(number)}))
            saved = saved_steps(self.directory)
            raise ValueError(
                f"training: the loss of step {self.step + 1} is {loss}, at learning rate {lr:.3g}; the batch is from "
                f"{shards}. The newest saved step is {saved[-1][0] if saved else 0}"
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.captured is None:
            self.optimizer.zero_grad(set_to_none=True)
        else:
            self.captured.zero()
        self.step += 1
        seconds = time.perf_counter() - start
        tokens = settings.batch * settings.seq_len * settings.accumulate * processes.readers
        peak = peak_flops(self.device)
        mfu = None
        if peak is not None:
            mfu = flops_per_token(self.model, settings.seq_len) * tokens / seconds / (peak * processes.size)
        return {
            "step": self.step, "loss": loss, "lr": lr, "grad_norm": norm, "tokens": self.step * tokens,
            "tokens_per_s": tokens / seconds, "mfu": mfu,
        }  # fmt: skip

    def _add_gradients(self, ids):
        """Adds a micro-batch's share of the step's gradients; its share of the loss."""
        share = self.settings.accumulate

        def loss_of(ids):
            return self._loss(ids) / share

        if self.settings.capture:
            if self.captured is None:
                self.captured = CapturedGradients(
                    loss_of, self.model.parameters(), ids, self.scaler.scale, self.precision
                )
            return self.captured(ids)
        with self.precision():
            loss = loss_of(ids)
            self.scaler.scale(loss).backward()
        return loss.detach()

    def _number(self, micro_batch):
        """The number of a micro-batch of this step, or of the next, among all that all processes ever read."""
        return (self.step * self.settings.accumulate + micro_batch) * self.processes.readers + self.processes.reader

    def _loss(self, ids):
        dtype = None if self.settings.dtype == PURE else DTYPES[self.settings.dtype]
        with nullcontext() if dtype is None else torch.autocast(self.device.type, dtype):
            return self.run(ids, labels=ids, return_logits=False, use_cache=False).loss

    @torch.no_grad()
    def evaluate(self):
        """The mean loss of the first `eval_batches` batches of the split "val", or None where there is none."""
        if self.validation is None:
            return None
        self.model.eval()
        number = min(self.settings.eval_batches, self.validation.tokens.cells // self.validation.B)
        with self.precision():
            losses = [self._loss(self.validation.batch(i)) for i in range(number)]
        self.model.train()
        return float(self.processes.mean(torch.stack(losses).double().mean()))

    def _evaluate(self, log, sample):
        loss = self.evaluate()
        is_best = loss is not None and loss < self.best
        if loss is not None:
            self.best = min(loss, self.best)
            if log is not None:
                log.add(step=self.step, val_loss=loss)
        if not is_best and sample is None:
            return
        weights = (
            get_model_state_dict(self.model, options=WHOLE) if self.processes.shard or self.processes.tensor else None
        )
        if self.processes.is_first:
            model = self._plain(weights)
            if is_best:
                model.save_pretrained(self.directory / "best")
            if sample is not None:
                sample(model.eval())
                model.train()


def _read_record(path):
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"training: {path} is damaged: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"training: {path} is damaged: it holds {type(record).__name__}, no object")
    return record


def _told(row):
    rates = f"{row['tokens_per_s']:,.0f} tokens/s" + ("" if row["mfu"] is None else f", MFU {row['mfu']:.1%}")
    return f"loss {row['loss']:.3f}, lr {row['lr']:.1e}, norm {row['grad_norm']:.2f}, {rates}"


@contextmanager
def _until_signal():
    """An Event that Ctrl-C or SIGTERM sets. In a thread that gets no signals it is never set."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: stopped.set()) for number in numbers]
    try:
        yield stopped
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
