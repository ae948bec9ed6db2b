"""python -m tokenizer.prepare FILES|DIRS|- --out data: texts to shards of token ids, to train a language model on.

python -m tokenizer.prepare book.txt essays/ --out data
python -m tokenizer.prepare corpus.jsonl --out data --processes 8      # a document in each line's "text"
python -m tokenizer.prepare builtin --out data                         # the sources of the Python that runs this

A text file is a document; directories are searched for .txt, .md, .py and .jsonl. <|endoftext|> follows each document,
and stands for nothing special within one. Every VALIDATE-th document goes to the split "val"; of a single document its
last VALIDATE-th part. The format is in tokenizer/shards.py. A run that was stopped is taken up where its last whole
shard ends.
"""

import argparse
import codecs
import hashlib
import json
import os
import signal
import sys
import sysconfig
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path

import numpy as np

from . import GPT2Tokenizer
from .shards import LIMIT, shard_paths, whole_file, write_shard

SUFFIXES = (".txt", ".md", ".py", ".jsonl")
SHARD_TOKENS = 50_000_000
BATCH = 1 << 21  # bytes of text that a process is given at once, or little more
STATE = "prepare.json"
INTERRUPTED, LOST = 130, 3


def main(arguments=None):
    """Runs the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tokenizer.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="+", help="files, directories, - for standard input, or builtin")
    parser.add_argument("--out", type=Path, required=True, help="the directory of the shards")
    parser.add_argument("--vocabulary", default="gpt2", help="a directory or hub name (default: gpt2, which ships)")
    parser.add_argument("--processes", type=int, default=1, help="(default: 1)")
    parser.add_argument("--validate", type=int, default=100, metavar="N", help="(default: 100; 0 for no split val)")
    parser.add_argument("--shard-tokens", type=int, default=SHARD_TOKENS, help=f"(default: {SHARD_TOKENS})")
    options = parser.parse_args(arguments)
    try:
        counts = prepare(
            options.sources,
            options.out,
            GPT2Tokenizer.from_pretrained(options.vocabulary),
            processes=options.processes,
            validate=options.validate,
            shard_tokens=options.shard_tokens,
        )
    except (OSError, ValueError) as error:
        print(f"tokenizer.prepare: {error}".replace("\n", " "), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tokenizer.prepare: stopped; the same command goes on behind the last whole shard", file=sys.stderr)
        return INTERRUPTED
    except BrokenProcessPool:
        print(
            "tokenizer.prepare: one of its processes was ended from outside, as for want of memory; the same command "
            "goes on behind the last whole shard",
            file=sys.stderr,
        )
        return LOST
    print(", ".join(f"{split}: {count} tokens" for split, count in counts.items()))
    return 0


def prepare(sources, out, tokenizer, *, processes=1, validate=100, shard_tokens=SHARD_TOKENS, progress=True):
    """Writes the shards of `sources` (paths, "-", "builtin") to the directory `out`: {split: tokens in all}.

    Goes on where an earlier call with the same arguments was stopped. Raises ValueError for a vocabulary whose ids need
    more than 16 bits, a directory with the shards of other texts or of another tokenizer, and sources without a text.
    """
    for name, value, least in (
        ("processes", processes, 1),
        ("validate", validate, 0),
        ("shard_tokens", shard_tokens, 1),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"prepare: {name} is {value!r}; it must be an integer of at least {least}")
    if len(tokenizer) > LIMIT:
        raise ValueError(f"prepare: the vocabulary has {len(tokenizer)} tokens; shards hold ids below {LIMIT}")
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"prepare: {out} is a file; the shards need a directory")
    paths = find(sources)
    out.mkdir(parents=True, exist_ok=True)
    asked = {
        "sources": [str(path) for path in paths],
        "bytes": [0 if path == "-" else os.path.getsize(path) for path in paths],
        "vocabulary": vocabulary_hash(tokenizer),
        "validate": validate,
        "shard_tokens": shard_tokens,
    }
    state = _state(out, asked)
    if state.get("finished"):
        return state["tokens"]
    writers = {split: _Writer(out, split, shard_tokens, state) for split in ("train", *(["val"] if validate else []))}
    for split, writer in writers.items():
        for stray in shard_paths(out, split)[writer.shards :]:  # written, but not recorded any more
            stray.unlink()
    end = tokenizer.encode("<|endoftext|>", allowed_special="all")
    if len(end) != 1:
        raise ValueError("prepare: the vocabulary has no <|endoftext|>, which ends a document")
    is_one = validate and len(paths) == 1 and Path(paths[0]).suffix != ".jsonl"
    done = read = state.get("documents", 0)
    numbered = enumerate(_contents(paths))
    with _bar(sum(asked["bytes"]), progress) as bar:
        for rows, size in _encoded(tokenizer, end[0], _batches(islice(numbered, done, None)), processes):
            for number, row in rows:
                if is_one and len(row) >= 2 * validate:
                    kept = len(row) - len(row) // validate
                    writers["train"].add(row[:kept])
                    writers["val"].add(row[kept:])
                else:
                    split = "val" if validate and number % validate == validate - 1 else "train"
                    writers[split].add(row)
                done = number + 1
            bar.update(size)
            read += size
            if any(writer.is_full for writer in writers.values()):
                _flush(out, asked, writers, done)
        if not read:
            raise ValueError("prepare: the sources hold no text")
        _flush(out, asked, writers, done, finished=True)
    return {split: writer.tokens for split, writer in writers.items()}


def vocabulary_hash(tokenizer):
    """What tells one tokenizer's ids from another's."""
    return hashlib.sha256("\0".join(map(str, tokenizer.get_vocab().items())).encode()).hexdigest()


def find(sources):
    """The files of sources, in a fixed order; "-" is standard input. Raises FileNotFoundError for what is not there."""
    found = []
    for source in sources:
        if source == "builtin":
            found += _standard_library()
        elif source == "-":
            found.append("-")
        elif Path(source).is_dir():
            inside = sorted(path for path in Path(source).rglob("*") if path.suffix in SUFFIXES and path.is_file())
            if not inside:
                raise ValueError(f"prepare: {source} holds no file that ends in {', '.join(SUFFIXES)}")
            found += inside
        elif Path(source).is_file():
            found.append(Path(source))
        else:
            raise FileNotFoundError(f"prepare: {source} is neither a file nor a directory, nor builtin, nor -")
    return found


def _standard_library():
    """The Python sources that every CPython brings, English prose and code, but for its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    apart = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}
    return sorted(path for path in root.rglob("*.py") if not apart & set(path.relative_to(root).parts))


