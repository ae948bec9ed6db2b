"""The peers, built offline from our vocabulary: tiktoken's, and Hugging Face's from files we save."""

import pytest
from optional import tiktoken, tokenizers

from tokenizer import GPT2Tokenizer

TIKTOKEN_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


@pytest.fixture(scope="session")
def gpt2():
    return GPT2Tokenizer.from_pretrained("gpt2")


@pytest.fixture
def fresh():
    """A tokenizer that a test may change."""
    return GPT2Tokenizer.from_pretrained("gpt2")


@pytest.fixture(scope="session")
def saved(gpt2, tmp_path_factory):
    """The directory that `save_pretrained` wrote."""
    directory = tmp_path_factory.mktemp("gpt2")
    gpt2.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def openai(gpt2):
    return tiktoken.Encoding(
        "gpt2",
        pat_str=TIKTOKEN_PATTERN,
        mergeable_ranks={token: id for id, token in gpt2.vocabulary.token_bytes().items()},
        special_tokens={"<|endoftext|>": 50256},
    )


@pytest.fixture(scope="session")
def hugging_face(saved):
    return tokenizers.Tokenizer.from_file(str(saved / "tokenizer.json"))
