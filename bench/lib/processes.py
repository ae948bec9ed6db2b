"""Calls of one function in processes of their own, as many at a time as there are cores.

    with Processes("bench.tune:compiled") as processes:
        for index, value, status in processes.map(requests, until=time.monotonic() + 60):
            ...

A compiler can raise, abort or hang. An exception, the end of its process and a call that takes too long are each the
status of that one call, in its words, and the next call begins in a new process.

A request is a dictionary of keyword arguments and a value a dictionary, both as JSON has them. The function runs with
Triton's compiler even where this process interprets, and must not use the GPU.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from select import select

from bench.lib.errors import in_words

OK = "ok"
NO_TIME = "not compiled: the time was up"
READY = b"ready\n"  # a process's first line, when it has imported
ROOT = Path(__file__).resolve().parents[2]


class Processes:
    """function: "module:name". count: processes; they start, and import, at once. call_s: what a call may take."""

    def __init__(self, function, count=None, call_s=60.0):
        self.function, self.call_s = function, call_s
        self.workers = [_Worker(function) for _ in range(count or len(os.sched_getaffinity(0)))]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for worker in self.workers:
            worker.end()

    def map(self, requests, until):
        """Yields (index, value, OK), or (index, None, what went wrong), as calls end, up to the time `until`.

        until: of time.monotonic. What has not ended by then is given back with NO_TIME.
        """
        waiting, busy = deque(enumerate(requests)), {}
        while waiting or busy:
            for worker in self.workers:
                if worker not in busy and waiting and time.monotonic() < until:
                    index, request = waiting.popleft()
                    worker.ask(request)
                    busy[worker] = index, time.monotonic() + self.call_s
            if not busy:
                break
            patience = max(0.0, min(until, *(end for _, end in busy.values())) - time.monotonic())
            ready, _, _ = select([worker.answers for worker in busy], [], [], patience)
            for worker, (index, end) in list(busy.items()):
                if worker.answers in ready:
                    line = worker.answers.readline()
                    busy[worker] = index, time.monotonic() + self.call_s  # its imports do not count
                    if line != READY:
                        del busy[worker]
                        yield index, *worker.answer(line)
                elif time.monotonic() >= min(end, until):
                    del busy[worker]
                    worker.begin_again()
                    late = f"error: stopped after {self.call_s:g} s"
                    yield index, None, late if time.monotonic() >= end else NO_TIME
        for index, _ in waiting:
            yield index, None, NO_TIME


class _Worker:
    def __init__(self, function):
        self.function = function
        self.begin()

    def begin(self):
        self.words = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
        # TRITON_INTERPRET is read when Triton is imported.
        environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": _path()}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.lib.processes", self.function],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.words,
            bufsize=0,  # select() sees what has arrived
        )
        self.answers = self.process.stdout

    def ask(self, request):
        with suppress(BrokenPipeError):  # it has ended; answer() says so
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()

    def answer(self, line):
        """(value, status) of what it wrote: a line, or less if the process has ended."""
        if line.endswith(b"\n"):
            return json.loads(line)
        code = self.process.wait()
        self.words.seek(0)
        said = self.words.read().decode(errors="replace").strip().splitlines() or ["it printed nothing"]
        self.begin_again()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return None, f"error: its process ended by {how}: {said[-1][:200]}"

    def begin_again(self):
        self.end()
        self.begin()

    def end(self):
        self.process.kill()
        self.process.wait()
        for file in (self.process.stdout, self.words):
            file.close()
        with suppress(BrokenPipeError):
            self.process.stdin.close()


def _path():
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def _outcome(function, request):
    """(value, OK), or (None, the error in its words)."""
    try:
        return function(**request), OK
    except Exception as error:
        return None, in_words(error)


def main(argv):
    """A process's own part: a line with a request in, a line with [value, status] out."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a compiler prints is no answer
    module, _, name = argv[0].partition(":")
    function = getattr(importlib.import_module(module), name)
    answers.write(READY.decode())
    answers.flush()
    for line in sys.stdin:
        answers.write(json.dumps(_outcome(function, json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
