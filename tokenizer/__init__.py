"""GPT-2's tokenizer: byte-level BPE, exact, offline, in Python and numpy. Imports nothing else of the project.

    from tokenizer import GPT2Tokenizer

    tokenizer = GPT2Tokenizer.from_pretrained("gpt2")
    ids = tokenizer.encode("Hello, world!")
    assert tokenizer.decode(ids) == "Hello, world!"

Reading order: `vocabulary.py` (bytes, tokens, merges), `pretokenize.py` (text into pieces), `bpe.py` (a piece into
tokens), `memo.py`, `gpt2.py` (the API); why long text is fast: `spans.py`, `words.py`, `hashing.py`, `merging.py`,
`borders.py`; then `special.py`, `batch.py`, `files.py`, `stream.py` and `train.py`.
"""

from .batch import BatchEncoding
from .gpt2 import GPT2Tokenizer
from .stream import StreamDecoder

__all__ = ["BatchEncoding", "GPT2Tokenizer", "StreamDecoder"]
