"""`pytest -p hiding`: a run in which the optional packages are not there, installed or not."""

from importlib.machinery import PathFinder

HIDDEN = {
    "flash_attn",
    "hypothesis",
    "ipykernel",
    "liger_kernel",
    "nbclient",
    "nbformat",
    "ruff",
    "tiktoken",
    "tokenizers",
    "transformers",
}
_find_spec = PathFinder.find_spec


def _find_what_is_not_hidden(name, path=None, target=None):
    return None if name.partition(".")[0] in HIDDEN else _find_spec(name, path, target)


PathFinder.find_spec = _find_what_is_not_hidden
