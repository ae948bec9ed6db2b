"""Special and added tokens: which there are, which role each plays, and where a text holds them."""

import re

from . import checks

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA = ("additional_special_tokens", "extra_special_tokens")  # two names of the tokens that have no role


class Role:
    """An attribute such as `tokenizer.pad_token`: a token of the vocabulary, or None."""

    def __set_name__(self, owner, name):
        self.name = name

    def __get__(self, tokenizer, owner=None):
        return self if tokenizer is None else tokenizer.roles.get(self.name)

    def __set__(self, tokenizer, token):
        if token is not None:
            token = checks.token(token, "GPT2Tokenizer", self.name)
            if tokenizer._id_of(token) is None:
                raise ValueError(
                    f"GPT2Tokenizer: {self.name}={token!r} is not in the vocabulary; "
                    f"add it with add_special_tokens({{{self.name!r}: {token!r}}})"
                )
        tokenizer.roles[self.name] = token


class RoleId:
    """An attribute such as `tokenizer.pad_token_id`: the id of the token in that role, or None."""

    def __set_name__(self, owner, name):
        self.name, self.role = name, name.removesuffix("_id")

    def __get__(self, tokenizer, owner=None):
        return self if tokenizer is None else tokenizer._id_of(tokenizer.roles.get(self.role))

    def __set__(self, tokenizer, id):
        if id is not None:
            id = checks.whole(id, "GPT2Tokenizer", self.name)
            if id not in tokenizer._names:
                raise ValueError(f"GPT2Tokenizer: {self.name}={id} is not in the vocabulary")
        tokenizer.roles[self.role] = tokenizer._names.get(id)


class Setting:
    """An attribute that is checked when it is set. check: (value, function, name) -> value."""

    def __init__(self, check):
        self.check = check

    def __set_name__(self, owner, name):
        self.name = name

    def __get__(self, tokenizer, owner=None):
        return self if tokenizer is None else tokenizer.__dict__[self.name]

    def __set__(self, tokenizer, value):
        tokenizer.__dict__[self.name] = self.check(value, "GPT2Tokenizer", self.name)


def partition(text, special_tokens, allowed, disallowed, function):
    """Cuts text at the special tokens that may stand in it: [ordinary, special, ordinary, ..., ordinary].

    allowed, disallowed: collections of special tokens, or "all". A token that is in both is allowed. Raises ValueError
    if the text contains a disallowed one.
    """
    every = set(special_tokens)
    allowed = every if allowed == "all" else every & set(allowed)
    disallowed = (every if disallowed == "all" else every & set(disallowed)) - allowed
    for token in disallowed:
        if token in text:
            raise ValueError(
                f"{function}: the text contains the special token {token!r} at character {text.index(token)}. "
                f"Pass allowed_special={{{token!r}}} to encode it as that token, or disallowed_special=() to encode it "
                "as ordinary text"
            )
    return split(text, allowed)


def split(text, tokens):
    """Cuts text at tokens: [other, token, other, ..., other]. Where two match at one place, the longer one wins."""
    present = [token for token in tokens if token in text]
    if not present:
        return [text]
    longest_first = sorted(present, key=len, reverse=True)
    return re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
