"""What a model or a file says, on a terminal: characters that would steer the terminal are shown, not obeyed."""

import json
import os
import re
import sys

# Control characters but for newline and tab, and what reorders the text around it.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
_LINE_ENDS = re.compile("[\x85\u2028\u2029]")


def shown(text, file):
    """The text as it is to be written to a file: escaped if that is a terminal, untouched if not."""
    return _STEERING.sub(_escaped, text) if _is_terminal(file) else text


def shown_json(value, file):
    """One line of JSON, for readers who end lines at U+2028 too. What steers a terminal, or what the encoding lacks, is
    written as \\uXXXX there.
    """
    is_unicode = (getattr(file, "encoding", None) or "utf-8").lower().replace("-", "").startswith("utf")
    text = json.dumps(value, ensure_ascii=not is_unicode)
    return (_STEERING if _is_terminal(file) else _LINE_ENDS).sub(lambda match: f"\\u{ord(match.group()):04x}", text)


def write_anything(file):
    """Has a text file escape the characters that its encoding lacks, instead of raising."""
    if hasattr(file, "reconfigure"):
        file.reconfigure(errors="backslashreplace")


def discard(file):
    """What is left in the buffer of a closed pipe, as from `| head`, must not raise again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def one_line(command, error):
    """The line that a command says about an error."""
    return shown(f"{command}: {' '.join(str(error).split(chr(10)))}", sys.stderr)


def _is_terminal(file):
    return bool(getattr(file, "isatty", lambda: False)())


def _escaped(match):
    return match.group().encode("unicode_escape").decode()
