"""One token of GPT-2 for each of a few rows, in five launches a layer: README.md beside this file."""

from kernels.decode.step import MAX_ROWS, DecodeBuffers, decode_step, pack_layer

__all__ = ["MAX_ROWS", "DecodeBuffers", "decode_step", "pack_layer"]
