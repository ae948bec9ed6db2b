"""GPT2Tokenizer: the names and meanings of Hugging Face's tokenizer and of tiktoken's, in one class."""

import os
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain
from typing import Any

from . import batch, checks, files
from .batch import SIDES
from .bpe import BytePairEncoder
from .long_text.borders import FinePieces
from .long_text.memo import Memo
from .special import ROLES, Role, RoleId, Setting, partition, split
from .stream import StreamDecoder
from .tiktoken_names import TiktokenNames
from .vocabulary import END_OF_TEXT, Vocabulary, gpt2_vocabulary, vocabulary_from_merges


def _side(value, function, name):
    return checks.one_of(SIDES, value, function, name)


def _length_or_none(value, function, name):
    return None if value is None else checks.whole(value, function, name, 1)


class GPT2Tokenizer(TiktokenNames):
    """Byte-level BPE with GPT-2's pattern, for GPT-2's vocabulary or another one.

    Any str without lone surrogates encodes, and decodes to itself. Threads may share a tokenizer but gain no speed, for
    one thread of Python runs at a time; to go wider, use processes.

    vocabulary: a Vocabulary; None is GPT-2's. errors: what decoding does with invalid UTF-8, as for `bytes.decode`.
    model_max_length: what `truncation=True` cuts to when no `max_length` is given; None is no limit. add_prefix_space:
    text that does not begin with a space gets one. bos_token, eos_token, unk_token, sep_token, pad_token, cls_token,
    mask_token: the token in each role, added where the vocabulary lacks it; None is no token. The first three are
    `<|endoftext|>` unless named. additional_special_tokens: special tokens without a role.
    """

    bos_token, eos_token, unk_token, sep_token, pad_token, cls_token, mask_token = (Role() for _ in ROLES)
    bos_token_id, eos_token_id, unk_token_id, sep_token_id, pad_token_id, cls_token_id, mask_token_id = (
        RoleId() for _ in ROLES
    )
    errors = Setting(checks.error_handler)
    model_max_length = Setting(_length_or_none)
    padding_side, truncation_side = Setting(_side), Setting(_side)
    add_prefix_space = Setting(checks.flag)

    def __init__(
        self,
        vocabulary: Any = None,
        *,
        errors: str = "replace",
        model_max_length: int | None = None,
        padding_side: str | None = "right",
        truncation_side: str = "right",
        add_prefix_space: bool = False,
        additional_special_tokens: Sequence[str] = (),
        **roles: Any,
    ) -> None:
        if vocabulary is not None and not isinstance(vocabulary, Vocabulary):
            raise TypeError(f"GPT2Tokenizer: vocabulary is {checks.kind(vocabulary)}; it must be a Vocabulary or None")
        self.name = "gpt2" if vocabulary is None else ""
        self.vocabulary = vocabulary = vocabulary or gpt2_vocabulary()
        self.errors, self.model_max_length, self.add_prefix_space = errors, model_max_length, add_prefix_space
        self.padding_side, self.truncation_side = padding_side, truncation_side
        self.special_tokens = {**vocabulary.special, **vocabulary.own}
        self.own_special_tokens = dict(vocabulary.own)  # of the user's own, recognised in text without being asked
        self.added_tokens = dict(vocabulary.added)  # added, but not special
        self.other_settings: dict = {}  # of a tokenizer_config.json, kept for the next one
        self.vocab_size = len(vocabulary.names) + len(vocabulary.special)

        ordinary = vocabulary.token_bytes()
        known = {}
        if vocabulary.consistent:
            known = {token.decode(): id for id, token in ordinary.items() if token.isascii()}
        encoder = BytePairEncoder(vocabulary.byte_ids, vocabulary.ranks, vocabulary.products)
        self._memo = Memo(encoder, known, FinePieces([*ordinary.values()]))
        added = {**self.special_tokens, **self.added_tokens}
        self._bytes = {id: token.encode() for token, id in added.items()} | ordinary
        self._tokens_changed()

        unknown = [role for role in roles if role not in ROLES]
        if unknown:
            raise TypeError(f"GPT2Tokenizer: unexpected argument {unknown[0]!r}")
        self.roles: dict[str, str] = {}
        if END_OF_TEXT in self.special_tokens:
            roles = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT) | roles
        for role in ROLES:
            token = roles.get(role)
            if token is not None:
                token = checks.token(token, "GPT2Tokenizer", role)
                if self._id_of(token) is None:
                    self.add_special_tokens({role: token})
            setattr(self, role, token)
        if not isinstance(additional_special_tokens, (list, tuple, type(None))):
            kind = checks.kind(additional_special_tokens)
            raise TypeError(f"GPT2Tokenizer: additional_special_tokens is {kind}; it must be a list of str")
        if additional_special_tokens:
            self.add_special_tokens({"additional_special_tokens": additional_special_tokens})

    def __repr__(self):
        return f"GPT2Tokenizer({len(self)} tokens, special: {', '.join(map(repr, self.special_tokens))})"

    # Loading and saving

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        **kwargs: Any,
    ) -> "GPT2Tokenizer":
        """Loads GPT-2's own vocabulary ("gpt2", its sizes, "distilgpt2": no network), a directory, or a hub repository.

        A directory or repository holds `tokenizer.json`, or `vocab.json` and `merges.txt`, of a byte-level BPE with
        GPT-2's pattern; anything else that such a file can say is refused with the reason. kwargs: as for the class,
        in place of what the files say.
        """
        function = "GPT2Tokenizer.from_pretrained"
        name = checks.path(pretrained_model_name_or_path, function, "pretrained_model_name_or_path")
        for argument, value in (("revision", revision), ("cache_dir", cache_dir)):
            if value is not None:
                checks.path(value, function, argument)
        if not isinstance(token, (str, bool, type(None))):
            raise TypeError(f"{function}: token is {checks.kind(token)}; it must be str, bool or None")
        checks.flag(local_files_only, function, "local_files_only")
        hub = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        vocabulary, settings, others = files.load(name, hub)
        if "extra_special_tokens" in kwargs:
            kwargs["additional_special_tokens"] = kwargs.pop("extra_special_tokens")
        try:
            loaded = cls(vocabulary, **settings)
        except (TypeError, ValueError) as error:
            reason = str(error).removeprefix("GPT2Tokenizer: ")
            raise ValueError(f"{function}: the tokenizer_config.json of {str(name)!r}: {reason}") from None
        if kwargs:
            loaded = cls(vocabulary, **settings | kwargs)
        loaded.name, loaded.other_settings = str(name), others
        return loaded

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        special_tokens: Sequence[str] = (END_OF_TEXT,),
        progress: bool = True,
        **kwargs: Any,
    ) -> "GPT2Tokenizer":
        """Learns a vocabulary from texts (an iterable of str): 256 bytes, merges, special tokens; vocab_size in all.

        The most frequent pair merges first; among equals, the one with the smaller left, then right, id. Stops early
        when no pair occurs twice. kwargs: as for the class.
        """
        from .train import learn_merges

        function = "GPT2Tokenizer.train"
        if isinstance(texts, (str, bytes)) or not hasattr(texts, "__iter__"):
            raise TypeError(f"{function}: texts is {checks.kind(texts)}; it must be an iterable of str")
        vocab_size = checks.whole(vocab_size, function, "vocab_size")
        checks.flag(progress, function, "progress")
        if not isinstance(special_tokens, (list, tuple)):
            raise TypeError(f"{function}: special_tokens is {checks.kind(special_tokens)}; it must be a list of str")
        special_tokens = list(dict.fromkeys(checks.token(token, function, "a token") for token in special_tokens))
        merges = vocab_size - 256 - len(special_tokens)
        if merges < 0:
            raise ValueError(
                f"{function}: vocab_size={vocab_size}; it must be at least {vocab_size - merges}: "
                f"256 bytes and {len(special_tokens)} special tokens"
            )
        texts = (checks.encodable(text, function, "a text") for text in texts)
        learned = learn_merges(texts, merges, progress=progress)
        return cls(vocabulary_from_merges(learned, special_tokens, consistent=True), **kwargs)

    @property
    def name_or_path(self) -> str:
        """What it was loaded from; tiktoken calls it `name`."""
        return self.name

    def save_vocabulary(self, save_directory: str | os.PathLike, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Writes `vocab.json` and `merges.txt`; returns their paths."""
        checks.path(save_directory, "GPT2Tokenizer.save_vocabulary", "save_directory")
        if filename_prefix is not None:
            checks.text(filename_prefix, "GPT2Tokenizer.save_vocabulary", "filename_prefix")
            if "/" in filename_prefix or "\0" in filename_prefix:
                raise ValueError(
                    f"GPT2Tokenizer.save_vocabulary: filename_prefix={filename_prefix!r} is no part of a file name"
                )
        return files.save_vocabulary(self, save_directory, filename_prefix)

    def save_pretrained(self, save_directory: str | os.PathLike) -> tuple[str, ...]:
        """Writes what AutoTokenizer and `from_pretrained` load, whole or not at all; returns the files' paths."""
        checks.path(save_directory, "GPT2Tokenizer.save_pretrained", "save_directory")
        return files.save_pretrained(self, save_directory)

    # Text to ids

    def encode_ordinary(self, text: str) -> list[int]:
        """Ids (list[int]) of text; special and added tokens in it are text like any other."""
        if not isinstance(text, str):
            checks.text(text, "GPT2Tokenizer.encode_ordinary")
        try:
            return self._memo.encode(self._prefixed(text) if self.__dict__["add_prefix_space"] else text)
        except UnicodeEncodeError:
            return self._memo.encode(self._prefixed(checks.paired_surrogates(text, "GPT2Tokenizer.encode_ordinary")))

    def encode(
        self,
        text: Any,
        text_pair: Any = None,
        *,
        add_special_tokens: bool = True,
        allowed_special: Any = None,
        disallowed_special: Any = "all",
        **options: Any,
    ) -> list[int]:
        """Ids (list[int]; with return_tensors a [1, T] tensor) of text, and of its pair behind it.

        Special tokens follow tiktoken: text that contains one raises ValueError, unless it is in `allowed_special` (a
        set or "all": it becomes its id) or `disallowed_special` (a set or "all") leaves it out: it is then ordinary
        text. By default those are allowed that were added with `add_special_tokens`; tokens that are added and not
        special are always read. That flag of the same name is Hugging Face's and changes nothing: GPT-2 puts no token
        around a text. options: padding, truncation, max_length, stride, pad_to_multiple_of, padding_side and
        return_tensors, as for a call.
        """
        function = "GPT2Tokenizer.encode"
        checks.text(text, function)
        checks.flag(add_special_tokens, function, "add_special_tokens")
        if text_pair is None and not options:
            special = self._special(allowed_special, disallowed_special, function)
            return _joined(self._parts(text, function, *special))
        unknown = [name for name in options if name not in _ENCODE_OPTIONS]
        if unknown:
            raise TypeError(f"{function}: unexpected argument {unknown[0]!r}")
        special = {"allowed_special": allowed_special, "disallowed_special": disallowed_special}
        return self(text, text_pair, **special, **options)["input_ids"]

    def encode_batch(self, text: Iterable[str], **special: Any) -> list[list[int]]:
        """A list of `encode(text, **special)` of a list of texts."""
        return [self.encode(one, **special) for one in checks.texts(text, "GPT2Tokenizer.encode_batch", "text")]

    def __call__(
        self,
        text: Any,
        text_pair: Any = None,
        *,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        stride: int = 0,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_token_type_ids: bool | None = False,
        return_attention_mask: bool | None = True,
        return_overflowing_tokens: bool = False,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        allowed_special: Any = None,
        disallowed_special: Any = "all",
    ) -> batch.BatchEncoding:
        """A BatchEncoding of a str or a list of str: `input_ids`, and `attention_mask`, which is 0 where padding is.

        text_pair: for each text one to put behind it; a list of (text, pair) says the same. padding: True or "longest",
        "max_length", or False. truncation: True cuts to max_length (or model_max_length), of a pair the longer text
        first; "only_first" and "only_second" cut one of them. A max_length that is not for padding truncates too.
        return_overflowing_tokens: what is cut off follows as further rows, of which each takes up the last `stride`
        tokens of the one before; `overflow_to_sample_mapping` says whose they are. return_tensors: "pt" or "np", int64
        [B, T]; a single str gives [1, T]. return_offsets_mapping: (start, end) characters of each token; one that holds
        part of a character spans all of it. return_token_type_ids: 1 for a pair's tokens. return_special_tokens_mask:
        1 for padding, as nothing else is put around a text. Special tokens: as in `encode`.
        """
        wanted = {
            "return_token_type_ids": return_token_type_ids,
            "return_attention_mask": return_attention_mask,
            "return_overflowing_tokens": return_overflowing_tokens,
            "return_special_tokens_mask": return_special_tokens_mask,
            "return_offsets_mapping": return_offsets_mapping,
            "return_length": return_length,
        }
        for name, value in {"add_special_tokens": add_special_tokens, **wanted}.items():
            if value is not None:  # Hugging Face's default, where it is the tokenizer's to say
                checks.flag(value, "GPT2Tokenizer", name)
        if return_attention_mask is None:
            wanted["return_attention_mask"] = True
        fit = batch.fit(
            self,
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            stride=stride,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
        )
        firsts, seconds, is_one = batch.texts_of(text, text_pair)
        allowed, disallowed = self._special(allowed_special, disallowed_special, "GPT2Tokenizer")

        def part_of(text):
            parts = self._parts(text, "GPT2Tokenizer", allowed, disallowed)
            offsets = self._offsets(parts) if return_offsets_mapping else None
            return batch.Part(_joined(parts), offsets)

        rows, samples = [], []
        for sample, (first, second) in enumerate(zip(firsts, seconds)):
            if fit.truncation is None:
                rows.append((part_of(first), None if second is None else part_of(second)))
                samples.append(sample)
                continue
            fitting = batch.truncated(part_of(first), None if second is None else part_of(second), fit)
            fitting = fitting if return_overflowing_tokens else fitting[:1]
            rows += fitting
            samples += [sample] * len(fitting)
        columns, lengths = batch.columns_of(rows, {_COLUMN_OF[name] for name, value in wanted.items() if value})
        paddings = batch.pad(columns, fit, self.pad_token_id)
        if return_length:
            columns["length"] = [len(row) for row in columns["input_ids"]]
        if return_overflowing_tokens:
            columns["overflow_to_sample_mapping"] = samples
        if return_tensors is None and is_one and not return_overflowing_tokens:
            columns = {name: rows if name == "length" else rows[0] for name, rows in columns.items()}
        return batch.encoding(self, batch.as_tensors(columns, return_tensors), lengths, paddings)

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        *,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = True,
        return_tensors: str | None = None,
    ) -> batch.BatchEncoding:
        """A BatchEncoding of encoded rows, padded: a dict of rows, or a list of dicts, as in a collator.

        `input_ids` and, where there, `attention_mask`, `token_type_ids` and `special_tokens_mask` are padded; an
        attention_mask is made where there is none; other keys stay as they are.
        """
        function = "GPT2Tokenizer.pad"
        if return_attention_mask is not None:
            checks.flag(return_attention_mask, function, "return_attention_mask")
        is_longest = padding in (True, "longest") if isinstance(padding, (bool, str)) else False
        fit = batch.fit(
            self,
            padding=padding,
            truncation=False,
            max_length=None if is_longest else max_length,
            stride=0,
            pad_to_multiple_of=pad_to_multiple_of,
            padding_side=padding_side,
            function=function,
        )
        if is_longest and max_length is not None:
            raise ValueError(f'{function}: max_length={max_length!r} takes padding="max_length"')
        return batch.pad_encoded(self, encoded_inputs, fit, return_attention_mask is not False, return_tensors)

    def clear_cache(self) -> None:
        """Forgets the words that encoding has seen, which make it fast: at most 48 MB (see `long_text/`)."""
        self._memo.clear()

    def _prefixed(self, text):
        return f" {text}" if self.__dict__["add_prefix_space"] and text and text[0] != " " else text

    def _special(self, allowed_special, disallowed_special, function):
        """The special tokens that text may hold as such, and those that it may not hold."""
        if allowed_special is None:
            allowed_special = self.own_special_tokens
        else:
            checks.special(allowed_special, function, "allowed_special")
        return allowed_special, checks.special(disallowed_special, function, "disallowed_special")

    def _parts(self, text, function, allowed, disallowed):
        """[(ids, characters, whether a space was put in front or None for a token read whole), ...] of text."""
        try:
            return self._encoded_parts(partition(text, self.special_tokens, allowed, disallowed, function))
        except UnicodeEncodeError:
            text = checks.paired_surrogates(text, function)
            return self._encoded_parts(partition(text, self.special_tokens, allowed, disallowed, function))

    def _encoded_parts(self, pieces):
        if len(pieces) == 1 and not self.added_tokens:
            text = self._prefixed(pieces[0])
            return [(self._memo.encode(text), len(pieces[0]), text is not pieces[0])]
        parts: list[tuple[list[int], int, bool | None]] = []
        for i, piece in enumerate(pieces):
            if i % 2:
                parts.append(([self.special_tokens[piece]], len(piece), None))
                continue
            for j, other in enumerate(split(piece, self.added_tokens) if self.added_tokens else (piece,)):
                if j % 2:
                    parts.append(([self.added_tokens[other]], len(other), None))
                elif other:
                    prefixed = self._prefixed(other)
                    parts.append((self._memo.encode(prefixed), len(other), prefixed is not other))
        return parts

    def _offsets(self, parts):
        """(start, end) characters of each token of _parts."""
        offsets, start = [], 0
        for ids, length, is_prefixed in parts:
            if is_prefixed is None:
                offsets.append((start, start + length))
            else:
                # A space that was put in front is part of the first character.
                shift = start - is_prefixed
                spans = self._spans(ids)
                offsets += [(max(start, begin + shift), max(start + 1, end + shift)) for begin, end in spans]
            start += length
        return offsets

    # Ids to text

    def decode_bytes(self, ids: int | Iterable[int], *, skip_special_tokens: bool = False) -> bytes:
        """The bytes of ids (an int, a list, or a one-dimensional array or tensor). An unknown one raises ValueError."""
        function = "GPT2Tokenizer.decode_bytes"
        ids = self._kept_ids(ids, skip_special_tokens, function)
        try:
            return self._token_bytes.join(ids)
        except (IndexError, OverflowError, TypeError):
            raise self._bad_ids(ids, function) from None

    def decode(
        self,
        ids: Any,
        skip_special_tokens: bool = False,
        *,
        errors: str | None = None,
        clean_up_tokenization_spaces: bool = False,
    ) -> Any:
        """The text of ids. errors: as for `bytes.decode`; None is the tokenizer's own. Spaces are never cleaned up.

        An id that is not in the vocabulary is skipped, as transformers does: a model whose embedding is padded to more
        rows than there are tokens may generate it.
        """
        function = "GPT2Tokenizer.decode"
        if clean_up_tokenization_spaces is not None:
            checks.flag(clean_up_tokenization_spaces, function, "clean_up_tokenization_spaces")
        if clean_up_tokenization_spaces:
            raise ValueError(f"{function}: spaces are never cleaned up; decoding gives back the text encoded")
        errors = self.errors if errors is None else checks.error_handler(errors, function)
        ids = self._kept_ids(ids, skip_special_tokens, function)
        try:
            return self._token_bytes.decode(ids, errors)
        except (IndexError, OverflowError, TypeError):
            return self._token_bytes.decode(self._known_ids(ids, function), errors)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **options: Any) -> list[str]:
        """A list of `decode(ids, **options)`, one for each row of a list, an array or a tensor."""
        rows = checks.rows(sequences, "GPT2Tokenizer.batch_decode", "sequences")
        return [self.decode(ids, skip_special_tokens, **options) for ids in rows]

    def decode_with_offsets(self, tokens: Sequence[int]) -> tuple[str, list[int]]:
        """(text, for each token the character where it starts), as tiktoken. The bytes must be valid UTF-8.

        A token that starts inside a character is at that character.
        """
        ids = checks.ids(tokens, "GPT2Tokenizer.decode_with_offsets", "tokens")
        return self.decode_bytes(ids).decode(), [start for start, _ in self._spans(ids)]

    def stream_decoder(self, errors: str = "replace", skip_special_tokens: bool = False) -> StreamDecoder:
        """A StreamDecoder of this tokenizer's, for ids that come one by one."""
        return StreamDecoder(self, errors, skip_special_tokens)

    def _kept_ids(self, ids, skip_special_tokens, function):
        ids = checks.ids(ids, function)
        if not checks.flag(skip_special_tokens, function, "skip_special_tokens"):
            return ids
        try:
            return [id for id in ids if id not in self._special_ids]
        except TypeError:  # of a row, which has no hash
            raise self._bad_ids(ids, function) from None

    def _known_ids(self, ids, function):
        error = checks.not_an_id(ids, function)
        if error:
            raise error
        return [int(id) for id in ids if int(id) in self._bytes]

    def _known_bytes(self, ids, skip_special_tokens, function):
        """As decode_bytes, without the ids that are not in the vocabulary."""
        ids = self._kept_ids(ids, skip_special_tokens, function)
        return self._token_bytes.join(self._known_ids(ids, function))

    def _spans(self, ids):
        tokens = [self._bytes[int(id)] for id in ids]
        begun = [sum(not 0x80 <= byte < 0xC0 for byte in token) for token in tokens]  # characters that start inside
        ends = list(accumulate(begun))
        return [
            (max(0, end - count - (0x80 <= token[0] < 0xC0 if token else 0)), end)
            for token, count, end in zip(tokens, begun, ends)
        ]

    def _bad_ids(self, ids, function):
        error = checks.not_an_id(ids, function)
        if error:
            return error
        unknown = next(int(id) for id in ids if int(id) not in self._bytes)
        return ValueError(f"{function}: id {unknown} is not in the vocabulary; ids go from 0 to {max(self._bytes)}")


def _joined(parts):
    return parts[0][0] if len(parts) == 1 else list(chain.from_iterable(ids for ids, *_ in parts))


_ENCODE_OPTIONS = {"padding", "truncation", "max_length", "stride", "pad_to_multiple_of", "padding_side"}
_ENCODE_OPTIONS |= {"return_tensors"}
_COLUMN_OF = {
    "return_token_type_ids": "token_type_ids",
    "return_attention_mask": "attention_mask",
    "return_overflowing_tokens": "overflow_to_sample_mapping",
    "return_special_tokens_mask": "special_tokens_mask",
    "return_offsets_mapping": "offset_mapping",
    "return_length": "length",
}
