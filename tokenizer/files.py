"""Vocabularies in files: Hugging Face's layouts, both ways, from a directory or the hub.

`tokenizer.json` holds the vocabulary and every added token; without it, `vocab.json` and `merges.txt` hold the
vocabulary and `added_tokens.json` what was added. `tokenizer_config.json` and, in older layouts,
`special_tokens_map.json` name the roles; the rest of the config is kept and saved again.
"""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from . import checks, saving
from .special import EXTRA, ROLES
from .vocabulary import (
    BYTE_TO_CHAR,
    END_OF_TEXT,
    Vocabulary,
    encoder_json,
    gpt2_vocabulary,
    merges_txt,
    read_merges,
    text_of,
)

GPT2_NAMES = {"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2"}
ORGANISATIONS = ("openai-community/", "distilbert/")
GPT2_SETTINGS = {"model_max_length": 1024}
SETTINGS = ("errors", "model_max_length", "padding_side", "truncation_side", "add_prefix_space")
NO_LIMIT = 10**18  # Hugging Face writes a larger number for "no model_max_length"
CONFIG, ROLE_MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
MODEL = "config.json"  # the model's, which only AutoTokenizer asks
GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
WHOLE, VOCAB, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
FUNCTION = "GPT2Tokenizer.from_pretrained"
# Of Hugging Face's own objects, or of how a tokenizer was found; of no use to who loads it next.
_NOT_KEPT = {"tokenizer_class", "added_tokens_decoder", "backend", "is_local", "local_files_only", "name_or_path"}


def load(name_or_path, hub):
    """(Vocabulary, keyword arguments for GPT2Tokenizer, other settings) of a name or path.

    hub: arguments for hf_hub_download.
    """
    name = str(name_or_path)
    directory = Path(name_or_path)
    if not directory.is_dir():
        short = next((name.removeprefix(prefix) for prefix in ORGANISATIONS if name.startswith(prefix)), name)
        if short in GPT2_NAMES and hub["revision"] is None:
            return gpt2_vocabulary(), dict(GPT2_SETTINGS), {}
        if directory.exists() or name.startswith((".", "/", "~")):
            raise ValueError(f"{FUNCTION}: {name!r} is no directory; give a directory or a hub name")
    files = _Directory(directory) if directory.is_dir() else _Repository(name, hub)

    config = files.object(CONFIG)
    if "added_tokens_decoder" not in config:  # as transformers: later layouts say all in the config
        config |= files.object(ROLE_MAP)
    where = files.label(CONFIG)
    roles = {role: _content(config[role], where, role) for role in ROLES if role in config}
    extra = _extra(config, where)
    settings = {key: config[key] for key in SETTINGS if key in config}
    limit = settings.get("model_max_length")
    if isinstance(limit, (int, float)) and limit >= NO_LIMIT:
        settings["model_max_length"] = None

    refused = ["split_special_tokens"] if config.get("split_special_tokens") else []
    if files.holds(WHOLE):
        vocabulary, more = _from_tokenizer_json(files, _declared(config, where))
        settings, roles = more | settings, _roles_of(more) | roles
        settings.pop("pad_token", None)
    else:
        refused += [key for key in ("add_bos_token", "add_eos_token") if config.get(key)]
        vocabulary = _from_vocab_and_merges(files, _declared(config, where), [*filter(None, roles.values()), *extra])
    if refused:
        raise ValueError(f"{FUNCTION}: {where} sets {', '.join(refused)}, which this tokenizer does not do")
    others = {key: config[key] for key in config if key not in {*SETTINGS, *ROLES, *EXTRA, *_NOT_KEPT}}
    return vocabulary, settings | roles | {"additional_special_tokens": extra}, others


