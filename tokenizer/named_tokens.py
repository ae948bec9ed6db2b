"""A tokenizer's tokens by name and id: special ones, added ones, and how files spell the ordinary ones."""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

from . import checks
from .long_text.token_bytes import TokenBytes
from .special import EXTRA, ROLES
from .vocabulary import Vocabulary, text_of


class NamedTokens:
    """The part of GPT2Tokenizer that adds tokens and says what each is called."""

    # Of GPT2Tokenizer.
    special_tokens: dict[str, int]
    own_special_tokens: dict[str, int]
    added_tokens: dict[str, int]
    roles: dict[str, str]
    vocabulary: Vocabulary
    encode: Callable
    decode: Callable
    _bytes: dict[int, bytes]

    def __len__(self) -> int:
        """The number of tokens, added ones included; `vocab_size` leaves those out."""
        return len(self._bytes)

    def add_special_tokens(self, special_tokens_dict: dict[str, Any]) -> int:
        """Adds special tokens by role: {"cls_token": "[CLS]", "additional_special_tokens": ["<a>"]}.

        Text that holds one is read as the token, without `allowed_special`. Returns how many are new; a model then
        needs `resize_token_embeddings(len(tokenizer))`.
        """
        function = "GPT2Tokenizer.add_special_tokens"
        if not isinstance(special_tokens_dict, dict):
            raise TypeError(f"{function}: special_tokens_dict is {checks.kind(special_tokens_dict)}; it must be a dict")
        tokens = {}
        for role, value in special_tokens_dict.items():
            if role in ROLES:
                tokens[role] = [checks.token(value, function)]
            elif role in EXTRA and isinstance(value, (list, tuple)):
                tokens[role] = [checks.token(token, function) for token in value]
            elif role in EXTRA:
                raise TypeError(f"{function}: {role} is {checks.kind(value)}; it must be a list of str")
            else:
                raise ValueError(
                    f"{function}: role {role!r}; it must be one of {', '.join(ROLES)} or additional_special_tokens"
                )
        new = self._add([token for names in tokens.values() for token in names], True, function)
        for role in tokens.keys() & set(ROLES):
            setattr(self, role, tokens[role][0])
        return new

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Adds tokens (a str or a list) that text is cut at, whatever is around them; returns how many are new.

        special_tokens: whether decoding with `skip_special_tokens` leaves them out. A token that is ordinary already,
        or added, keeps its id.
        """
        function = "GPT2Tokenizer.add_tokens"
        checks.flag(special_tokens, function, "special_tokens")
        new_tokens = new_tokens if isinstance(new_tokens, (list, tuple)) else [new_tokens]
        special = [special_tokens or getattr(token, "special", False) for token in new_tokens]
        tokens = [checks.token(token, function, "new_tokens") for token in new_tokens]
        return sum(self._add([token], is_special, function) for token, is_special in zip(tokens, special))

    def _add(self, tokens, special, function):
        before = len(self)
        for token in tokens:
            id = self.vocabulary.names.get(token)
            if id is not None and text_of(token) != token:
                raise ValueError(
                    f"{function}: token {token!r} is the spelling of another text's; it would not decode to itself"
                )
        for token in tokens:
            if token in self.special_tokens or (token in self.added_tokens and not special):
                continue
            id = self._id_of(token)
            if id is None:
                id = max(self._bytes) + 1
                self._bytes[id] = token.encode()
            if special:
                self.added_tokens.pop(token, None)
                self.special_tokens[token] = self.own_special_tokens[token] = id
            else:
                self.added_tokens[token] = id
        self._tokens_changed()
        return len(self) - before

    def _tokens_changed(self):
        self._token_bytes = TokenBytes(self._bytes)
        self._special_ids = set(self.special_tokens.values())
        self.__dict__.pop("_names", None)
        self.__dict__.pop("_ids_of_bytes", None)

    @cached_property
    def _names(self):
        return {id: name for name, id in self.get_vocab().items()}

    @cached_property
    def _ids_of_bytes(self):
        return {token: id for id, token in self._bytes.items()}

    def _id_of(self, token):
        """The id of a token as spelled in `vocab.json`, or None."""
        for tokens in (self.special_tokens, self.added_tokens, self.vocabulary.names):
            if token in tokens:
                return tokens[token]
        return None

    @property
    def special_tokens_map(self) -> dict:
        """{role: token} of the roles that are set."""
        return {role: token for role, token in self.roles.items() if token is not None}

    @property
    def additional_special_tokens(self) -> list[str]:
        """The special tokens that no role has; Hugging Face also says extra_special_tokens."""
        return [token for token in self.all_special_tokens if token not in self.roles.values()]

    extra_special_tokens = additional_special_tokens

    @property
    def all_special_tokens(self) -> list[str]:
        """The special tokens, in the order of their ids."""
        return sorted(self.special_tokens, key=lambda token: self.special_tokens[token])

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of the special tokens, in order."""
        return sorted(self.special_tokens.values())

    def get_vocab(self) -> dict[str, int]:
        """{token as spelled in `vocab.json`: id}, special and added tokens included."""
        return {**self.vocabulary.names, **self.special_tokens, **self.added_tokens}

    def get_added_vocab(self) -> dict[str, int]:
        """{token: id} of the special and the added tokens."""
        every = {**self.special_tokens, **self.added_tokens}
        return dict(sorted(every.items(), key=lambda item: item[1]))

    def get_special_tokens_mask(
        self,
        token_ids_0: Sequence[int],
        token_ids_1: Sequence[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """1 for each id of a special token, else 0. As nothing is put around texts, a pair's follow one another."""
        function = "GPT2Tokenizer.get_special_tokens_mask"
        checks.flag(already_has_special_tokens, function, "already_has_special_tokens")
        ids = list(checks.ids(token_ids_0, function, "token_ids_0"))
        if token_ids_1 is not None:
            ids += checks.ids(token_ids_1, function, "token_ids_1")
        error = checks.not_an_id(ids, function, "token_ids_0")
        if error:
            raise error
        return [int(int(id) in self._special_ids) for id in ids]

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """0: GPT-2 puts no token around a text, nor around a pair."""
        checks.flag(pair, "GPT2Tokenizer.num_special_tokens_to_add", "pair")
        return 0

    def tokenize(self, text: str, pair: str | None = None, **special: Any) -> list[str]:
        """The tokens of text as spelled in `vocab.json`, such as "Ġworld"."""
        return self.convert_ids_to_tokens(self.encode(text, pair, **special))

    def convert_ids_to_tokens(self, ids: int | Iterable[int], skip_special_tokens: bool = False) -> Any:
        """The token, as spelled in `vocab.json`, of one id or of each; an unknown id's is None, as in transformers."""
        function = "GPT2Tokenizer.convert_ids_to_tokens"
        checks.flag(skip_special_tokens, function, "skip_special_tokens")
        several = checks.ids(ids, function)
        error = checks.not_an_id(several, function)
        if error:
            raise error
        if isinstance(ids, int):
            return self._names.get(ids)
        skipped = self._special_ids if skip_special_tokens else ()
        return [self._names.get(int(id)) for id in several if int(id) not in skipped]

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> Any:
        """The id of one token as spelled in `vocab.json`, or of each. An unknown one raises ValueError."""
        function = "GPT2Tokenizer.convert_tokens_to_ids"
        if isinstance(tokens, str):
            return self._ids_of([tokens], function)[0]
        return self._ids_of(checks.texts(tokens, function, "tokens"), function)

    def _ids_of(self, tokens, function):
        ids = list(map(self._id_of, tokens))
        if None in ids:
            raise ValueError(f"{function}: token {tokens[ids.index(None)]!r} is not in the vocabulary")
        return ids

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """The text of tokens as spelled in `vocab.json`."""
        function = "GPT2Tokenizer.convert_tokens_to_string"
        return self.decode(self._ids_of(checks.texts(tokens, function, "tokens"), function))
