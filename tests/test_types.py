"""Whoever imports the packages gets types: what is public says what it takes and gives; `make lint` checks them."""

import importlib
import inspect
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("kernels", "model", "tokenizer")


def is_ours(value):
    return value.__module__.partition(".")[0] in PACKAGES


def functions(name, value):
    """(name, function) of a public function, or of the public methods and properties of a class and its bases."""
    if inspect.isfunction(value):
        yield name, value
    for base in filter(is_ours, inspect.getmro(value) if inspect.isclass(value) else ()):
        for attribute, member in vars(base).items():
            if attribute.startswith("_") and attribute not in ("__init__", "__call__", "__len__"):
                continue
            member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if inspect.isfunction(member):
                yield f"{base.__qualname__}.{attribute}", member


@pytest.mark.parametrize("package", PACKAGES)
def test_what_is_public_is_annotated(package):
    module = importlib.import_module(package)
    found = dict(pair for name in module.__all__ for pair in functions(name, getattr(module, name)))
    assert len(found) > 5
    bare = {}
    for name, function in found.items():
        signature = inspect.signature(function)
        missing = [p.name for p in signature.parameters.values() if p.annotation is p.empty]
        missing = [parameter for parameter in missing if parameter not in ("self", "cls")]
        if missing or signature.return_annotation is signature.empty:
            bare[name] = missing
    assert bare == {}


@pytest.mark.parametrize("package", [*PACKAGES, "bench"])
def test_each_package_says_that_it_has_types(package):
    assert (ROOT / package / "py.typed").is_file()