def check_is_gpt2(name_or_path, hub):
    """Raises ValueError where a directory's or a repository's files say that they are of another model than GPT-2."""
    name, directory = str(name_or_path), Path(name_or_path)
    if not directory.is_dir():
        if name in GPT2_NAMES or name.startswith(ORGANISATIONS):
            return
        files: _Files = _Repository(name, hub)
    else:
        files = _Directory(directory, (CONFIG, MODEL))
    said = files.object(CONFIG).get("tokenizer_class")
    if said is not None and said not in GPT2_CLASSES:
        raise ValueError(
            f"AutoTokenizer.from_pretrained: {files.label(CONFIG)} has tokenizer_class {said!r}; it must be GPT-2's "
            f"({' or '.join(GPT2_CLASSES[:2])}); GPT2Tokenizer.from_pretrained reads the files all the same"
        )
    model = files.object(MODEL).get("model_type", "gpt2") if said is None else "gpt2"
    if model != "gpt2":
        raise ValueError(
            f"AutoTokenizer.from_pretrained: {files.label(MODEL)} has model_type {model!r}; it must be 'gpt2'; "
            "GPT2Tokenizer.from_pretrained reads the files all the same"
        )


def _roles_of(settings):
    return {role: settings[role] for role in ROLES if role in settings}


def save_vocabulary(tokenizer, directory, filename_prefix=None):
    """Writes `vocab.json` and `merges.txt`; returns their paths."""
    prefix = f"{filename_prefix}-" if filename_prefix else ""
    texts = {VOCAB: encoder_json(tokenizer.vocabulary), MERGES: merges_txt(tokenizer.vocabulary)}
    return saving.save(directory, {prefix + name: text for name, text in texts.items()})


def save_pretrained(tokenizer, directory):
    """Writes the vocabulary, `tokenizer.json` and what names roles and settings; returns the paths."""
    config = tokenizer.other_settings | {"tokenizer_class": "GPT2Tokenizer"}
    config |= {key: getattr(tokenizer, key) for key in SETTINGS}
    if tokenizer.model_max_length is None:
        config["model_max_length"] = 10**30  # as Hugging Face writes it
    # A role that nobody plays is written too: what reads the files would else give some to <|endoftext|>.
    config |= {role: tokenizer.roles.get(role) for role in ROLES}
    roles = tokenizer.special_tokens_map
    extra = [token for token in tokenizer.own_special_tokens if token not in roles.values()]
    if extra:
        config["additional_special_tokens"] = roles["additional_special_tokens"] = extra
    texts = {
        VOCAB: encoder_json(tokenizer.vocabulary),
        MERGES: merges_txt(tokenizer.vocabulary),
        WHOLE: _json(_tokenizer_json(tokenizer)),
        CONFIG: _json(config),
        ROLE_MAP: _json(roles),
    }
    added = {**tokenizer.own_special_tokens, **tokenizer.added_tokens}
    if added or (Path(directory) / ADDED).exists():
        texts[ADDED] = _json(added)
    return saving.save(directory, texts)


def _json(value):
    return json.dumps(value, ensure_ascii=False, indent=2)


def _tokenizer_json(tokenizer):
    pre_tokenizer = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    every = sorted((id, token) for token, id in {**tokenizer.special_tokens, **tokenizer.added_tokens}.items())
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": id, "content": token, **flags, "normalized": not special, "special": special}
            for id, token in every
            for special in [token in tokenizer.special_tokens]
        ],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer | {"add_prefix_space": tokenizer.add_prefix_space},
        "post_processor": pre_tokenizer,
        "decoder": pre_tokenizer,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {**tokenizer.vocabulary.names, **tokenizer.vocabulary.special},
            "merges": [merge.split(" ") for merge in tokenizer.vocabulary.merges],
        },
    }


