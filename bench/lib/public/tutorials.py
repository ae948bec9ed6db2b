"""Triton's tutorials: TRITON_TUTORIALS is the folder python/tutorials of a checkout of its repository.

They are scripts, which compute and time things at length as they run. Here each is read for its imports, functions and
classes alone, and for what it assigns with them so far, so that one call can be made.
"""

import ast
import hashlib
import os
import sys
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F

from bench.lib.public.cases import VERSIONS, case

TUTORIALS = "triton's tutorials"
VARIABLE = "TRITON_TUTORIALS"
_KEPT = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.Try)


def version():
    """A hash of the scripts, or None where there are none."""
    folder = os.environ.get(VARIABLE)
    scripts = sorted(Path(folder).glob("[0-9]*.py")) if folder else []
    text = b"".join(script.read_bytes() for script in scripts)
    return hashlib.sha256(text).hexdigest()[:12] if scripts else None


VERSIONS[TUTORIALS] = version


def definitions(name):
    """The module of what DIR/name.py defines. What is decorated as a benchmark, or needs what was left out, is not."""
    path = Path(os.environ[VARIABLE], f"{name}.py")
    module = ModuleType(f"tutorial_{name[:2]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # Triton looks for a kernel's module there
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in tree.body:
        decorators = ast.dump(ast.List([*getattr(node, "decorator_list", [])], ast.Load()))
        calls = {call.func.id for call in ast.walk(node) if isinstance(call, ast.Call) and hasattr(call.func, "id")}
        computes = isinstance(node, ast.Assign) and calls & own
        if not isinstance(node, _KEPT) or "perf_report" in decorators or computes:
            continue
        try:
            exec(compile(ast.Module([node], []), str(path), "exec"), vars(module))
        except NameError:
            if not isinstance(node, ast.Assign):
                raise
    return module


@case(TUTORIALS, "01, vector addition", "1025", torch.float32, gradients=False)
def addition(randn):
    return {"x": randn(1025), "y": randn(1025)}, definitions("01-vector-add").add, torch.add


@case(TUTORIALS, "03, matrix product", "150 x 70 by 70 x 300", torch.float16, gradients=False)
def matrix_product(randn):
    return {"a": randn(150, 70), "b": randn(70, 300)}, definitions("03-matrix-multiplication").matmul, torch.matmul


@case(TUTORIALS, "05, LayerNorm, rows that share locks", "300 x 770", torch.float16)
def layer_norm(randn):
    module = definitions("05-layer-norm")
    return (
        {"x": randn(300, 770), "weight": randn(770), "bias": randn(770)},
        lambda x, weight, bias: module.layer_norm(x, weight.shape, weight, bias, 1e-5),
        lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias, 1e-5),
    )
