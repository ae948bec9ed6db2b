"""Whether Python finds the packages that lie beside this one: on PyPI others have the same names."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def require(package):
    """Raises ImportError, with the remedy, unless `package` is the one that lies beside this package."""
    spec = importlib.util.find_spec(package)
    found = None if spec is None or spec.origin is None else Path(spec.origin).resolve().parent
    if found != ROOT / package:
        raise ImportError(
            f"{__package__} needs the package {package} in {ROOT}, but Python finds another of that name, {found} "
            f"(Hugging Face's is called kernels, too): run from {ROOT}, put that directory first in PYTHONPATH, or use "
            "an environment without the other package",
            name=package,
        )