def documents(paths):
    """The documents of files, in order. Raises ValueError, with the file and the place, for what is not UTF-8 text."""
    return map(bytes.decode, _contents(paths))


def _contents(paths):
    """As documents, in UTF-8 (bytes)."""
    for path in paths:
        if path == "-":
            yield _utf8(sys.stdin.buffer.read(), "standard input")
        elif path.suffix == ".jsonl":
            with open(path, "rb") as lines:
                for number, line in enumerate(lines, 1):
                    if not line.isspace():
                        yield _text_of(_utf8(line, path, number).decode(), path, number)
        else:
            yield _utf8(path.read_bytes(), path)


def _utf8(content, path, number=None):
    """Content (bytes), of a file or of a line of one, without its mark of order."""
    try:
        if not content.isascii():
            content.decode()
    except UnicodeDecodeError as error:
        where = path if number is None else f"{path}, line {number}"
        raise ValueError(f"prepare: {where} is not UTF-8 (byte {error.start}: {error.reason})") from None
    return content.removeprefix(codecs.BOM_UTF8)


def _text_of(line, path, number):
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"prepare: {path}, line {number}: {error}") from None
    if not isinstance(value, dict) or not isinstance(value.get("text"), str):
        raise ValueError(f'prepare: {path}, line {number} must be an object with a string "text"')
    try:
        return value["text"].encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"prepare: {path}, line {number}: character {error.start} of its text is half a surrogate pair"
        ) from None


