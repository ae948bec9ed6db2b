"""The stages of a visit to a GPU, in the order of their worth, and how one is run: its own process, limit and log."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from bench.lib.files import write_file
from bench.lib.record import DEVICE_LOST, INTERRUPTED, ROOT

OK, NO_TIME = "ok", "not begun: no time was left"
GRACE_S = 8.0  # between the wish to stop, at which a bench saves what it has, and the end
LEAST_S = 3.0  # with less, a stage is not begun
RESTARTS = 5  # of a bench that has lost the GPU


@dataclass(frozen=True)
class Stage:
    """A command of its own: module.main(arguments). limit_s: its part of a visit of nine minutes; all are one visit."""

    name: str
    what: str
    module: str
    arguments: tuple[str, ...]
    limit_s: float

    def command(self, out, visit):
        """The arguments with what the visit adds to them."""
        if self.module == "pytest":
            return [*(REHEARSED_TESTS if visit.stand_in else self.arguments), "-n", str(visit.workers)]
        return [
            *self.sized(visit.stand_in),
            *(["--stages", *visit.names] if self.name == "compile" else []),
            *("--device", "cuda", "--out", str(out), "--no-charts"),
            *(["--quick"] if visit.quick else []),
            *(["--resume"] if visit.resume else []),
        ]

    def sized(self, small):
        """The arguments; small: with numbers at which the stand-in takes a moment."""
        if not small:
            return list(self.arguments)
        words = []
        for word in self.arguments:
            if word == "liger":  # the interpreter does not run it
                continue
            # The interpreter has no bf16; of several numbers the first stays, and a length becomes a short one.
            if not (word.isdigit() and words[-1].isdigit()):
                words.append("17" if word.isdigit() and int(word) > 256 else word.replace("bfloat16", "float16"))
        return [*words, *SMALLER.get(self.module, ())]


def _attention(name, what, limit_s, *arguments):
    return Stage(name, what, "bench.attention_sweep", arguments, limit_s)


SDPA = ("sdpa", "sdpa-flash")  # sdpa's rows say which kernel it took
OURS = ("triton", "triton-portable")  # the first takes Hopper's kernels on Hopper
LIGER = ("liger",) if find_spec("liger_kernel") else ()
PYTEST = ("-q", "-p", "no:cacheprovider", "-p", "bench.lib.test_results", "--color=no", "--tb=short", "-rfE")
REHEARSED_TESTS = [*PYTEST, "tests/bench/test_gate.py"]
MODELS = ("--pair", "transformers-sdpa", "triton", "--size", "gpt2", "--dtype", "float16")
STEP = ("--providers", "triton", "sdpa", "transformers-sdpa", "--dtype", "bfloat16", "--batch", "4", "16")
COMPILED_STEP = ("--providers", "triton", "sdpa-compiled", "--dtype", "bfloat16", "--batch", "16")  # 27 s to compile
STAGES = (
    Stage("compile", "what the stages need, compiled ahead on every core", "bench.compile_ahead", (), 45),
    Stage("ceilings", "copy, matrix product and launches of this machine", "bench.ceilings", (), 9),
    _attention("lengths", "attention over sequence lengths", 38, "--backends", "eager", *SDPA, *OURS),
    _attention("packed", "attention as the model calls it", 22, "--scenario", "packed", "--backends", *SDPA, *OURS),
    Stage("optimizer", "a whole step in mixed precision: tokens/s, MFU", "bench.training_sweep", STEP, 25),
    Stage("decoding", "a decode step, T - 1 tokens cached", "bench.model_sweep", (*MODELS, "--mode", "decoding"), 24),
    Stage("tests", "the gpu tests", "pytest", (*PYTEST, "-m", "gpu"), 126),
    Stage("transformers", "prefill, decoding, generate() beside transformers", "bench.transformers_sweep", (), 40),
    Stage(
        "pointwise",
        "LayerNorm, GELU, cross-entropy",
        "bench.pointwise_sweep",
        ("--dtype", "bfloat16", "--providers", "eager", "compiled", *LIGER, "triton"),
        36,
    ),
    _attention(
        "scenarios",
        "attention with dropout, over head dims, with padding, with a cache",
        44,
        *("--scenario", "dropout", "head-dims", "padding", "decode", "--backends", "sdpa", "triton"),
    ),
    Stage("training", "a training step", "bench.model_sweep", (*MODELS, "--mode", "training"), 20),
    Stage("compiled", "a whole step beside our module on SDPA, compiled", "bench.training_sweep", COMPILED_STEP, 36),
    _attention(
        "published",
        "attention at the width of the papers",
        16,
        *("--backends", *SDPA, *OURS, "--mode", "forward"),
        *("--heads", "32", "--seq-lens", "512", "1024", "2048", "4096", "8192", "16384"),
    ),
    Stage(
        "tune",
        "a short tuning, nothing rewritten",
        "bench.tune",
        ("--dry-run", "--head-dims", "64", "--dtype", "bfloat16", "--seq-len", "1024", "--minutes", "0.2"),
        18,
    ),
    _attention("flex", "flex_attention", 16, "--backends", "flex", "triton", "--seq-lens", "1024", "4096"),
    _attention(
        "bf16",
        "attention in bf16",
        10,
        *("--dtype", "bfloat16", "--backends", *SDPA, *OURS, "triton-one-pass", "--seq-lens", "2048", "8192"),
    ),
)
# What the interpreter would take minutes for.
SMALLER = {
    "bench.attention_sweep": ("--heads", "2"),
    "bench.transformers_sweep": ("--quick",),
    "bench.tune": ("--minutes", "0.05"),
}
COMPILED = ("bench.attention_sweep", "bench.transformers_sweep", "bench.model_sweep", "bench.pointwise_sweep")
NAMES = tuple(stage.name for stage in STAGES)


@dataclass
class Visit:
    """What all stages of a run share. share: of their limits that they get."""

    work: Path
    deadline: float  # of time.monotonic
    quick: bool = False
    resume: bool = False
    stand_in: bool = False
    share: float = 1.0
    commit: str | None = None
    workers: int = 1
    names: tuple[str, ...] = ()  # of the stages to come

    def left(self):
        return self.deadline - time.monotonic()

    def limit(self, stage, following):
        """Seconds for a stage with others to follow: its part, and, up to as much again, what those before it left.

        Where they took more than their parts, each stage bears of that at most half of its own, so that all get a turn.
        """
        part = stage.limit_s * self.share
        spare = self.left() - sum(later.limit_s for later in following) * self.share
        return min(max(min(spare, 2 * part), part / 2, LEAST_S), self.left())


@dataclass
class Outcome:
    """What became of a stage."""

    name: str
    what: str
    command: str
    status: str = NO_TIME
    seconds: float = 0.0


class Running:
    """The process of a stage. It has imported its command, or is about to, and waits for begin()."""

    def __init__(self, stage, visit, following=()):
        self.stage, self.visit, self.following = stage, visit, following
        self.out = visit.work / stage.name
        self.out.mkdir(parents=True, exist_ok=True)
        self.outcome = Outcome(stage.name, stage.what, "")
        self.start()

    def start(self, resume=False):
        visit, stage = self.visit, self.stage
        arguments = stage.command(self.out, visit)
        if resume and "--resume" not in arguments:
            arguments.append("--resume")
        self.log = (self.out / "log.txt").open("a", encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.lib.waiting", stage.module, *arguments],
            cwd=ROOT,
            env=self.environment(),
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that a stop reaches all that it has started
        )
        shown = "pytest" if stage.module == "pytest" else stage.module.replace(".", "/") + ".py"
        self.command = " ".join(["python", "-m" if shown == "pytest" else "", shown, *arguments]).replace("  ", " ")

    def environment(self):
        added = {
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",  # nothing is fetched; without a network an attempt would wait for minutes
            "BENCH_TEST_RESULTS": str(self.out / "tests.jsonl"),
        }
        if self.visit.commit:
            added["BENCH_COMMIT"] = self.visit.commit
        if self.visit.stand_in and self.stage.module != "pytest":
            added |= {"BENCH_STAND_IN": "1", "TRITON_INTERPRET": "1"}
        return {**os.environ, **added}

    def run(self, meanwhile=lambda: None):
        """Begins, waits for the end or the limit; the Outcome. meanwhile(): called a few times a second."""
        started = time.monotonic()
        limit = self.visit.limit(self.stage, self.following)
        outcome = self.outcome = Outcome(self.stage.name, self.stage.what, self.command)
        if limit < LEAST_S:
            self.kill()
            return outcome
        try:
            for restarts in range(RESTARTS + 1):
                self.begin()
                code = self.wait(started + limit, meanwhile)
                if code != DEVICE_LOST or restarts == RESTARTS:
                    break
                self.kill()
                self.start(resume=True)
            outcome.status = self.status(code, limit, restarts)
        except KeyboardInterrupt:
            self.stop()
            outcome.status = "stopped by the user"
            raise
        finally:
            self.kill()
            outcome.seconds = round(time.monotonic() - started, 1)
        return outcome

    def begin(self):
        with suppress(BrokenPipeError):  # it has ended before it began; its exit code says so
            self.process.stdin.write(b"\n")
            self.process.stdin.flush()

    def wait(self, until, meanwhile):
        """The exit code, or None if it had to be stopped."""
        while self.process.poll() is None:
            if time.monotonic() > until:
                self.stop()
                return None
            meanwhile()
            time.sleep(0.1)
        return self.process.returncode

    def status(self, code, limit, restarts):
        again = f"; begun again {restarts} times after the GPU was lost" if restarts else ""
        if code is None:
            return f"stopped at its limit of {limit:.0f} s{again}"
        if self.stage.module == "pytest":
            return {0: OK, 1: "tests failed", 5: "no tests"}.get(code, f"pytest ended with code {code}")
        if code == INTERRUPTED:
            return "stopped by the user"
        return OK + again if code == 0 else f"ended with code {code}{again}: {last_line(self.out / 'log.txt')}"

    def stop(self):
        """Asks it to stop, as Ctrl-C does; kills it if it does not."""
        self.signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE_S)
        self.kill()

    def kill(self):
        self.signal(signal.SIGKILL)
        self.process.wait()
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.log.close()

    def signal(self, number):
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def last_line(path):
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it printed nothing"]
    return lines[-1][:200]


def run(stages, visit, outcomes, after=lambda outcome: None, meanwhile=lambda: None):
    """Runs the stages in order; each Outcome joins `outcomes` and goes to after(outcome) as soon as it is known.

    The next stage's process imports while the present one is measured.
    """
    running = following = None
    try:
        for i, stage in enumerate(stages):
            running = following or Running(stage, visit, stages[i + 1 :])
            is_next = i + 1 < len(stages) and visit.left() > LEAST_S
            following = Running(stages[i + 1], visit, stages[i + 2 :]) if is_next else None
            try:
                running.run(meanwhile)
            finally:
                outcomes[stage.name] = running.outcome
                after(running.outcome)
    finally:
        if following is not None:
            following.kill()


def save_outcomes(path, environment, outcomes):
    data = {"environment": environment, "stages": [asdict(outcome) for outcome in outcomes.values()]}
    return write_file(path, json.dumps(data, indent=1) + "\n")


def load_outcomes(path):
    """(environment, {name: Outcome}). ValueError if the file is none of ours."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return data["environment"], {stage["name"]: Outcome(**stage) for stage in data["stages"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path.name}: {error!r}") from None