def _from_tokenizer_json(files, declared):
    """(Vocabulary, settings) of a `tokenizer.json`. declared: added tokens that the config names, as _declared."""
    where, content = files.label(WHOLE), files.object(WHOLE)
    model, cutter, after, padding, truncation = (
        _get(content, key, dict, {}, where)
        for key in ("model", "pre_tokenizer", "post_processor", "padding", "truncation")
    )
    added = _get(content, "added_tokens", list, [], where)
    refusals = {
        f"model {model.get('type')!r}": model.get("type", "BPE") != "BPE",
        "a normalizer": content.get("normalizer") is not None,
        f"pre_tokenizer {cutter.get('type')!r}": cutter.get("type") != "ByteLevel",
        "a pre_tokenizer without GPT-2's pattern": cutter.get("use_regex") is False,
        f"post_processor {after.get('type')!r}": after.get("type") not in (None, "ByteLevel") and not _is_empty(after),
    }
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    refusals |= {f"model option {option}": model.get(option) for option in options}
    reasons = [reason for reason, refused in refusals.items() if refused]
    if reasons:
        raise ValueError(
            f"{FUNCTION}: {where} has {', '.join(reasons)}; "
            "it must be a byte-level BPE with GPT-2's pattern and nothing else"
        )
    tokens: dict = {}
    for token in added:
        content, id, special = _added_token(token, None, where)
        if tokens.setdefault(content, (id, special)) != (id, special):
            raise ValueError(f"{FUNCTION}: {where} adds token {content!r} twice")
    merges = [
        merge if isinstance(merge, str) else " ".join(_all_of(merge, str, "a merge", where))
        for merge in _get(model, "merges", list, None, where)
    ]
    vocabulary = _vocabulary(_get(model, "vocab", dict, None, where), merges, declared | tokens, where)
    settings = {"add_prefix_space": bool(cutter.get("add_prefix_space"))}
    if padding.get("pad_token") is not None:
        settings["pad_token"] = padding["pad_token"]
    for key, direction in (("padding_side", padding), ("truncation_side", truncation)):
        if isinstance(direction.get("direction"), str):
            settings[key] = direction["direction"].lower()
    return vocabulary, settings


def _from_vocab_and_merges(files, declared, roles):
    if not (files.holds(VOCAB) and files.holds(MERGES)):
        raise FileNotFoundError(f"{FUNCTION}: {files.name!r} has neither tokenizer.json nor vocab.json with merges.txt")
    where, names = files.label(VOCAB), files.object(VOCAB)
    special = {token: (names[token], True) for token in (END_OF_TEXT, *roles) if token in names}
    added = {token: (id, token in {END_OF_TEXT, *roles}) for token, id in files.object(ADDED).items()}
    return _vocabulary(names, read_merges(files.text(MERGES)), special | added | declared, where)


def _vocabulary(vocab, merges, tokens, where):
    """A Vocabulary of {name: id}, merges, and {token: (id, special)} of the tokens that are not ordinary."""
    ordinary = {*BYTE_TO_CHAR.values(), *(merge.replace(" ", "") for merge in merges)}
    special, own, added = {}, {}, {}
    for token, (id, is_special) in tokens.items():
        is_ordinary = token in vocab and token in ordinary
        if is_ordinary and text_of(token) != token:
            raise ValueError(
                f"{FUNCTION}: {where} adds token {token!r}, which is the spelling of another text's; "
                "it would not decode to itself"
            )
        if not is_special:
            added[token] = id
        elif (token in vocab or token == END_OF_TEXT) and not is_ordinary:
            special[token] = id
        else:
            own[token] = id
    names = {name: id for name, id in vocab.items() if name in ordinary or name not in tokens}
    doubled = [token for token, (id, _) in tokens.items() if vocab.get(token, id) != id]
    if doubled:
        raise ValueError(f"{FUNCTION}: {where} gives token {doubled[0]!r} two ids")
    try:
        return Vocabulary(names, merges, special, own=own, added=added)
    except ValueError as error:
        raise ValueError(f"{FUNCTION}: {where}: {error}") from None


def _is_empty(post_processor):
    """Whether a post-processor is Hugging Face's template that adds nothing to a text."""
    return post_processor.get("type") == "TemplateProcessing" and not post_processor.get("special_tokens")


def _declared(config, where):
    """{token: (id, special)} of the config's `added_tokens_decoder`."""
    declared = {}
    for id, token in _get(config, "added_tokens_decoder", dict, {}, where).items():
        if not id.isdecimal() or not id.isascii():
            raise ValueError(f"{FUNCTION}: {where} adds a token with id {id!r}; an id is an int from 0 on")
        content, id, special = _added_token(token, int(id), where)
        declared[content] = id, special
    return declared


def _added_token(token, id, where):
    """(content, id, special) of an added token's object."""
    _of(token, dict, "an added token", where)
    content = _content(token, where, "an added token")
    unusual = [option for option in ("lstrip", "rstrip", "single_word") if token.get(option)]
    if unusual:
        raise ValueError(
            f"{FUNCTION}: {where} adds token {content!r} with {', '.join(unusual)}, which is not supported"
        )
    return content, token.get("id") if id is None else id, bool(token.get("special"))


