"""Imports a command, waits to be told, and runs it: imports take seconds, in which another command can be measured.

    python -m bench.lib.waiting MODULE ARGUMENT ...

MODULE has a main(argv), as every bench and pytest have. It begins at the first line on stdin and is killed, with all
that it has started, when stdin ends: whoever waits for it is gone. With BENCH_STAND_IN set, a stand-in for a GPU is
installed first (bench/lib/standin.py).
"""

import importlib
import os
import signal
import sys
import threading


def main(argv):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the visit is a job in the background
    if os.environ.get("BENCH_STAND_IN"):
        from bench.lib import standin

        standin.install()
    command = importlib.import_module(argv[0])
    stdin = os.dup(0)  # pytest puts something else in the place of 0
    if not os.read(stdin, 1):
        return 1
    threading.Thread(target=_end_with, args=(stdin,), daemon=True).start()
    return command.main(argv[1:])


def _end_with(stdin):
    while os.read(stdin, 4096):
        pass
    os.killpg(os.getpgid(0), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
