"""Rewrites single rows of the table in kernels/configs.py, and leaves all else as it was."""

import ast
import re
from dataclasses import astuple

from kernels.configs import ATTENTION, AttentionConfig


def rewritten(source, name, key, row, note):
    """`source` of kernels/configs.py with a new row `key` of the family `name`, all else as it was.

    row: {largest head dim: config}, merged into what the row has. `note` stands above it for each of these head
    dims, in the place of an earlier one. A row that the family shares with others gets a line of its own.
    """
    lines = source.splitlines()
    above, first, last, present = _row_in(source, name, key)
    notes = {int(_NOTE.match(line)[1]): line for line in lines[above:first]}
    notes |= {head_dim: f"        # D = {head_dim}: {note}" for head_dim in row}
    merged = present | row
    entries = ", ".join(f"{limit}: C({', '.join(map(str, astuple(config)))})" for limit, config in merged.items())
    text = f'        ("{key[0]}", {key[1]}): {{{entries}}},'
    lines[above:last] = [*(notes[head_dim] for head_dim in sorted(notes)), text]
    return "\n".join(lines) + "\n"


def with_notes(source, name, key):
    """The lines of a row, its notes above it."""
    above, _, last, _ = _row_in(source, name, key)
    return source.splitlines()[above:last]


_NOTE = re.compile(r"\s*# D = (\d+): ")


def _row_in(source, name, key):
    """A family's row: the indices of its first note, of its first line and of the line after it, and what it holds.

    All three are the family's end where it has no row of its own; it holds what ATTENTION has, then.
    """
    (table,) = (
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "ATTENTION"
    )
    (rows,) = (value for k, value in zip(table.keys, table.values) if k.value == name)
    first = last = rows.end_lineno - 1
    present = ATTENTION[name][key]
    for k, value in zip(rows.keys, rows.values):
        if k is not None and ast.literal_eval(k) == key:
            first, last = k.lineno - 1, value.end_lineno
            configs = (AttentionConfig(*map(ast.literal_eval, call.args)) for call in value.values)
            present = dict(zip(map(ast.literal_eval, value.keys), configs))
    lines, above = source.splitlines(), first
    while _NOTE.match(lines[above - 1]):
        above -= 1
    return above, first, last, present
