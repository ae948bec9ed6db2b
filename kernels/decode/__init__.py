"""The next tokens of GPT-2, one of each of a few texts or several of one, in five launches a layer: README.md."""

from kernels.decode.pack import WEIGHTS, Packed, from_int8, pack, to_int8
from kernels.decode.step import MAX_ROWS, DecodeBuffers, decode_step

__all__ = ["MAX_ROWS", "WEIGHTS", "DecodeBuffers", "Packed", "decode_step", "from_int8", "pack", "to_int8"]
