"""The next tokens of GPT-2, one of each of a few texts or several of one, in five launches a layer: README.md."""

from kernels.decode.choose import choose
from kernels.decode.fingerprint import fingerprints
from kernels.decode.pack import WEIGHTS, Packed, Weights, from_int8, pack, to_int8
from kernels.decode.persistent import GridBuffers, persistent_step
from kernels.decode.step import MAX_ROWS, DecodeBuffers, decode_step

__all__ = [
    "MAX_ROWS",
    "WEIGHTS",
    "DecodeBuffers",
    "GridBuffers",
    "Packed",
    "Weights",
    "choose",
    "decode_step",
    "fingerprints",
    "from_int8",
    "pack",
    "persistent_step",
    "to_int8",
]
