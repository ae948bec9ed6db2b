"""Package metadata: what is installed, for which versions. Tool configuration stands in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.install import install

REFUSAL = (
    "gpt2-triton is not installed by copying: its packages are called kernels, model, tokenizer and bench, as others "
    "on PyPI are, and the copies would overwrite their files. Run it from its checkout, or link it: pip install -e ."
)


class NoWheel(bdist_wheel):
    """An editable install needs the command, but does not run it."""

    def run(self):
        raise SystemExit(REFUSAL)


class NoInstall(install):
    def run(self):
        raise SystemExit(REFUSAL)


setup(
    name="gpt2-triton",
    # Stays below Hugging Face's own `kernels` package, whose import name we share: see tests/test_packaging.py.
    version="0.1.0",
    description="GPT-2 on hand-written Triton kernels, with the references to judge them by",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    cmdclass={"bdist_wheel": NoWheel, "install": NoInstall},
    packages=find_packages(include=["kernels*", "model*", "tokenizer*", "bench*"]),
    package_data={
        "": ["py.typed", "**/*.md"],
        "tokenizer": ["vocab.bpe", "LICENSE*"],
        "model": ["write/page.html"],
    },
    install_requires=[
        "torch>=2.11,<2.16",
        "triton>=3.6,<3.10; platform_system == 'Linux'",
        "numpy>=1.26",
        "safetensors>=0.4.3",
        "huggingface_hub>=0.27",
        "matplotlib>=3.8",
        "tqdm>=4.66",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "setuptools>=70.1",
            "pytest-xdist>=3.5",
            "ruff>=0.8",
            "mypy>=1.15",
            "hypothesis>=6.100",
            "transformers>=4.56",
            "tiktoken>=0.7",
            "tokenizers>=0.20",
            "liger-kernel>=0.6",
        ],
        "public": ["liger-kernel>=0.6", "fla-core>=0.6"],  # python bench/public_kernels.py runs their kernels
        "h5": ["h5py>=3.10"],  # python -m model.convert reads tf_model.h5 by it
        "jupyter": ["jupyterlab>=4", "ipykernel>=6.29"],  # pip install -e '.[jupyter]'; jupyter lab notebooks
        "notebooks": ["nbclient>=0.10", "nbformat>=5.10", "ipykernel>=6.29"],
    },
)