def _extra(config, where):
    """The special tokens without a role."""
    for key in EXTRA:
        if config.get(key):
            tokens = config[key]
            tokens = list(tokens.values()) if isinstance(tokens, dict) else _of(tokens, list, key, where)
            return [_content(token, where, key) for token in tokens]
    return []


def _content(token, where, what):
    """A token, or None; it may be written as an object with its content."""
    if token is None:
        return None
    token = token.get("content") if isinstance(token, dict) else token
    if not isinstance(token, str) or not token:
        raise ValueError(f"{FUNCTION}: {where}: {what} is {token!r}; a token is a non-empty string")
    return checks.encodable(token, FUNCTION, f"{where}: {what}")


def _of(value, type_, what, where):
    if not isinstance(value, type_):
        name = {dict: "an object", list: "a list", str: "a string"}[type_]
        raise ValueError(f"{FUNCTION}: {where}: {what} is {type(value).__name__}; it must be {name}")
    return value


def _all_of(values, type_, what, where):
    return [_of(value, type_, what, where) for value in _of(values, list, what, where)]


def _get(content, key, type_, default, where):
    value = content.get(key)
    return default if value is None and default is not None else _of(value, type_, key, where)


class _Files:
    """What a tokenizer is loaded from, by the files' names."""

    name: str
    holds: Callable[[str], bool]
    label: Callable[[str], str]
    content: Callable[[str], bytes]

    def object(self, name):
        """The JSON object in a file; {} where there is no such file."""
        if not self.holds(name):
            return {}
        try:
            content = json.loads(self.text(name), object_pairs_hook=_without_repetition)
        except (ValueError, RecursionError) as error:
            reason = "too many levels" if isinstance(error, RecursionError) else error
            raise ValueError(f"{FUNCTION}: {self.label(name)} is not valid JSON: {reason}") from None
        return _of(content, dict, "the file", self.label(name))

    def text(self, name):
        try:
            return self.content(name).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{FUNCTION}: {self.label(name)} is not UTF-8: {error}") from None


class _Directory(_Files):
    def __init__(self, path, names=None):
        self.name, self._path = str(path), path
        self._found = saving.read(path, names or (CONFIG, ROLE_MAP, ADDED, WHOLE))
        if names is None and WHOLE not in self._found:
            self._found = saving.read(path, (CONFIG, ROLE_MAP, ADDED, WHOLE, VOCAB, MERGES))

    def holds(self, name):
        return name in self._found

    def content(self, name):
        return self._found[name]

    def label(self, name):
        return str(self._path / name)


class _Repository(_Files):
    def __init__(self, name, hub):
        self.name, self._hub, self._found = name, hub, {}

    def holds(self, name):
        return self.content(name) is not None

    def content(self, name):
        if name not in self._found:
            try:
                path = _on_hub(self.name, self._hub, name)
            except FileNotFoundError:
                # Few have these, and the cache does not always know who has not.
                if name not in (ROLE_MAP, ADDED, MODEL):
                    raise
                path = None
            self._found[name] = None if path is None else Path(path).read_bytes()
        return self._found[name]

    def label(self, name):
        return f"{name} of {self.name}"


def _on_hub(name, hub, file):
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    try:
        return hf_hub_download(name, file, **hub)
    except LocalEntryNotFoundError as error:
        # Also what huggingface_hub raises when it cannot reach the hub, so a missing file and a missing network differ.
        raise FileNotFoundError(
            f"{FUNCTION}: {name!r} is no directory, and {file} of the hub repository of that name "
            f"is neither in the cache nor to be fetched: {error}"
        ) from error
    except HFValidationError as error:
        raise ValueError(f"{FUNCTION}: {name!r} is neither a directory nor a hub name: {error}") from None
    except EntryNotFoundError:
        return None


def _without_repetition(pairs):
    content = dict(pairs)
    if len(content) < len(pairs):
        (repeated, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{repeated!r} stands in an object twice")
    return content
