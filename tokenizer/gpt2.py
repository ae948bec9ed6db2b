"""GPT2Tokenizer: the names and meanings of Hugging Face's tokenizer and of tiktoken's, in one class."""

import re
from itertools import accumulate

from . import files
from .batch import PADDING, BatchEncoding, as_tensors, pad, padded_length
from .bpe import BytePairEncoder
from .long_text.borders import FinePieces
from .long_text.memo import Memo
from .long_text.token_bytes import TokenBytes
from .special import ROLES, Role, RoleId, partition
from .vocabulary import END_OF_TEXT, gpt2_vocabulary, vocabulary_from_merges

SIDES = ("left", "right")


class GPT2Tokenizer:
    """Byte-level BPE with GPT-2's pattern, for GPT-2's vocabulary or another one.

    Any str without lone surrogates encodes, and decodes to itself. Threads may share a tokenizer but gain no speed, for
    one thread of Python runs at a time; to go wider, use processes.

    vocabulary: a Vocabulary; None is GPT-2's. errors: what decoding does with bytes that are not UTF-8, as for
    `bytes.decode`. model_max_length: what `truncation=True` cuts to when no `max_length` is given. roles: special
    tokens by role, such as {"pad_token": "<|endoftext|>"}.
    """

    bos_token, eos_token, unk_token, pad_token, cls_token, sep_token, mask_token = (Role() for _ in ROLES)
    bos_token_id, eos_token_id, unk_token_id, pad_token_id, cls_token_id, sep_token_id, mask_token_id = (
        RoleId() for _ in ROLES
    )

    def __init__(
        self,
        vocabulary=None,
        *,
        errors="replace",
        model_max_length=None,
        padding_side="right",
        truncation_side="right",
        roles=None,
    ):
        self.vocabulary = vocabulary = vocabulary or gpt2_vocabulary()
        self.errors, self.model_max_length = errors, model_max_length
        self.padding_side = _one_of(SIDES, padding_side, "padding_side")
        self.truncation_side = _one_of(SIDES, truncation_side, "truncation_side")
        self.special_tokens = dict(vocabulary.special)
        self._added = set()  # special tokens of the user's own, recognised in text without being asked
        self.vocab_size = len(vocabulary.names) + len(vocabulary.special)

        ordinary = vocabulary.token_bytes()
        known = {}
        if vocabulary.consistent:
            known = {token.decode(): id for id, token in ordinary.items() if token.isascii()}
        encoder = BytePairEncoder(vocabulary.byte_ids, vocabulary.ranks, vocabulary.products)
        self._memo = Memo(encoder, known, FinePieces([*ordinary.values()]))
        self._bytes = ordinary | {id: token.encode() for token, id in self.special_tokens.items()}
        self._token_bytes = TokenBytes(self._bytes)

        self.roles = {}
        if roles is None and END_OF_TEXT in self.special_tokens:
            roles = dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT)
        for role, token in (roles or {}).items():
            setattr(self, _one_of(ROLES, role, "role"), token)

    # Loading and saving

    @classmethod
    def from_pretrained(
        cls, name_or_path, *, revision=None, cache_dir=None, token=None, local_files_only=False, **kwargs
    ):
        """Loads GPT-2's own vocabulary ("gpt2", its sizes, "distilgpt2": no network), a directory, or a hub repository.

        A directory or repository holds `tokenizer.json`, or `vocab.json` and `merges.txt`, of a byte-level BPE with
        GPT-2's pattern; anything else that such a file can say is refused with the reason. kwargs: as for the class.
        """
        hub = {"revision": revision, "cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        vocabulary, settings = files.load(name_or_path, hub)
        return cls(vocabulary, **settings | kwargs)

    @classmethod
    def train(cls, texts, vocab_size, *, special_tokens=(END_OF_TEXT,), progress=True, **kwargs):
        """Learns a vocabulary from texts (an iterable of str): 256 bytes, merges, special tokens; vocab_size in all.

        The most frequent pair merges first; among equals, the one with the smaller left, then right, id. Stops early
        when no pair occurs twice. kwargs: as for the class.
        """
        from .train import learn_merges

        if isinstance(texts, str):
            raise TypeError("GPT2Tokenizer.train: texts is one str; it must be an iterable of str")
        merges = vocab_size - 256 - len(special_tokens)
        if merges < 0:
            raise ValueError(
                f"GPT2Tokenizer.train: vocab_size={vocab_size}; it must be at least {vocab_size - merges}: "
                f"256 bytes and {len(special_tokens)} special tokens"
            )
        learned = learn_merges(texts, merges, progress=progress)
        return cls(vocabulary_from_merges(learned, special_tokens, consistent=True), **kwargs)

    def save_vocabulary(self, directory, filename_prefix=None):
        """Writes `vocab.json` and `merges.txt`; returns their paths."""
        return files.save_vocabulary(self, directory, filename_prefix)

    def save_pretrained(self, directory):
        """Writes what transformers' AutoTokenizer and `from_pretrained` load; returns the paths."""
        return files.save_pretrained(self, directory)

    # Text to ids

    def encode_ordinary(self, text):
        """Ids (list[int]) of text; special tokens in it are text like any other."""
        if not isinstance(text, str):
            raise TypeError(f"GPT2Tokenizer.encode: text is {type(text).__name__}; it must be str")
        try:
            return self._memo.encode(text)
        except UnicodeEncodeError:
            found = re.search("[\ud800-\udfff]", text)
            raise ValueError(
                f"GPT2Tokenizer.encode: lone surrogate U+{ord(found.group()):04X} at character {found.start()}; "
                "text must be valid Unicode"
            ) from None

    def encode(
        self,
        text,
        *,
        allowed_special=None,
        disallowed_special="all",
        add_special_tokens=True,
        truncation=False,
        max_length=None,
        return_tensors=None,
    ):
        """Ids (list[int]; with return_tensors a [1, T] tensor) of text.

        Special tokens follow tiktoken: text that contains one raises ValueError, unless it is in `allowed_special` (a
        set or "all": it becomes its id) or `disallowed_special` (a set or "all") leaves it out: it is then ordinary
        text. By default those are allowed that were added with `add_special_tokens`. That flag of the same name is
        Hugging Face's and changes nothing: GPT-2 puts no token around a text.
        """
        if return_tensors is not None or truncation:
            options = {"truncation": truncation, "max_length": max_length, "return_tensors": return_tensors}
            batch = self(
                [text] if return_tensors else text,
                allowed_special=allowed_special,
                disallowed_special=disallowed_special,
                **options,
            )
            return batch["input_ids"]
        if not isinstance(text, str):
            raise TypeError(f"GPT2Tokenizer.encode: text is {type(text).__name__}; it must be str")
        allowed = self._added if allowed_special is None else allowed_special
        first, *others = partition(text, self.special_tokens, allowed, disallowed_special, "GPT2Tokenizer.encode")
        ids = self.encode_ordinary(first)
        for special, ordinary in zip(others[::2], others[1::2]):
            ids.append(self.special_tokens[special])
            ids += self.encode_ordinary(ordinary)
        return ids

    def encode_batch(self, texts, **special):
        """A list of `encode(text, **special)`."""
        if isinstance(texts, str):
            raise TypeError("GPT2Tokenizer.encode_batch: texts is one str; it must be a list of str")
        return [self.encode(text, **special) for text in texts]

    def __call__(
        self,
        text,
        *,
        padding=False,
        truncation=False,
        max_length=None,
        pad_to_multiple_of=None,
        padding_side=None,
        return_tensors=None,
        return_attention_mask=True,
        return_offsets_mapping=False,
        return_length=False,
        add_special_tokens=True,
        allowed_special=None,
        disallowed_special="all",
    ):
        """A BatchEncoding of a str or a list of str: `input_ids`, and `attention_mask`, which is 0 where padding is.

        padding: True or "longest", "max_length", or False. truncation: True cuts to max_length (or model_max_length).
        return_tensors: "pt" or "np", int64 [B, T]; a single str gives [1, T]. return_offsets_mapping: (start, end)
        characters of each token; one that holds part of a character spans all of it. Special tokens: as in `encode`.
        """
        is_one = isinstance(text, str)
        if not is_one and not (isinstance(text, (list, tuple)) and all(isinstance(item, str) for item in text)):
            raise TypeError(f"GPT2Tokenizer: text is {_kind(text)}; it must be str or a list of str")
        if padding not in PADDING:
            raise ValueError(f'GPT2Tokenizer: padding={padding!r}; it must be True, "longest", "max_length" or False')
        padding = PADDING[padding]
        if padding and self.pad_token is None:
            raise ValueError(
                "GPT2Tokenizer: GPT-2 has no padding token, and padding was asked for; choose one with "
                "tokenizer.pad_token = tokenizer.eos_token or tokenizer.add_special_tokens({'pad_token': '[PAD]'})"
            )
        if truncation in (True, "longest_first", "only_first") or padding == "max_length":
            max_length = self.model_max_length if max_length is None else max_length
            if max_length is None:
                raise ValueError("GPT2Tokenizer: no max_length was given and this tokenizer has no model_max_length")
        elif truncation not in (False, None, "do_not_truncate"):
            raise ValueError(f"GPT2Tokenizer: truncation={truncation!r}; it must be True or False")
        special = {"allowed_special": allowed_special, "disallowed_special": disallowed_special}

        rows = self.encode_batch([text] if is_one else text, **special)
        columns = {"input_ids": rows}
        if return_attention_mask:
            columns["attention_mask"] = [[1] * len(ids) for ids in rows]
        if return_offsets_mapping:
            columns["offset_mapping"] = [self._spans(ids) for ids in rows]
        if truncation not in (False, None, "do_not_truncate"):
            kept = slice(None, max_length) if self.truncation_side == "right" else slice(-max_length or None, None)
            for name in columns:
                columns[name] = [row[kept] if max_length else [] for row in columns[name]]
        if padding:
            side = self.padding_side if padding_side is None else _one_of(SIDES, padding_side, "padding_side")
            length = padded_length(columns["input_ids"], padding, max_length, pad_to_multiple_of)
            pad_values = {"input_ids": self.pad_token_id, "attention_mask": 0, "offset_mapping": (0, 0)}
            pad(columns, length, pad_values, side)
        if return_length:
            columns["length"] = [len(row) for row in columns["input_ids"]]
        if return_tensors is None and is_one:
            columns = {name: rows[0] for name, rows in columns.items()}
        return BatchEncoding(as_tensors(columns, return_tensors))

    def clear_cache(self):
        """Forgets the words that encoding has seen, which make it fast: at most 48 MB (see `memo.py`, `words.py`)."""
        self._memo.clear()

    # Ids to text

    def decode_bytes(self, ids, *, skip_special_tokens=False):
        """The bytes of ids (an int, a list, or a one-dimensional array or tensor)."""
        ids = self._kept_ids(ids, skip_special_tokens)
        try:
            return self._token_bytes.join(ids)
        except (IndexError, OverflowError, TypeError):
            raise self._bad_ids(ids) from None

    def decode(self, ids, *, skip_special_tokens=False, errors=None, clean_up_tokenization_spaces=False):
        """The text of ids. errors: as for `bytes.decode`; None is the tokenizer's own. Spaces are never cleaned up."""
        if clean_up_tokenization_spaces:
            raise ValueError("GPT2Tokenizer.decode: spaces are never cleaned up; decoding gives back the text encoded")
        ids = self._kept_ids(ids, skip_special_tokens)
        try:
            return self._token_bytes.decode(ids, errors or self.errors)
        except (IndexError, OverflowError, TypeError):
            raise self._bad_ids(ids) from None

    def batch_decode(self, batch, **options):
        """A list of `decode(ids, **options)`, one for each row of a list, an array or a tensor."""
        return [self.decode(ids, **options) for ids in batch]

    def decode_with_offsets(self, ids):
        """(text, for each token the character where it starts), as tiktoken. The bytes must be valid UTF-8.

        A token that starts inside a character is at that character.
        """
        ids = _listed(ids)
        return self.decode(ids, errors="strict"), [start for start, _ in self._spans(ids)]

    def _kept_ids(self, ids, skip_special_tokens):
        ids = _listed(ids)
        if not skip_special_tokens:
            return ids
        special = set(self.special_tokens.values())
        return [id for id in ids if id not in special]

    def _spans(self, ids):
        tokens = [self.decode_bytes(id) for id in ids]
        begun = [sum(not 0x80 <= byte < 0xC0 for byte in token) for token in tokens]  # characters that start inside
        ends = list(accumulate(begun))
        return [
            (max(0, end - count - (0x80 <= token[0] < 0xC0)), end) for token, count, end in zip(tokens, begun, ends)
        ]

    def _bad_ids(self, ids):
        for id in ids:
            if isinstance(id, (list, tuple)):
                return TypeError("GPT2Tokenizer.decode: ids has rows; use batch_decode")
            if not hasattr(id, "__index__"):
                return TypeError(f"GPT2Tokenizer.decode: an id is {type(id).__name__}; ids must be int")
            if int(id) not in self._bytes:
                return ValueError(
                    f"GPT2Tokenizer.decode: id {id} is not in the vocabulary; ids go from 0 to {max(self._bytes)}"
                )
        return TypeError(f"GPT2Tokenizer.decode: ids is {_kind(ids)}; it must hold int")

    # Tokens and their names

    def __len__(self):
        """The number of tokens, added ones included; `vocab_size` leaves those out."""
        return len(self._bytes)

    def __repr__(self):
        return f"GPT2Tokenizer({len(self)} tokens, special: {', '.join(map(repr, self.special_tokens))})"

    def add_special_tokens(self, tokens):
        """Adds special tokens by role: {"cls_token": "[CLS]", "additional_special_tokens": ["<a>"]}.

        Returns how many are new; a model then needs `resize_token_embeddings(len(tokenizer))`.
        """
        before = len(self)
        for role, value in tokens.items():
            names = [value] if role in ROLES else value if role == "additional_special_tokens" else None
            if names is None:
                raise ValueError(
                    f"GPT2Tokenizer.add_special_tokens: role {role!r}; it must be one of {', '.join(ROLES)} or "
                    "additional_special_tokens"
                )
            for name in names:
                if not isinstance(name, str) or not name:
                    raise TypeError(f"GPT2Tokenizer.add_special_tokens: token {name!r}; it must be a non-empty str")
                if name not in self.special_tokens:
                    id = max(self._bytes) + 1
                    self.special_tokens[name], self._bytes[id] = id, name.encode()
                    self._added.add(name)
            if role in ROLES:
                setattr(self, role, value)
        self._token_bytes = TokenBytes(self._bytes)
        return len(self) - before

    @property
    def special_tokens_map(self):
        """{role: special token} of the roles that are set."""
        return {role: token for role, token in self.roles.items() if token is not None}

    @property
    def all_special_tokens(self):
        """The special tokens, in the order of their ids."""
        return sorted(self.special_tokens, key=self.special_tokens.get)

    @property
    def all_special_ids(self):
        """The ids of the special tokens, in order."""
        return sorted(self.special_tokens.values())

    def get_vocab(self):
        """{token as spelled in `vocab.json`: id}, special tokens included."""
        return {**self.vocabulary.names, **self.special_tokens}

    def tokenize(self, text, **special):
        """The tokens of text as spelled in `vocab.json`, such as "Ġworld"."""
        return self.convert_ids_to_tokens(self.encode(text, **special))

    def convert_ids_to_tokens(self, ids):
        """The token, as spelled in `vocab.json`, of one id or of each."""
        names = {id: name for name, id in self.get_vocab().items()}
        try:
            return names[ids] if isinstance(ids, int) else [names[id] for id in _listed(ids)]
        except KeyError:
            raise self._bad_ids(_listed(ids)) from None

    def convert_tokens_to_ids(self, tokens):
        """The id of one token as spelled in `vocab.json`, or of each. An unknown one raises ValueError."""
        vocabulary = self.get_vocab()
        try:
            return vocabulary[tokens] if isinstance(tokens, str) else [vocabulary[token] for token in tokens]
        except KeyError as error:
            raise ValueError(f"GPT2Tokenizer.convert_tokens_to_ids: {error} is not in the vocabulary") from None

    def convert_tokens_to_string(self, tokens):
        """The text of tokens as spelled in `vocab.json`."""
        return self.decode(self.convert_tokens_to_ids(tokens))


def _listed(ids):
    ids = list(ids) if isinstance(ids, (bytes, bytearray)) else ids  # array("I", ids) would take four for one
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    return [ids] if isinstance(ids, int) else ids


def _one_of(choices, value, name):
    if value not in choices:
        raise ValueError(f"GPT2Tokenizer: {name}={value!r}; it must be one of {', '.join(map(repr, choices))}")
    return value


def _kind(value):
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} of {', '.join(sorted({type(item).__name__ for item in value}))}"
    return type(value).__name__
