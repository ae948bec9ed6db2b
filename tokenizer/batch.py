"""What calling a tokenizer returns: a dict of equally long rows, in lists, NumPy arrays or torch tensors."""

PADDING = {True: "longest", "longest": "longest", "max_length": "max_length"} | dict.fromkeys(
    [False, None, "do_not_pad"]
)


class BatchEncoding(dict):
    """`input_ids`, `attention_mask` and what else was asked for. Unpacks with **, reads as attributes too."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"BatchEncoding: no {name!r}; it has {', '.join(self)}") from None

    def to(self, device, non_blocking=False):
        """Moves the tensors to a device, in place, and returns itself, as in Hugging Face."""
        for name, value in self.items():
            if hasattr(value, "to"):
                self[name] = value.to(device, non_blocking=non_blocking)
        return self


def pad(columns, length, pad_values, side):
    """Pads each row of each column ({name: [row, ...]}) to a length, in place."""
    for name, rows in columns.items():
        for i, row in enumerate(rows):
            filling = [pad_values[name]] * (length - len(row))
            rows[i] = filling + row if side == "left" else row + filling


def padded_length(rows, padding, max_length, multiple):
    """The length to pad rows to: the longest row's, or max_length, rounded up to a multiple."""
    longest = max(map(len, rows), default=0)
    length = max_length if padding == "max_length" else longest
    if multiple:
        length = -(-length // multiple) * multiple
    return max(length, longest)


def as_tensors(columns, return_tensors):
    """Turns rows into what `return_tensors` names: None (lists), "np" (int64 arrays) or "pt" (int64 tensors)."""
    if return_tensors is None:
        return columns
    if return_tensors not in ("np", "pt"):
        raise ValueError(f'GPT2Tokenizer: return_tensors={return_tensors!r}; it must be "pt", "np" or None')
    for rows in columns.values():
        if len({len(row) for row in rows if isinstance(row, list)}) > 1:
            raise ValueError(
                f"GPT2Tokenizer: rows of {min(map(len, rows))} to {max(map(len, rows))} tokens do not fit one tensor; "
                "pass padding=True or truncation=True with max_length="
            )
    if return_tensors == "np":
        import numpy

        return {name: numpy.array(rows, dtype=numpy.int64) for name, rows in columns.items()}
    import torch

    return {name: torch.tensor(rows, dtype=torch.int64) for name, rows in columns.items()}
