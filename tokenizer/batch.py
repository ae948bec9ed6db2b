"""What calling a tokenizer does beyond encoding: pairs, truncation, padding, and rows as lists, arrays or tensors."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from . import checks

FUNCTION = "GPT2Tokenizer"
SIDES = ("left", "right")
PADDING = {True: "longest", False: None, None: None, "longest": "longest", "max_length": "max_length"}
PADDING["do_not_pad"] = None
TRUNCATION = {True: "longest_first", False: None, "do_not_truncate": None}
TRUNCATION |= {name: name for name in ("longest_first", "only_first", "only_second")}
# What a tokenizer makes, as opposed to what a caller's own rows hold beside it, such as labels.
COLUMNS = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "special_tokens_mask",
    "offset_mapping",
    "length",
    "overflow_to_sample_mapping",
)


class BatchEncoding(dict):
    """`input_ids`, `attention_mask` and what else was asked for. Unpacks with **, reads as attributes too."""

    _tokenizer: Any = None
    _rows: Sequence = ()

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"BatchEncoding: no {name!r}; it has {', '.join(self)}") from None

    def __reduce__(self):
        """Sent to another process it leaves the tokenizer behind."""
        return BatchEncoding, (dict(self),)

    def to(self, device: Any, non_blocking: bool = False) -> "BatchEncoding":
        """Moves the tensors to a device, in place, and returns itself, as in Hugging Face."""
        for name, value in self.items():
            if hasattr(value, "to"):
                self[name] = value.to(device, non_blocking=non_blocking)
        return self

    def tokens(self, batch_index: int = 0) -> list[str]:
        """The tokens of a row, as spelled in `vocab.json`, padding included."""
        row = self._row(batch_index, "tokens")
        ids = self["input_ids"] if len(self._rows) == 1 and not _has_rows(self["input_ids"]) else self["input_ids"][row]
        return self._tokenizer.convert_ids_to_tokens(ids)

    def sequence_ids(self, batch_index: int = 0) -> list:
        """Of each token of a row: 0 if it is of the text, 1 if of its pair, None if it is padding."""
        left, first, second, right = self._rows[self._row(batch_index, "sequence_ids")]
        return [None] * left + [0] * first + [1] * second + [None] * right

    def _row(self, index, function):
        function = f"BatchEncoding.{function}"
        if self._tokenizer is None:
            raise ValueError(f"{function}: it was made without a tokenizer, or copied; call the tokenizer for it")
        checks.whole(index, function, "batch_index", -len(self._rows))
        if index >= len(self._rows):
            raise ValueError(f"{function}: batch_index={index}; there are {len(self._rows)} rows")
        return index


class Part(NamedTuple):
    """Tokens of one text. offsets: (start, end) characters of each, or None where nobody asked."""

    ids: list
    offsets: list | None

    def __getitem__(self, which):
        return Part(self.ids[which], self.offsets and self.offsets[which])


class Fit(NamedTuple):
    """How rows are made to fit."""

    padding: str | None
    truncation: str | None
    max_length: int | None
    stride: int
    multiple: int | None
    padding_side: str
    truncation_side: str


def fit(tokenizer, *, padding, truncation, max_length, stride, pad_to_multiple_of, padding_side, function=FUNCTION):
    """A Fit of what a caller asks for, checked."""
    if not isinstance(padding, (bool, str, type(None))) or padding not in PADDING:
        raise ValueError(f'{function}: padding={padding!r}; it must be True, "longest", "max_length" or False')
    padding = PADDING[padding]
    if padding and tokenizer.pad_token is None:
        raise ValueError(
            f"{function}: GPT-2 has no padding token, and padding was asked for; choose one with "
            "tokenizer.pad_token = tokenizer.eos_token or tokenizer.add_special_tokens({'pad_token': '[PAD]'})"
        )
    if max_length is not None:
        max_length = checks.whole(max_length, function, "max_length")
    if truncation is None:  # then a max_length asks for it, unless it is there for the padding
        truncation = max_length is not None and padding is None
        if max_length is not None and padding == "longest":
            raise ValueError(
                f"{function}: max_length={max_length} with padding to the longest row has no effect; "
                'pass truncation=True, or padding="max_length"'
            )
    if not isinstance(truncation, (bool, str)) or truncation not in TRUNCATION:
        raise ValueError(
            f"{function}: truncation={truncation!r}; it must be True, False, "
            '"longest_first", "only_first" or "only_second"'
        )
    truncation = TRUNCATION[truncation]
    if max_length is None and (truncation or padding == "max_length"):
        max_length = tokenizer.model_max_length
        if max_length is None:
            raise ValueError(f"{function}: no max_length was given and this tokenizer has no model_max_length")
    stride = checks.whole(stride, function, "stride")
    if stride and truncation and 0 < max_length <= stride:
        raise ValueError(f"{function}: stride={stride}; it must be less than max_length={max_length}")
    if pad_to_multiple_of is not None:
        pad_to_multiple_of = checks.whole(pad_to_multiple_of, function, "pad_to_multiple_of", 1)
        if truncation and padding and max_length % pad_to_multiple_of:
            raise ValueError(
                f"{function}: max_length={max_length} is no multiple of pad_to_multiple_of={pad_to_multiple_of}"
            )
    if padding_side is not None:
        checks.one_of(SIDES, padding_side, function, "padding_side")
    side = tokenizer.padding_side if padding_side is None else padding_side
    return Fit(padding, truncation, max_length, stride, pad_to_multiple_of, side, tokenizer.truncation_side)


def texts_of(text, text_pair):
    """(texts, their pairs or None, whether it is one text alone) of what a tokenizer is called with."""
    if isinstance(text, str):
        if text_pair is not None:
            checks.text(text_pair, FUNCTION, "text_pair")
        return [text], [text_pair], True
    wrong = TypeError(f"{FUNCTION}: text is {checks.kind(text)}; it must be str or a list of str")
    if not isinstance(text, (list, tuple)):
        raise wrong
    if text_pair is None:
        if set(map(type, text)) <= {str}:
            return text, [None] * len(text), False
        firsts, seconds = [], []
        for item in text:
            pair = (item, None) if isinstance(item, str) else item
            is_pair = isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str)
            if not is_pair or not isinstance(pair[1], (str, type(None))):
                raise wrong
            firsts.append(pair[0])
            seconds.append(pair[1])
        return firsts, seconds, False
    if not all(isinstance(item, str) for item in text):
        raise wrong
    seconds = checks.texts(text_pair, FUNCTION, "text_pair")
    if len(seconds) != len(text):
        raise ValueError(f"{FUNCTION}: text has {len(text)} texts, text_pair {len(seconds)}; they must be as many")
    return text, seconds, False


def truncated(first, second, fit):
    """[(first, second), ...]: two Parts, the second perhaps None, cut to fit; what is cut off follows, in order."""
    length, limit = len(first.ids) + len(second.ids if second else ()), fit.max_length
    if fit.truncation is None or length <= limit:
        return [(first, second)]
    if second is None:
        if fit.truncation == "only_second":
            raise ValueError(f'{FUNCTION}: truncation="only_second", and there is no second text')
        return [(chunk, None) for chunk in _chunks(first, limit, fit)]
    a, b = len(first.ids), len(second.ids)
    if limit == 0:
        a = b = 0
    elif fit.truncation == "longest_first":
        shorter = min(a, b)
        longer = max(shorter, limit - shorter)
        if shorter + longer > limit:
            shorter, longer = limit // 2, limit - limit // 2
        a, b = (longer, shorter) if a > b else (shorter, longer)
    else:
        other = b if fit.truncation == "only_first" else a
        if limit <= other:
            raise ValueError(
                f'{FUNCTION}: truncation="{fit.truncation}" to max_length={limit}, '
                f"and the other text alone has {other} tokens"
            )
        a, b = (limit - other, other) if fit.truncation == "only_first" else (other, limit - other)
    firsts, seconds = _chunks(first, a, fit), _chunks(second, b, fit)
    overflow = [(one, other) for one in firsts[1:] for other in seconds]
    return [(firsts[0], seconds[0]), *overflow, *((firsts[0], other) for other in seconds[1:])]


def _chunks(part, length, fit):
    """Parts of `length` tokens of which each takes up the last `stride` of the one before it."""
    n, step = len(part.ids), length - fit.stride
    if n <= length:
        return [part]
    if length == 0:
        return [part[:0], part]
    if step <= 0:
        raise ValueError(f"{FUNCTION}: stride={fit.stride}; it must be less than the {length} tokens that are kept")
    starts = range(0, n - fit.stride, step)  # the last one reaches the end
    if fit.truncation_side == "right":
        return [part[start : start + length] for start in starts]
    return [part[max(0, n - start - length) : n - start] for start in starts]


def columns_of(rows, wanted):
    """{name: [row, ...]} of rows of (first Part, second Part or None). wanted: names besides input_ids."""
    columns = {"input_ids": [first.ids + second.ids if second else first.ids for first, second in rows]}
    lengths = [(len(first.ids), len(second.ids) if second else 0) for first, second in rows]
    if "token_type_ids" in wanted:
        columns["token_type_ids"] = [[0] * a + [1] * b for a, b in lengths]
    if "attention_mask" in wanted:
        columns["attention_mask"] = [[1] * (a + b) for a, b in lengths]
    if "special_tokens_mask" in wanted:  # of tokens put around a text: GPT-2 has none
        columns["special_tokens_mask"] = [[0] * (a + b) for a, b in lengths]
    if "offset_mapping" in wanted:
        columns["offset_mapping"] = [
            first.offsets + second.offsets if second else first.offsets for first, second in rows
        ]
    return columns, lengths


def pad(columns, fit, pad_id):
    """Pads the rows of columns ({name: [row, ...]}) in place; returns (left, right) paddings of each."""
    rows = columns["input_ids"]
    if not fit.padding:
        return [(0, 0)] * len(rows)
    length = fit.max_length if fit.padding == "max_length" else max(map(len, rows), default=0)
    if fit.multiple:
        length = -(-length // fit.multiple) * fit.multiple
    missing = [max(0, length - len(row)) for row in rows]
    pad_values = {"input_ids": pad_id, "attention_mask": 0, "token_type_ids": 0, "special_tokens_mask": 1}
    pad_values["offset_mapping"] = (0, 0)
    for name in columns.keys() & pad_values:
        for i, row in enumerate(columns[name]):
            filling = [pad_values[name]] * missing[i]
            columns[name][i] = filling + row if fit.padding_side == "left" else row + filling
    return [(n, 0) if fit.padding_side == "left" else (0, n) for n in missing]


def pad_encoded(tokenizer, encoded, fit, return_attention_mask, return_tensors):
    """A BatchEncoding of rows that are encoded already, padded; see GPT2Tokenizer.pad."""
    function = "GPT2Tokenizer.pad"
    if isinstance(encoded, (list, tuple)) and all(hasattr(row, "keys") for row in encoded) and encoded:
        names = list(encoded[0].keys())
        if any(list(row.keys()) != names for row in encoded):
            raise ValueError(f"{function}: encoded_inputs has rows with different keys")
        encoded = {name: [row[name] for row in encoded] for name in names}
    if not hasattr(encoded, "keys") or "input_ids" not in encoded:
        raise (ValueError if hasattr(encoded, "keys") else TypeError)(
            f"{function}: encoded_inputs is {checks.kind(encoded)}; it must be a dict with input_ids, or a list of such"
        )
    columns, kinds = {}, set()
    for name in encoded:
        columns[name], kind = _as_lists(encoded[name], function, name)
        kinds.add(kind)
    rows = columns["input_ids"]
    is_one = not _has_rows(rows) and len(rows) > 0
    if is_one:
        columns = {name: [row] for name, row in columns.items()}
        rows = columns["input_ids"]
    for name, column in columns.items():
        if not isinstance(column, list) or len(column) != len(rows):
            raise ValueError(f"{function}: {name} must be a list with a row for each of the {len(rows)} of input_ids")
        if name in ("input_ids", "attention_mask", "token_type_ids", "special_tokens_mask"):
            for row, ids in zip(column, rows):
                if not isinstance(row, list) or any(type(item) is not int for item in row):
                    raise TypeError(f"{function}: {name} has a row of {checks.kind(row)}; it must be a list of int")
                if len(row) != len(ids):
                    raise ValueError(f"{function}: a row of {len(ids)} input_ids has {len(row)} of {name}")
    columns = {name: list(column) for name, column in columns.items()}
    if return_attention_mask and "attention_mask" not in columns:
        columns["attention_mask"] = [[1] * len(row) for row in rows]
    lengths = [(len(row), 0) for row in rows]
    paddings = pad(columns, fit, tokenizer.pad_token_id)
    if return_tensors is None:
        return_tensors = "pt" if "pt" in kinds else "np" if "np" in kinds else None
    if is_one:
        columns = {name: rows[0] for name, rows in columns.items()}
    return encoding(tokenizer, as_tensors(columns, return_tensors, function), lengths, paddings)


def encoding(tokenizer, columns, lengths, paddings):
    """A BatchEncoding that knows whose tokens it holds, and where."""
    made = BatchEncoding(columns)
    made.__dict__["_tokenizer"] = tokenizer
    made.__dict__["_rows"] = [(left, *pair, right) for pair, (left, right) in zip(lengths, paddings)]
    return made


def as_tensors(columns, return_tensors, function=FUNCTION):
    """Turns rows into what `return_tensors` names: None (lists), "np" (int64 arrays) or "pt" (int64 tensors)."""
    if return_tensors is None:
        return columns
    if not isinstance(return_tensors, str) or return_tensors not in ("np", "pt"):
        raise ValueError(f'{function}: return_tensors={return_tensors!r}; it must be "pt", "np" or None')
    for name, rows in columns.items():
        if len({len(row) for row in rows if isinstance(row, list)}) > 1:
            raise ValueError(
                f"{function}: rows of {min(map(len, rows))} to {max(map(len, rows))} tokens in {name} "
                "do not fit one tensor; pass padding=True or truncation=True with max_length="
            )
    if return_tensors == "np":
        import numpy

        return {name: numpy.array(rows, numpy.int64 if name in COLUMNS else None) for name, rows in columns.items()}
    import torch

    return {name: torch.tensor(rows, dtype=torch.int64 if name in COLUMNS else None) for name, rows in columns.items()}


def _as_lists(value, function, name):
    """(rows as lists, "pt", "np" or None by what they were)."""
    kind = None
    for item in (value, *(value[:1] if isinstance(value, (list, tuple)) else ())):
        if hasattr(item, "tolist"):
            kind = "pt" if hasattr(item, "is_contiguous") else "np"
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, (list, tuple)):
        if name == "input_ids":
            raise TypeError(f"{function}: input_ids is {checks.kind(value)}; it must be a list")
        return value, kind  # such as a label of one row
    return [
        row.tolist() if hasattr(row, "tolist") else list(row) if isinstance(row, (list, tuple)) else row
        for row in value
    ], kind


def _has_rows(value):
    return (len(value) > 0 and hasattr(value[0], "__len__")) or getattr(value, "ndim", 1) > 1
