"""Byte-level BPE, exact and offline."""
