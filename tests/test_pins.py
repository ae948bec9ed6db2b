"""constraints.txt pins every package that CI installs, for the Pythons on which it was tested."""

import sys

import pins
import pytest

TEXT = """# Kept.
torch==2.13.0
numpy==2.0.0; python_version < "3.0"
gone==1.0

"""


def test_pins_are_renewed_added_and_dropped():
    text = pins.renewed(TEXT, {"torch": "2.14.0", "numpy": "2.5.0"})
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert text == (
        f'# Kept.\ntorch==2.14.0\nnumpy==2.0.0; python_version < "3.0"\n\nnumpy==2.5.0; python_version == "{python}"\n'
    )
    assert pins.pinned(text) == {"torch": "2.14.0", "numpy": "2.5.0"}


def test_all_that_is_installed_for_us_is_pinned():
    packages = pins.installed_for_us()
    if not packages:
        pytest.skip(f"{pins.OURS} is not installed here")
    if sys.version_info[:2] != (3, 11):
        pytest.skip("every package is pinned for Python 3.11 alone")
    known = pins.pinned(pins.FILE.read_text())
    assert {name: known.get(name) for name in packages} == packages