def _batches(numbered):
    """Lists of (number, text) of about BATCH bytes."""
    batch, size = [], 0
    for number, text in numbered:
        batch.append((number, text))
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encoded(tokenizer, end, batches, processes):
    """For each batch, in order: ([(number, ids and what ends a document)], its bytes)."""
    if processes == 1:
        yield from map(_Encoder(tokenizer, end), batches)
        return
    with ProcessPoolExecutor(processes, initializer=_start, initargs=(tokenizer, end)) as pool:
        waiting = []
        for batch in batches:
            waiting.append(pool.submit(_encode, batch))
            if len(waiting) > 2 * processes:
                yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()


class _Encoder:
    def __init__(self, tokenizer, end):
        self.tokenizer, self.end = tokenizer, end

    def __call__(self, batch):
        numbers, texts = zip(*batch)
        ids, counts = self.tokenizer._encode_to_arrays(texts)
        ends = np.cumsum(counts)
        ids = np.insert(ids.astype(np.uint16), ends, self.end)
        ends = (ends + np.arange(1, len(ends) + 1)).tolist()
        rows = [ids[start:end] for start, end in zip([0, *ends], ends)]
        return list(zip(numbers, rows)), sum(map(len, texts))


_encode_here: "_Encoder"  # of a worker process


def _start(tokenizer, end):
    global _encode_here
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process tells the others
    _encode_here = _Encoder(tokenizer, end)


def _encode(batch):
    return _encode_here(batch)


class _Writer:
    """Gathers the documents of a split into shards."""

    def __init__(self, out, split, shard_tokens, state):
        self.out, self.split, self.shard_tokens = out, split, shard_tokens
        self.shards = state.get("shards", {}).get(split, 0)
        self.tokens = state.get("tokens", {}).get(split, 0)
        self.rows, self.held = [], 0

    def add(self, row):
        self.rows.append(row)
        self.held += len(row)
        self.tokens += len(row)

    @property
    def is_full(self):
        return self.held >= self.shard_tokens

    def write(self):
        if self.rows:
            starts = np.cumsum([0, *map(len, self.rows[:-1])])
            write_shard(self.out / f"{self.split}-{self.shards:06d}.bin", np.concatenate(self.rows), starts)
            self.shards, self.rows, self.held = self.shards + 1, [], 0


def _flush(out, asked, writers, documents, finished=False):
    """Writes what is gathered, then the record of it."""
    for writer in writers.values():
        writer.write()
    record = {
        "asked": asked,
        "documents": documents,
        "shards": {split: writer.shards for split, writer in writers.items()},
        "tokens": {split: writer.tokens for split, writer in writers.items()},
        "finished": finished,
    }
    with whole_file(out / STATE) as file:
        file.write(json.dumps(record).encode())


def _state(out, asked):
    """The record of an earlier call with the same arguments, or an empty one."""
    if not (out / STATE).is_file():
        if list(out.glob("*.bin")):
            raise ValueError(f"prepare: {out} has shards of which {STATE} says nothing; choose another directory")
        return {}
    try:
        record = json.loads((out / STATE).read_text(encoding="utf-8"))
        if not {"asked", "documents", "shards", "tokens", "finished"} <= record.keys():
            raise ValueError("it lacks what a record has")
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"prepare: {out / STATE} is damaged ({error}); choose another directory") from None
    differing = [name for name in asked if record["asked"].get(name) != asked[name]]
    if differing or "-" in asked["sources"]:
        what = ", ".join(differing) or "standard input, which cannot be read again"
        raise ValueError(f"prepare: {out} has the shards of another call ({what}); choose another directory")
    return record


def _bar(total, enabled):
    from tqdm import tqdm

    return tqdm(total=total or None, unit="B", unit_scale=True, desc="tokens", disable=None if enabled else True)


if __name__ == "__main__":
    sys.exit(main())
