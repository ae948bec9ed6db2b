"""Whether Python finds the packages that lie beside this one: on PyPI others have the same names."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def require(package):
    """Raises ImportError, with the remedy, unless `package` is the one that lies beside this package."""
    spec = importlib.util.find_spec(package)
    places = [] if spec is None else spec.submodule_search_locations or [spec.origin]
    found = [Path(place).resolve() for place in places]
    if found != [ROOT / package]:
        raise ImportError(
            f"{__package__} needs the package {package} in {ROOT}, but Python finds {found[0] if found else 'none'} "
            f"(Hugging Face has a package kernels, too): run from {ROOT}, put that directory first in PYTHONPATH, or "
            "use an environment without the other package",
            name=package,
        )
