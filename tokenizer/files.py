"""Vocabularies in files: Hugging Face's layouts, both ways, from a directory or the hub."""

import json
from functools import partial
from pathlib import Path

from .vocabulary import END_OF_TEXT, Vocabulary, encoder_json, gpt2_vocabulary, merges_txt, read_merges, write_text

GPT2_NAMES = {"gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2"}
ORGANISATIONS = ("openai-community/", "distilbert/")
GPT2_SETTINGS = {"model_max_length": 1024}
SETTINGS = ("errors", "model_max_length", "padding_side", "truncation_side")
ROLES_IN_CONFIG = ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token")
NO_LIMIT = 10**18  # Hugging Face writes a larger number for "no model_max_length"


def load(name_or_path, hub):
    """(Vocabulary, keyword arguments for GPT2Tokenizer) of a name or path; hub: arguments for hf_hub_download."""
    name = str(name_or_path)
    directory = Path(name_or_path)
    if not directory.is_dir():
        short = next((name.removeprefix(prefix) for prefix in ORGANISATIONS if name.startswith(prefix)), name)
        if short in GPT2_NAMES and hub["revision"] is None:
            return gpt2_vocabulary(), dict(GPT2_SETTINGS)
        if directory.exists() or name.startswith((".", "/", "~")):
            raise ValueError(f"GPT2Tokenizer.from_pretrained: {name!r} is no directory; give a directory or a hub name")
    find = partial(_in_directory, directory) if directory.is_dir() else partial(_on_hub, name, hub)

    config = _read_json(find("tokenizer_config.json")) or {}
    tokenizer_json = find("tokenizer.json")
    if tokenizer_json:
        vocabulary = _from_tokenizer_json(tokenizer_json)
    else:
        vocab_json, merges = find("vocab.json"), find("merges.txt")
        if not (vocab_json and merges):
            raise ValueError(
                f"GPT2Tokenizer.from_pretrained: {name!r} has neither tokenizer.json nor vocab.json with merges.txt"
            )
        every = _read_json(vocab_json)
        special = dict(_read_json(find("added_tokens.json")) or {})
        special |= {token: every[token] for token in (END_OF_TEXT, *_roles(config).values()) if token in every}
        names = {name: id for name, id in every.items() if name not in special}
        vocabulary = Vocabulary(names, read_merges(merges), special)

    settings = {key: config[key] for key in SETTINGS if key in config}
    if settings.get("model_max_length", 0) >= NO_LIMIT:
        del settings["model_max_length"]
    roles = {role: token for role, token in _roles(config).items() if token in vocabulary.special}
    return vocabulary, settings | ({"roles": roles} if roles else {})


def save_vocabulary(tokenizer, directory, filename_prefix=None):
    """Writes `vocab.json` and `merges.txt`; returns their paths."""
    directory = _made(directory)
    prefix = f"{filename_prefix}-" if filename_prefix else ""
    return (
        write_text(directory / f"{prefix}vocab.json", encoder_json(tokenizer.vocabulary)),
        write_text(directory / f"{prefix}merges.txt", merges_txt(tokenizer.vocabulary)),
    )


def save_pretrained(tokenizer, directory):
    """Writes the vocabulary, `tokenizer.json` and `tokenizer_config.json`; returns their paths."""
    directory = _made(directory)
    config = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False, "errors": tokenizer.errors}
    config |= {"padding_side": tokenizer.padding_side, "truncation_side": tokenizer.truncation_side}
    if tokenizer.model_max_length is not None:
        config["model_max_length"] = tokenizer.model_max_length
    config |= tokenizer.special_tokens_map
    return (
        *save_vocabulary(tokenizer, directory),
        write_text(directory / "tokenizer.json", json.dumps(_tokenizer_json(tokenizer), ensure_ascii=False, indent=2)),
        write_text(directory / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2)),
    )


def _tokenizer_json(tokenizer):
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": token, **flags, "special": True} for token, id in added],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
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


def _from_tokenizer_json(path):
    content = _read_json(path)
    model, cutter = content.get("model") or {}, content.get("pre_tokenizer") or {}
    after = content.get("post_processor") or {}
    added = content.get("added_tokens") or []
    refusals = {
        f"model {model.get('type')!r}": model.get("type", "BPE") != "BPE",
        "a normalizer": content.get("normalizer") is not None,
        f"pre_tokenizer {cutter.get('type')!r}": cutter.get("type") != "ByteLevel",
        "add_prefix_space": cutter.get("add_prefix_space"),
        "a pre_tokenizer without GPT-2's pattern": cutter.get("use_regex") is False,
        f"post_processor {after.get('type')!r}": after.get("type") not in (None, "ByteLevel") and not _is_empty(after),
        "an added token with lstrip, rstrip or single_word": any(
            token.get("lstrip") or token.get("rstrip") or token.get("single_word") for token in added
        ),
    }
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
    refusals |= {f"model option {option}": model.get(option) for option in options}
    reasons = [reason for reason, refused in refusals.items() if refused]
    if reasons:
        raise ValueError(
            f"GPT2Tokenizer.from_pretrained: {path} has {', '.join(reasons)}; "
            "it must be a byte-level BPE with GPT-2's pattern and nothing else"
        )
    special = {token["content"]: token["id"] for token in added}
    names = {name: id for name, id in model["vocab"].items() if name not in special}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return Vocabulary(names, merges, special)


def _is_empty(post_processor):
    """Whether a post-processor is Hugging Face's template that adds nothing to a text."""
    return post_processor.get("type") == "TemplateProcessing" and not post_processor.get("special_tokens")


def _roles(config):
    """{role: token}; a token may be written as an object with its content."""
    found = {role: config.get(role) for role in ROLES_IN_CONFIG}
    found = {role: token.get("content") if isinstance(token, dict) else token for role, token in found.items()}
    return {role: token for role, token in found.items() if token is not None}


def _in_directory(directory, file):
    path = directory / file
    return path if path.is_file() else None


def _on_hub(name, hub, file):
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return hf_hub_download(name, file, **hub)
    except LocalEntryNotFoundError as error:
        # Also what huggingface_hub raises when it cannot reach the hub, so a missing file and a missing network differ.
        raise ValueError(
            f"GPT2Tokenizer.from_pretrained: {name!r} is no directory, and {file} of the hub repository of that name "
            f"is neither in the cache nor to be fetched: {error}"
        ) from error
    except EntryNotFoundError:
        return None


def _read_json(path):
    if path is None:
        return None
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"GPT2Tokenizer.from_pretrained: {path} is not valid JSON: {error}") from None


def _made(directory):
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"GPT2Tokenizer: {str(directory)!r} is a file; a directory to save to is required")
    directory.mkdir(parents=True, exist_ok=True)
    return directory
