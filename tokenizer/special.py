"""Special tokens: which there are, which role each plays, and where a text holds them."""

import re

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token")


class Role:
    """An attribute such as `tokenizer.pad_token`: the name of a special token, or None."""

    def __set_name__(self, owner, name):
        self.name = name

    def __get__(self, tokenizer, owner=None):
        return self if tokenizer is None else tokenizer.roles.get(self.name)

    def __set__(self, tokenizer, token):
        if token is not None and token not in tokenizer.special_tokens:
            raise ValueError(
                f"GPT2Tokenizer: {self.name}={token!r} is not a special token; "
                f"add it with add_special_tokens({{{self.name!r}: {token!r}}})"
            )
        tokenizer.roles[self.name] = token


class RoleId:
    """An attribute such as `tokenizer.pad_token_id`: the id of the token in that role, or None."""

    def __set_name__(self, owner, name):
        self.role = name.removesuffix("_id")

    def __get__(self, tokenizer, owner=None):
        return self if tokenizer is None else tokenizer.special_tokens.get(tokenizer.roles.get(self.role))


def partition(text, special_tokens, allowed, disallowed, function):
    """Cuts text at the special tokens that may stand in it: [ordinary, special, ordinary, ..., ordinary].

    allowed, disallowed: sets of special tokens, or "all". A token that is in both is allowed. Where two allowed tokens
    match at one place, the longer one wins. Raises ValueError if the text contains a disallowed one.
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
    present = [token for token in allowed if token in text]
    if not present:
        return [text]
    longest_first = sorted(present, key=len, reverse=True)
    return re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
