"""python -m model.write: a page where one writes, and Tab offers three continuations, at http://127.0.0.1:8017/.

python -m model.write
python -m model.write --model gpt2 out/tiny --port 0      # two models to choose from; a port that is free
python -m model.write --random-weights                    # without a checkpoint

It is for the browser of this machine. With --host 0.0.0.0 whoever reaches this machine may write; there is no password.
"""

import argparse
import sys

import torch

from model.__main__ import load
from model.attention.outside import add_import_option
from model.config import PRESETS
from model.terminal import one_line
from model.write.server import Server
from model.write.writer import Speaker, Writer

PORT = 8017


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m model.write", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", nargs="+", default=["gpt2"], help="directories or names on the Hub, to choose from (default: gpt2)"
    )
    parser.add_argument("--random-weights", action="store_true", help="do not load weights; see --size")
    parser.add_argument("--size", choices=PRESETS, default="gpt2", help="with --random-weights (default: gpt2)")
    parser.add_argument("--host", default="127.0.0.1", help="the address to serve at (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=PORT, help=f"0 for one that is free (default: {PORT})")
    parser.add_argument(
        "--attn", default="auto", help="attention backend: auto, triton, sdpa, eager, one of your own (default: auto)"
    )
    add_import_option(parser)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="(default: the checkpoint's)")
    options = parser.parse_args(arguments)
    if not 0 <= options.port < 1 << 16:
        parser.error(f"--port {options.port}: a port is from 0 to 65535")
    return options


def speakers(options: argparse.Namespace) -> dict[str, Speaker]:
    """Each model that was named, loaded: before the page is served, so that what is wrong is said in the terminal."""
    found = {}
    for name in [options.size] if options.random_weights else options.model:
        model, tokenizer = load(argparse.Namespace(**{**vars(options), "model": name, "seed": None}))
        model.pack_weights()
        found[name] = Speaker(model, tokenizer)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Serves until Ctrl-C; returns the exit status."""
    options = parse(arguments)
    try:
        writer = Writer(speakers(options))
    except (OSError, ValueError) as error:
        print(one_line("model.write", error), file=sys.stderr)
        return 2
    try:
        server = Server(options.host, options.port, writer)
    except OSError as error:
        writer.close()
        where = f"--host {options.host} --port {options.port}"
        print(
            f"model.write: {where}: {error.strerror}; an address of this machine and a free port are required",
            file=sys.stderr,
        )
        return 2
    print(f"{server.url} (Ctrl-C ends)", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
        writer.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
