"""What a decode step's time means: the bytes a second that it reads, their share of a copy's, its launches."""

from functools import lru_cache

from bench.ceilings import copy_rows
from bench.lib.kernel_names import launches

DECODED = ("us_a_step", "gb_per_s", "copy_share", "launches")


def decoded(provider, B, T, median_ms, args):
    """{name: value} of DECODED for a step of B rows with T - 1 tokens cached. Bytes: those that it must read, once."""
    if median_ms is None:
        return {}
    gb_per_s = provider.bytes_a_step(B, T) / median_ms / 1e6
    copied = _copy_gb_per_s(args.device, args.quick)
    count = launches(provider.decoding(B, T)) if args.device.type == "cuda" else None
    return {
        "us_a_step": 1e3 * median_ms,
        "gb_per_s": gb_per_s,
        "copy_share": gb_per_s / copied if copied else None,
        "launches": count,
    }


@lru_cache
def _copy_gb_per_s(device, quick):
    """What a large copy moves here, reading and writing; None if it could not be timed."""
    return copy_rows(_Asked(device, quick))[0]["value"]


class _Asked:
    def __init__(self, device, quick):
        self.device, self.quick = device, quick
