"""CRC-32C (Castagnoli), over large arrays in numpy: of many stretches side by side, then joined.

A CRC is linear: that of A B is that of A, moved on by as many zero bytes as B has, xor that of B.
"""

import numpy as np

_POLYNOMIAL = np.uint32(0x82F63B78)  # reflected
_LANES = 1 << 14
_BLOCK = 1 << 26  # bytes joined at a time


def _byte_table():
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> np.uint32(1)) ^ _POLYNOMIAL, table >> np.uint32(1))
    return table


_TABLE = _byte_table()


def _step(crc, byte):
    return _TABLE[(crc ^ byte) & np.uint32(0xFF)] ^ (crc >> np.uint32(8))


def _moved(crc, zeros):
    """CRCs (a uint32 array), each moved on by the same number of zero bytes."""
    columns = np.uint32(1) << np.arange(32, dtype=np.uint32)  # the operator of one zero byte: what it makes of each bit
    columns = _step(columns, np.uint32(0))
    while zeros:
        if zeros & 1:
            crc = _apply(columns, crc)
        columns = _apply(columns, columns)
        zeros >>= 1
    return crc


def _apply(columns, crc):
    out = np.zeros_like(crc)
    for bit in range(32):
        out ^= np.where(crc >> np.uint32(bit) & np.uint32(1), columns[bit], np.uint32(0))
    return out


def _raw(data, crc):
    """The CRC register after `data` (uint8 array), from `crc` on, without the inversions at both ends."""
    width = len(data) // _LANES
    if width:
        lanes = data[: width * _LANES].reshape(_LANES, width)
        found = np.zeros(_LANES, np.uint32)
        found[0] = crc
        for column in np.ascontiguousarray(lanes.T):
            found = _step(found, column)
        while len(found) > 1:  # neighbours join
            found = _moved(found[::2], width) ^ found[1::2]
            width *= 2
        crc, data = found[0], data[width:]
    for byte in data:
        crc = _step(crc, np.uint32(byte))
    return crc


def crc32c(data):
    """The CRC-32C of bytes or of a uint8 array, as an int."""
    data = np.frombuffer(data, np.uint8) if isinstance(data, (bytes, bytearray, memoryview)) else data
    crc = np.uint32(0xFFFFFFFF)
    for start in range(0, len(data), _BLOCK):
        crc = _raw(data[start : start + _BLOCK], crc)
    return int(crc ^ np.uint32(0xFFFFFFFF))


def masked(crc):
    """How TensorFlow and LevelDB store it: a CRC of data that holds CRCs is a poor check."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
