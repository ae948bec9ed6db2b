"""Packages that tests take as peers and that need not be here: what uses one that is missing is skipped, and says so.

    from optional import transformers

    def test_something():
        transformers.GPT2Config()   # skips the test where transformers is not installed

At the top of a module an attribute of one skips the module.
"""

import importlib.util

import pytest


def needs(*names):
    """The mark of a test that does not touch these packages itself and needs them nevertheless."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{' and '.join(missing)} not installed")


class Optional:
    """Stands for a package, or a module of one, until an attribute of it is asked for."""

    def __init__(self, name):
        self._name = name

    def __getattr__(self, attribute):
        if attribute.startswith("_"):  # pytest looks for such names in whatever a test module holds
            raise AttributeError(attribute)
        module = pytest.importorskip(self._name, reason=f"{self._name.partition('.')[0]} is not installed")
        if not hasattr(module, attribute) and importlib.util.find_spec(f"{self._name}.{attribute}"):
            return Optional(f"{self._name}.{attribute}")
        return getattr(module, attribute)


hypothesis = Optional("hypothesis")
liger_kernel = Optional("liger_kernel")
nbclient = Optional("nbclient")
nbformat = Optional("nbformat")
tiktoken = Optional("tiktoken")
tokenizers = Optional("tokenizers")
transformers = Optional("transformers")
