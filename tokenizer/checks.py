"""What callers pass, checked once: an error names the function, the argument, what came and what is required."""

import codecs
import os
import re

_LONE_SURROGATE = re.compile("[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]")


def kind(value):
    """The type of a value, in words; of a list also its items' types."""
    if isinstance(value, (list, tuple)) and value:
        return f"{type(value).__name__} of {', '.join(sorted({type(item).__name__ for item in value}))}"
    return type(value).__name__


def text(value, function, name="text"):
    if not isinstance(value, str):
        raise TypeError(f"{function}: {name} is {kind(value)}; it must be str")
    return value


def texts(value, function, name="texts"):
    if isinstance(value, str):
        raise TypeError(f"{function}: {name} is one str; it must be a list of str")
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise TypeError(f"{function}: {name} is {kind(value)}; it must be a list of str")
    return value


def paired_surrogates(text, function):
    """The text with its surrogate pairs joined to the characters that they stand for; a lone one is an error."""
    found = _LONE_SURROGATE.search(text)
    if found:
        raise ValueError(
            f"{function}: lone surrogate U+{ord(found.group()):04X} at character {found.start()}; "
            "text must be valid Unicode"
        )
    return text.encode("utf-16", "surrogatepass").decode("utf-16")


def encodable(value, function, name):
    """A str that UTF-8 can write."""
    text(value, function, name)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{function}: {name} {value[:40]!r} holds a lone surrogate") from None
    return value


def flag(value, function, name):
    if not isinstance(value, bool):
        raise TypeError(f"{function}: {name} is {kind(value)}; it must be True or False")
    return value


def whole(value, function, name, least=0):
    """An int of at least `least`; numpy's count, bools and floats do not."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{function}: {name} is {kind(value)}; it must be an int of at least {least}")
    try:
        value = value.__index__()
    except TypeError as error:  # such as an array of several
        raise TypeError(f"{function}: {name} is {kind(value)}; it must be an int of at least {least}") from error
    if value < least:
        raise ValueError(f"{function}: {name}={value}; it must be at least {least}")
    return value


def one_of(choices, value, function, name):
    if not isinstance(value, str) or value not in choices:
        raise (ValueError if isinstance(value, str) else TypeError)(
            f"{function}: {name}={value!r}; it must be one of {', '.join(map(repr, choices))}"
        )
    return value


def error_handler(value, function, name="errors"):
    text(value, function, name)
    try:
        codecs.lookup_error(value)
    except (LookupError, ValueError):
        raise ValueError(f"{function}: {name}={value!r}; it must name what bytes.decode does with errors") from None
    return value


def special(value, function, name):
    """A set of special tokens, or "all"."""
    if isinstance(value, str) and value == "all":
        return value
    is_collection = isinstance(value, (list, tuple, set, frozenset, dict)) and all(isinstance(t, str) for t in value)
    if not is_collection:
        raise TypeError(f'{function}: {name} is {kind(value)}; it must be "all" or a set of special tokens')
    return value


def token(value, function, name="token"):
    """The content of a token to add: a str, or an AddedToken of Hugging Face's that wants nothing unusual."""
    is_str = isinstance(value, str)
    content = value if is_str else getattr(value, "content", None)
    if not isinstance(content, str) or not content:
        raise TypeError(f"{function}: {name} {value!r}; it must be a non-empty str")
    unusual = [option for option in ("lstrip", "rstrip", "single_word") if getattr(value, option, False)]
    if unusual and not is_str:
        raise ValueError(f"{function}: {name} {content!r} has {', '.join(unusual)}, which is not supported")
    return encodable(content, function, name)


def path(value, function, name):
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise TypeError(f"{function}: {name} is {value!r}; it must be a path, as str or os.PathLike")
    try:
        is_path = b"\0" not in os.fsencode(value)
    except UnicodeEncodeError:
        is_path = False
    if not is_path:
        raise ValueError(f"{function}: {name} {value!r} holds a character that no path has")
    return value


def ids(value, function, name="ids"):
    """Ids as a list of int or the like, from an int, a sequence, or an array or a tensor of one dimension.

    Of the items only the first is looked at; whoever looks the others up finds what is no id, see `not_an_id`.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, int):
        value = [value]
    elif isinstance(value, (bytes, bytearray)):
        value = list(value)  # array("I", value) would take four for one
    elif isinstance(value, (str, dict)) or not (hasattr(value, "__getitem__") and hasattr(value, "__len__")):
        raise TypeError(f"{function}: {name} is {kind(value)}; it must be an int or a list of int")
    if len(value) and isinstance(value[0], bool):
        raise not_an_id(value, function, name)
    return value


def not_an_id(value, function, name="ids"):
    """The error for the first of ids that is none."""
    for id in value:
        if isinstance(id, (list, tuple)) or getattr(id, "ndim", None):
            return TypeError(f"{function}: {name} has rows; one row is required (batch_decode takes several)")
        if isinstance(id, bool) or not hasattr(id, "__index__"):
            return TypeError(f"{function}: an id is {type(id).__name__}; {name} must be int")
        if int(id) < 0:
            return ValueError(f"{function}: id {int(id)} is not in the vocabulary; ids go from 0")
    return None


def rows(value, function, name):
    """Something to go through row by row: a list, an array or a tensor."""
    if isinstance(value, (str, bytes, dict, set)) or not hasattr(value, "__len__") or not hasattr(value, "__getitem__"):
        raise TypeError(f"{function}: {name} is {kind(value)}; it must be a list of rows of ids")
    if getattr(value, "ndim", 1) == 0:
        raise TypeError(f"{function}: {name} has no dimension; it must be rows of ids")
    return value
