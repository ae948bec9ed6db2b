"""What a stage of a visit can do wrong: `python -m bench.lib.waiting tests.bench.faulty_stage fail`. And a compiler."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def main(argv):
    what, out = argv[0], Path(argv[argv.index("--out") + 1])
    print(f"{what} begins", flush=True)
    if what == "fail":
        raise ZeroDivisionError("of its own making")
    if what == "die":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "deaf":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if what in ("hang", "deaf"):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
        (out / "children").write_text(f"{os.getpid()} {child.pid}")
        try:
            time.sleep(300)
        except KeyboardInterrupt:
            (out / "saved.json").write_text('{"environment": {}, "rows": [{"status": "ok"}]}')
            return 130
    if what == "lose" and "--resume" not in argv:
        return 3
    return 0


def compiled(what):
    """For bench/lib/processes.py: a function that raises, dies, hangs or prints."""
    if what == "raise":
        raise ZeroDivisionError("of its own making")
    if what == "abort":
        print("LLVM ERROR: of its own making", file=sys.stderr, flush=True)
        os.abort()
    if what == "exit":
        os._exit(3)
    if what == "hang":
        time.sleep(300)
    print("what a compiler prints")
    return {"pid": os.getpid(), "interpreted": os.environ["TRITON_INTERPRET"]}
