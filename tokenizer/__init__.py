"""GPT-2's tokenizer: byte-level BPE, exact, offline, in Python and numpy. Imports nothing else of the project.

    from tokenizer import GPT2Tokenizer

    tokenizer = GPT2Tokenizer.from_pretrained("gpt2")
    ids = tokenizer.encode("Hello, world!")
    assert tokenizer.decode(ids) == "Hello, world!"

Reading order: `vocabulary.py` (bytes, tokens, merges), `pretokenize.py` (text into pieces), `bpe.py` (a piece into
tokens), `gpt2.py` (the API) with `special.py`, `batch.py`, `checks.py` and `tiktoken_names.py`; `files.py` and
`saving.py`; `auto.py`, Hugging Face's other names; `stream.py` and `train.py`. Why long text is fast: `long_text/`, of
which `memo.py` is the entrance, then `spans.py`, `words.py`, `hashing.py`, `merging.py`, `borders.py`, and
`token_bytes.py` for decoding.
"""

from .auto import AutoTokenizer, GPT2TokenizerFast, absent
from .batch import BatchEncoding
from .gpt2 import GPT2Tokenizer
from .stream import StreamDecoder

__all__ = ["AutoTokenizer", "BatchEncoding", "GPT2Tokenizer", "GPT2TokenizerFast", "StreamDecoder"]


def __getattr__(name):
    raise absent(name)
