"""Renews constraints.txt from the packages of the environment that runs this, and prints what changed: `make pins`."""

import re
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

OURS, EXTRAS = "gpt2-triton", ("test", "notebooks")
FILE = Path(__file__).parents[1] / "constraints.txt"


def installed_for_us():
    """{name: version} of all that our package and its extras bring with them, in this environment."""
    found, waiting = {}, [(OURS, extra) for extra in EXTRAS]
    seen = set()
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            package = distribution(name)
        except PackageNotFoundError:
            continue  # of another platform
        found[canonicalize_name(name)] = package.version.partition("+")[0]
        for line in package.requires or ():
            need = Requirement(line)
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                waiting += [(canonicalize_name(need.name), more) for more in ("", *need.extras)]
    found.pop(OURS, None)
    return found


def pinned(text):
    """{name: version} of the lines that hold for this Python."""
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    holding = [need for need in map(Requirement, lines) if need.marker is None or need.marker.evaluate()]
    return {canonicalize_name(need.name): str(need.specifier).removeprefix("==") for need in holding}


def renewed(text, packages):
    """The file with the versions of `packages`; those that it does not name yet are added for this Python alone."""
    lines, known = [], set()
    for line in text.splitlines():
        need = None if not line or line.startswith("#") else Requirement(line)
        if need is not None and (need.marker is None or need.marker.evaluate()):
            name = canonicalize_name(need.name)
            if name not in packages:
                continue
            known.add(name)
            line = re.sub(r"==[^;\s]+", f"=={packages[name]}", line)
        lines.append(line)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    lines += [f'{name}=={packages[name]}; python_version == "{python}"' for name in sorted(packages.keys() - known)]
    return "\n".join(lines) + "\n"


def main():
    packages, before = installed_for_us(), FILE.read_text()
    if not packages:
        sys.exit(f"pins: {OURS} is not installed in {sys.prefix}; run `make pins`")
    after = renewed(before, packages)
    old, new = pinned(before), pinned(after)
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            print(f"{name}: {old.get(name, 'not pinned')} -> {new.get(name, 'gone')}")
    FILE.write_text(after)
    print(f"{len(new)} packages are pinned for Python {sys.version_info.major}.{sys.version_info.minor}")


if __name__ == "__main__":
    main()
