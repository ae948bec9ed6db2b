"""Training: data, optimizer, loop, saved states. `python -m model.train` is its command."""

from model.neighbours import require

require("tokenizer")  # its shards are what is read
