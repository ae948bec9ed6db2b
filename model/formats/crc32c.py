"""CRC-32C (Castagnoli, RFC 3720 B.4) in numpy: many lanes of the data at once, joined by linear algebra over GF(2).

crc(A + B) = shift(crc(A), len(B)) ^ crc(B), where shift appends zero bytes: a linear map of 32 bits, so 32 numbers are
enough to say it, and squaring it doubles the length. One GB takes about ten seconds.
"""

import numpy as np

_POLYNOMIAL = 0x82F63B78
_LANE = 2048  # bytes
_BLOCK = 2**25  # bytes looked at at once


def _tables():
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ np.uint32(_POLYNOMIAL), table >> 1)
    tables = [table]
    for _ in range(3):
        tables.append(tables[-1] >> 8 ^ table[tables[-1] & 0xFF])
    return tables


_TABLES = _tables()
_BYTES = [int(entry) for entry in _TABLES[0]]


def _zero_byte():
    """The map of one zero byte, as what becomes of each bit."""
    return np.array([_BYTES[bit & 0xFF] ^ bit >> 8 for bit in (1 << i for i in range(32))], dtype=np.uint32)


def _apply(matrix, crcs):
    """The map `matrix` of each of crcs."""
    result = np.zeros_like(crcs)
    for i in range(32):
        result ^= np.where(crcs >> np.uint32(i) & 1, matrix[i], np.uint32(0))
    return result


def _power(length):
    """The map of `length` zero bytes."""
    result, square = np.uint32(1) << np.arange(32, dtype=np.uint32), _zero_byte()
    while length:
        if length & 1:
            result = _apply(square, result)
        square, length = _apply(square, square), length >> 1
    return result


def crc32c(data, crc=0):
    """The CRC-32C of bytes (anything with a buffer), going on from the one of what came before."""
    data = np.frombuffer(data, dtype=np.uint8)
    for start in range(0, len(data), _BLOCK):
        block = data[start : start + _BLOCK]
        lanes = len(block) // _LANE
        crc ^= 0xFFFFFFFF
        if lanes:
            crc = _lanes(block[: lanes * _LANE].reshape(lanes, _LANE), crc)
        for byte in block[lanes * _LANE :].tolist():
            crc = crc >> 8 ^ _BYTES[(crc ^ byte) & 0xFF]
        crc ^= 0xFFFFFFFF
    return crc


def _lanes(block, crc):
    """The register after a block [lanes, bytes], before the last inversion."""
    words = np.ascontiguousarray(block.view("<u4").T)  # [words, lanes]
    crcs = np.zeros(len(block), dtype=np.uint32)
    crcs[0] = crc
    t0, t1, t2, t3 = _TABLES
    for word in words:
        crcs ^= word
        crcs = t3[crcs & 0xFF] ^ t2[crcs >> 8 & 0xFF] ^ t1[crcs >> 16 & 0xFF] ^ t0[crcs >> 24]
    shift = _power(_LANE)
    while len(crcs) > 1:  # an odd one out stands first, where a lane of zeros before it changes nothing
        if len(crcs) % 2:
            crcs = np.concatenate([np.zeros(1, np.uint32), crcs])
        crcs = _apply(shift, crcs[0::2]) ^ crcs[1::2]
        shift = _apply(shift, shift)
    return int(crcs[0])


def masked(crc):
    """As LevelDB and TensorFlow store a CRC beside the data that it is of."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
