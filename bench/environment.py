"""What a bug report needs: device, driver, versions, commit, and what serves here.

python bench/environment.py
python -m bench.environment
"""

import importlib.metadata
import sys
from pathlib import Path

if not __package__:  # run by its path: the checkout is found from there
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from bench.lib.record import environment_of
from model.attention import attention_backends

PACKAGES = (
    "numpy",
    "safetensors",
    "huggingface_hub",
    "transformers",
    "tokenizers",
    "tiktoken",
    "flash_attn",
    "liger_kernel",
)


def main():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = environment_of(device, "bench/environment.py")
    for name in ("command", "load"):
        del found[name]
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        found["gpu memory"] = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        found["compute capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["attention backends"] = ", ".join(attention_backends())
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {'unknown' if value is None else value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
