"""python -m tokenizer "text": the tokens of a text, their ids and their bytes.

python -m tokenizer "Hello, world!"
python -m tokenizer --file README.md --json
echo "Hello" | python -m tokenizer
"""

import argparse
import json
import os
import sys

from . import GPT2Tokenizer

# Backgrounds that black text reads well on; neighbours differ, so that the borders of tokens show.
BACKGROUNDS = (117, 157, 222, 218, 183)


def main(arguments=None):
    """Prints the tokens of the text given; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tokenizer", description="Shows the tokens of a text.")
    parser.add_argument("text", nargs="?", help="the text; standard input if neither this nor --file is given")
    parser.add_argument("--file", help="read the text from a UTF-8 file")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--vocabulary", default="gpt2", help="a directory or hub name (default: gpt2, which ships)")
    parser.add_argument("--special", action="store_true", help="read special tokens in the text as such")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="default: auto")
    options = parser.parse_args(arguments)
    if options.text is not None and options.file is not None:
        parser.error("both a text and --file were given; one is required")
    try:
        text = _read(options)
        tokenizer = GPT2Tokenizer.from_pretrained(options.vocabulary)
        ids = tokenizer.encode(text, allowed_special="all") if options.special else tokenizer.encode_ordinary(text)
    except (OSError, ValueError) as error:
        message = f"tokenizer: {error}".replace("\n", " ")
        print(_escaped(message) if sys.stderr.isatty() else message, file=sys.stderr)
        return 2
    tokens = [{"id": id, "token": tokenizer.decode(id), "bytes": tokenizer.decode_bytes(id).hex(" ")} for id in ids]
    is_unicode = (sys.stdout.encoding or "utf-8").lower().replace("-", "").startswith("utf")
    if not is_unicode and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if options.json:
            counts = {"characters": len(text), "bytes": len(text.encode()), "tokens": len(ids)}
            shown = {"text": text, "counts": counts, "ids": ids, "tokens": tokens}
            # Beyond ASCII there are characters that steer a terminal, as U+009B, which JSON leaves as they are.
            print(json.dumps(shown, ensure_ascii=not is_unicode or sys.stdout.isatty()).replace("\x7f", "\\u007f"))
        else:
            _print_table(text, tokens, _in_color(options.color))
        sys.stdout.flush()
    except BrokenPipeError:  # as from `| head`; what is left in the buffer must not raise again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _read(options):
    if options.text is not None:
        return options.text
    if options.file is None:
        return sys.stdin.buffer.read().decode("utf-8")
    with open(options.file, encoding="utf-8", newline="") as file:
        return file.read()


def _in_color(choice):
    if choice == "auto":
        return sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return choice == "always"


def _print_table(text, tokens, color):
    def paint(i, shown):
        return f"\x1b[48;5;{BACKGROUNDS[i % len(BACKGROUNDS)]}m\x1b[30m{shown}\x1b[0m" if color else shown

    if color:
        print("".join(paint(i, _visible(token["token"])) for i, token in enumerate(tokens)))
    for i, token in enumerate(tokens):
        shown = _visible(token["token"])
        print(f"{token['id']:>6}  {paint(i, shown)}{' ' * max(1, 20 - len(shown))}{token['bytes']}")
    print(f"{len(text)} characters, {len(text.encode())} bytes, {len(tokens)} tokens")


def _visible(token):
    """A token on one line: spaces as dots, what does not print escaped, part of a character as U+FFFD."""
    return "".join("·" if c == " " else _escaped(c) for c in token)


def _escaped(text):
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


if __name__ == "__main__":
    sys.exit(main())
