"""Tokenizers against each other: ours, tiktoken and Hugging Face's, in one process, on the same text.

    python bench/tokenizer_sweep.py            # minutes, most of them Hugging Face's
    python bench/tokenizer_sweep.py --quick

All three use the vocabulary that ships with ours, and must give the same ids before the clock starts. A text is cut at
line ends into 16 documents (one where it has no lines), `documents`, English, and `sources`, code, into 3 kB each.
`threads` 1 encodes them
in the calling thread, one by one, ours by its batch call; more threads use each library's own batch call, ours a thread
pool.

`cold` is the first pass over a text with nothing remembered but the vocabulary, `warm` the second. tiktoken remembers
nothing; Hugging Face keeps 10,000 words; ours keeps far more, so `adversarial`, whose words hardly come twice, has a
warm speed only because it is the same text again.
MB/s counts bytes of UTF-8; megabytes are of 10**6 bytes. `x_tiktoken` is the speed over tiktoken's in the same case.

`prepare` is the whole of `tokenizer.prepare` on `documents` or `sources`, in one process: lines of JSON read, encoded
and written as shards. tiktoken only encodes the same texts, which lie in memory; `tiktoken-shards` does the whole job
as a loop would, a document at a time.

`decode` turns the ids of the English text back into text. `start` is a new process's time from the import to the first
token; the others have no vocabulary of their own offline, so they have no such row.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

if not __package__:  # run by its path: the checkout is found from there
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.lib.cli import Parser, UsageError
from bench.lib.clock import summary
from bench.lib.gate import OK
from bench.lib.record import ROOT, Record
from bench.lib.texts import TEXTS
from tokenizer import GPT2Tokenizer
from tokenizer.prepare import prepare
from tokenizer.shards import read_shard, write_shard

DOCUMENTS = 16
SHORT = 3000  # characters of one of `documents` or `sources`
MANY = {"documents": TEXTS["english"], "sources": TEXTS["code"]}
KINDS = {**TEXTS, **MANY}
MEGABYTES = {"english": 10}
OTHER_MEGABYTES = 1
QUICK_MEGABYTES = 0.3
START_RUNS = 5
START = """
import time
start = time.perf_counter()
from tokenizer import GPT2Tokenizer
GPT2Tokenizer.from_pretrained("gpt2").encode("Hello")
print(time.perf_counter() - start)
"""
COLUMNS = (
    "mode",
    "text",
    "threads",
    "state",
    "tokenizer",
    "megabytes",
    "median_ms",
    "mb_per_s",
    "tokens_per_s",
    "x_tiktoken",
    "status",
)


class Ours:
    name = "ours"

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def forget(self):
        self.tokenizer.clear_cache()

    def encode(self, documents, threads):
        if threads == 1:
            return self.tokenizer.encode_ordinary_batch(documents)
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self.tokenizer.encode_ordinary, documents))

    def decode(self, ids):
        return self.tokenizer.decode(ids)


class Tiktoken:
    name = "tiktoken"
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"  # as it ships for gpt2

    def __init__(self, tokenizer):
        import tiktoken

        ranks = {token: id for id, token in tokenizer.vocabulary.token_bytes().items()}
        special = tokenizer.special_tokens
        self.encoding = tiktoken.Encoding("gpt2", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=special)

    def forget(self):
        """It remembers nothing."""

    def encode(self, documents, threads):
        if threads == 1:
            return [self.encoding.encode_ordinary(document) for document in documents]
        return self.encoding.encode_ordinary_batch(documents, num_threads=threads)

    def decode(self, ids):
        return self.encoding.decode(ids)


class HuggingFace:
    name = "tokenizers"

    def __init__(self, tokenizer):
        with TemporaryDirectory() as directory:
            tokenizer.save_pretrained(directory)
            with open(os.path.join(directory, "tokenizer.json"), encoding="utf-8") as file:
                self.json = file.read()
        self.forget()

    def forget(self):
        from tokenizers import Tokenizer

        self.tokenizer = Tokenizer.from_str(self.json)

    def encode(self, documents, threads):
        if threads == 1:
            return [self.tokenizer.encode(document).ids for document in documents]
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(documents)]

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def main(argv=None):
    parser = Parser("bench/tokenizer_sweep.py", __doc__, check, devices=("cpu",))
    parser.add_argument("--texts", nargs="+", choices=KINDS, default=list(KINDS), help="default: all")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], metavar="N", help="default: 1 2")
    parser.add_argument(
        "--megabytes", type=float, metavar="MB", help="size of each text (default: English 10, others 1)"
    )
    parser.add_argument("--rounds", type=int, default=None, help="times that each is measured (default: 3; quick: 1)")
    args = parser.parse_args(argv)
    # Read once, when Hugging Face's thread pool starts.
    os.environ["RAYON_NUM_THREADS"] = str(max(args.threads))
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    rounds = args.rounds or (1 if args.quick else 3)

    args.environment |= {"versions": versions()}
    with Record(args, columns=COLUMNS) as record:
        for case in record.missing(["start"], "start"):
            record.add_from(case, lambda: [start_row()])
        tokenizer = GPT2Tokenizer.from_pretrained("gpt2")
        providers = [Ours(tokenizer), Tiktoken(tokenizer), HuggingFace(tokenizer)]
        for name in record.missing(args.texts, "texts"):
            record.add_from(name, text_rows, args, name, providers, rounds)


def text_rows(args, name, providers, rounds):
    """The rows of one text."""
    default = QUICK_MEGABYTES if args.quick else MEGABYTES.get(name, OTHER_MEGABYTES)
    text = KINDS[name](int((args.megabytes or default) * 1e6))
    documents = cut(text, len(text) // SHORT if name in MANY else DOCUMENTS)
    reference = providers[1].encode(documents, 1)
    rows = []
    for threads in args.threads:
        rows += encode_rows(name, documents, reference, providers, threads, rounds)
    if name in MANY:
        rows += prepare_rows(name, documents, reference, providers, rounds)
    if name == "english":
        rows += decode_rows(name, documents, reference, providers, rounds)
    return rows


def check(args):
    if min(args.threads) < 1:
        raise UsageError(f"--threads {min(args.threads)}: at least 1 is required")
    if args.megabytes is not None and args.megabytes <= 0:
        raise UsageError(f"--megabytes {args.megabytes}: more than 0 is required")
    if args.rounds is not None and args.rounds < 1:
        raise UsageError(f"--rounds {args.rounds}: at least 1 is required")
    try:
        versions()
    except ImportError as error:
        raise UsageError(f"{error.name} is not installed; pip install -e '.[test]' brings it") from None


def versions():
    """{library: version} of the peers."""
    import tiktoken
    import tokenizers

    return {library.__name__: library.__version__ for library in (tiktoken, tokenizers)}


def cut(text, number=DOCUMENTS):
    """So many parts of a text, each but the last up to a line end; fewer where lines are few."""
    documents, start = [], 0
    while start < len(text):
        end = text.find("\n", start + len(text) // max(number, 1)) + 1 or len(text)
        documents.append(text[start:end])
        start = end
    return documents


def encode_rows(name, documents, reference, providers, threads, rounds):
    """A cold and a warm row of each provider; they take turns, the slow one, Hugging Face's, only once."""
    times = {(provider.name, state): [] for provider in providers for state in ("cold", "warm")}
    wrong = [provider.name for provider in providers if provider.encode(documents, threads) != reference]
    for turn in range(rounds):
        for provider in providers:
            if turn and provider.name == HuggingFace.name:
                continue
            provider.forget()
            for state in ("cold", "warm"):
                if provider.name not in wrong:
                    times[provider.name, state].append(milliseconds(provider.encode, documents, threads))
    shape = {"mode": "encode", "text": name, "threads": threads, **sizes(documents, reference)}
    return rows_of(shape, times, wrong)


