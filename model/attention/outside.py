"""Backends that a command is told of: --import MODULE."""

import argparse
import importlib
import sys


def add_import_option(parser):
    """Gives a command --import MODULE, for a module that registers attention backends; it is imported at once."""
    parser.add_argument(
        "--import",
        dest="imported",
        type=_import,
        action="append",
        metavar="MODULE",
        help="import a module that registers attention backends of your own; may be given several times",
    )


def _import(name):
    """The module, found from the current directory too."""
    if "" not in sys.path:
        sys.path.append("")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there; what it needs is not
        raise argparse.ArgumentTypeError(
            f"there is no module {name!r} in the current directory or among those installed"
        ) from error