def prepare_rows(name, documents, reference, providers, rounds):
    """Rows of `prepare`, of tiktoken's encoding alone, and of tiktoken with all that prepare does."""
    ours, tiktoken = providers[:2]
    with TemporaryDirectory() as directory:
        lines = Path(directory, "documents.jsonl")
        lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
        calls = {
            "ours": lambda out: prepare([lines], out, ours.tokenizer, validate=0, progress=False),
            "tiktoken": lambda out: tiktoken.encode(documents, 1),
            "tiktoken-shards": lambda out: prepare_with_tiktoken(tiktoken.encoding, lines, out),
        }
        times = {(caller, "cold"): [] for caller in calls}
        expected = [id for row in reference for id in (*row, tiktoken.encoding.eot_token)]
        wrong = set()
        for turn in range(rounds):
            for caller, call in calls.items():
                ours.forget()
                out = Path(directory, f"{caller}-{turn}")
                times[caller, "cold"].append(milliseconds(call, out))
                if caller != "tiktoken" and read_shard(out / "train-000000.bin").tolist() != expected:
                    wrong.add(caller)
    shape = {"mode": "prepare", "text": name, "threads": 1, **sizes(documents, reference)}
    return rows_of(shape, times, wrong)


def prepare_with_tiktoken(encoding, lines, out):
    """The job of `prepare` as a loop: a shard of the documents in lines of JSON."""
    out.mkdir()
    rows = []
    with open(lines, "rb") as file:
        for line in file:
            ids = encoding.encode_ordinary(json.loads(line)["text"])
            rows.append(np.array([*ids, encoding.eot_token], np.uint16))
    starts = np.cumsum([0, *map(len, rows[:-1])])
    write_shard(out / "train-000000.bin", np.concatenate(rows), starts)


def decode_rows(name, documents, reference, providers, rounds):
    """A row of each provider that turns all ids of a text, as one list, back into the text."""
    ids = [id for document in reference for id in document]
    text = "".join(documents)
    wrong = [provider.name for provider in providers if provider.decode(ids) != text]
    times = {(provider.name, "warm"): [] for provider in providers}
    for _ in range(3 * rounds):
        for provider in providers:
            if provider.name not in wrong:
                times[provider.name, "warm"].append(milliseconds(provider.decode, ids))
    return rows_of({"mode": "decode", "text": name, "threads": 1, **sizes(documents, reference)}, times, wrong)


def start_row():
    """From the import of the package to the first token, in new processes."""
    runs = [subprocess.run([sys.executable, "-c", START], cwd=ROOT, capture_output=True, text=True, check=True).stdout]
    runs += [
        subprocess.run([sys.executable, "-c", START], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for _ in range(START_RUNS)
    ]
    shape = {"mode": "start", "text": "Hello", "threads": 1, "megabytes": None, "tokens": 1}
    # The first run may still have to compile the package to bytecode.
    (row,) = rows_of(shape, {("ours", "cold"): [float(run) * 1e3 for run in runs[1:]]}, wrong=[])
    return row


def sizes(documents, reference):
    return {
        "megabytes": sum(len(document.encode()) for document in documents) / 1e6,
        "tokens": sum(map(len, reference)),
    }


def milliseconds(call, *arguments):
    """The time of one call; what it returns is freed after the clock has stopped."""
    start = time.perf_counter()
    result = call(*arguments)
    stop = time.perf_counter()
    del result
    return (stop - start) * 1e3


def rows_of(shape, times, wrong):
    rows = []
    for (name, state), measured in times.items():
        row = {"tokenizer": name, "state": state, **shape, **summary(measured), "lane": "cpu"}
        seconds = row["median_ms"] / 1e3 if measured else None
        row["mb_per_s"] = shape["megabytes"] / seconds if seconds and shape["megabytes"] else None
        row["tokens_per_s"] = shape["tokens"] / seconds if seconds and shape["megabytes"] else None
        row["status"] = "failed: other ids than tiktoken's" if name in wrong else OK
        rows.append(row)
    for row in rows:
        peers = [peer for peer in rows if peer["tokenizer"] == "tiktoken" and peer["state"] == row["state"]]
        known = peers and peers[0]["mb_per_s"] and row["mb_per_s"]
        row["x_tiktoken"] = row["mb_per_s"] / peers[0]["mb_per_s"] if known else None
    return rows


if __name__ == "__main__":
    main()
