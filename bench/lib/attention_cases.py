"""The shapes of the attention sweep: six scenarios, the inputs of a shape, and what it counts as work.

packed      attention as the model calls it, over T: the projection [B, T, 3C] to [B, T, C], and the gradient of the one
            to that of the other, with all copies that a backend needs between (SDPA's heads merged, dq, dk, dv joined)
lengths     self-attention over sequence lengths T, every token valid
padding     rows of unequal length in one batch, padded left or right, over the share of keys that is valid
dropout     training with and without dropout on the probabilities, over T
decode      1, 4 or 16 queries per row against a cache of T_k keys, over T_k; no gradient
head-dims   self-attention over head dims, with as many heads as keep the model's width

FLOPs follow the flash-attention papers, so that figures compare: forward 4 H D operations for each pair of a query and
a key that it sees (two products, two operations for a multiply-add), backward 2.5 times that (five products for two).
Pairs per row: T T_k, less T^2 / 2 when causal (not the exact T (T - 1) / 2). A padded row counts as the sequence of its
valid tokens, n for both T and T_k; what the padding queries cost, and dropout's choices, is no work that was asked for.
"""

from dataclasses import dataclass, replace

import torch

from bench.lib.lanes import DTYPES
from model.attention import split_heads

# By scenario, then device and whether --quick: lengths (T; for decode T_k); tokens in a batch.
SIZES = {
    "lengths": {
        ("cuda", False): ((128, 256, 512, 1024, 2048, 4096, 8192, 16384), 16384),
        ("cuda", True): ((128, 1024, 4096), 4096),
        ("cpu", False): ((128, 256, 512, 1024), 1024),
        ("cpu", True): ((64, 128, 256), 256),
    },
    "packed": {
        ("cuda", False): ((128, 256, 512, 1024, 2048, 4096, 8192), 16384),
        ("cuda", True): ((128, 1024), 4096),
        ("cpu", False): ((128, 256, 512, 1024), 1024),
        ("cpu", True): ((64,), 128),
    },
    "padding": {
        ("cuda", False): ((2048,), 32768),
        ("cuda", True): ((1024,), 8192),
        ("cpu", False): ((256,), 1024),
        ("cpu", True): ((64,), 128),
    },
    "dropout": {
        ("cuda", False): ((1024, 2048, 4096), 16384),
        ("cuda", True): ((1024,), 4096),
        ("cpu", False): ((128, 256, 512), 1024),
        ("cpu", True): ((64,), 64),
    },
    # On a GPU the cache is several times its L2: 805 MB for GPT-2 in two bytes.
    "decode": {
        ("cuda", False): ((1024, 4096, 16384, 65536), 2**18),
        ("cuda", True): ((4096,), 2**16),
        ("cpu", False): ((256, 1024, 4096), 4096),
        ("cpu", True): ((256,), 256),
    },
    "head-dims": {
        ("cuda", False): ((2048,), 16384),
        ("cuda", True): ((1024,), 4096),
        ("cpu", False): ((256,), 512),
        ("cpu", True): ((64,), 64),
    },
}
SCENARIOS = tuple(SIZES)

VALID_SHARES = (1.0, 0.5, 0.25)
DROPOUT_PS = (0.0, 0.1)  # GPT-2 trains with 0.1
DECODED = (1, 4, 16)  # queries at once: plain decoding, and drafts to verify
HEAD_DIMS = (16, 32, 40, 64, 80, 96, 128, 160, 256)


@dataclass(frozen=True)
class Case:
    """One shape, with the names that a row has for it. T counts queries; T_k counts keys, None for as many.

    padding: "none", "left" or "right". valid: the share of the T_k keys of a row that is valid, on average over the
    batch.
    """

    dtype: str
    B: int
    H: int
    T: int
    D: int
    causal: bool
    T_k: int | None = None
    padding: str = "none"
    valid: float = 1.0
    dropout_p: float = 0.0
    scenario: str = "lengths"

    def __post_init__(self):
        if self.T_k is None:
            object.__setattr__(self, "T_k", self.T)
        # The share that whole tokens give, which is the one that the row states.
        object.__setattr__(self, "valid", sum(self.lengths()) / (self.B * self.T_k))

    def lengths(self):
        """Valid keys of each row: evenly spread around the share `valid`, as widely as [0, T_k] allows."""
        spread = min(self.valid, 1 - self.valid)
        shares = (self.valid + spread * (2 * (b + 0.5) / self.B - 1) for b in range(self.B))
        return [max(1, round(share * self.T_k)) for share in shares]

    def inputs(self, device):
        """q and do [B, H, T, D], k and v [B, H, T_k, D], in the memory order that the model gives them.

        Self-attention: q, k and v are views of one projection [B, T, 3HD]. Fewer queries than keys: k and v lie in a
        cache, [B, H, T_k, D] in memory.
        """
        generator = torch.Generator(device).manual_seed(self.T)
        options = {"generator": generator, "device": device, "dtype": DTYPES[self.dtype]}
        q, k, v = split_heads(torch.randn(self.B, self.T, 3 * self.H * self.D, **options), self.H)
        do = torch.randn(self.B, self.T, self.H, self.D, **options).transpose(1, 2)
        if self.T_k != self.T:
            k, v = torch.randn(2, self.B, self.H, self.T_k, self.D, **options)
        return q, k, v, do

    def options(self, device):
        """What attention is asked for besides dropout: causal, and the bounds of the valid keys, int32 [B] or None."""
        bounds = {"kv_start": None, "kv_end": None}
        if self.padding != "none":
            lengths = torch.tensor(self.lengths(), dtype=torch.int32, device=device)
            bounds |= {"kv_start": self.T_k - lengths} if self.padding == "left" else {"kv_end": lengths}
        return {"causal": self.causal, **bounds}

    def needs(self):
        """What a backend must be able to do, in the registry's words."""
        return {
            "padding": self.padding != "none",
            "dropout": self.dropout_p > 0,
            "unequal_lengths": self.T_k != self.T,
        }


def flops(mode, case):
    """Floating-point operations of one pass; the module's docstring has the formula."""
    rows = [(case.T, case.T_k)] * case.B if case.padding == "none" else [(n, n) for n in case.lengths()]
    pairs = sum(T * T_k - (T**2 / 2 if case.causal else 0) for T, T_k in rows)
    return 4 * case.H * case.D * pairs * {"forward": 1.0, "backward": 2.5}[mode]


def cache_bytes(case):
    """Bytes of the keys and values of the batch, each read once: 2 B H T_k D elements."""
    return 2 * case.B * case.H * case.T_k * case.D * DTYPES[case.dtype].itemsize


def variants(case):
    """The shapes that a scenario makes of one: (case, ...). `case.T` is the length that was asked for."""
    if case.scenario == "padding":
        return tuple(replace(case, padding=side, valid=share) for side in ("left", "right") for share in VALID_SHARES)
    if case.scenario == "dropout":
        return tuple(replace(case, dropout_p=p) for p in DROPOUT_PS)
    if case.scenario == "decode":
        return tuple(replace(case, T=queries, T_k=case.T) for queries in DECODED if queries < case.T)
    if case.scenario == "head-dims":
        width = case.H * case.D
        return tuple(replace(case, D=D, H=max(1, width // D)) for D in HEAD_DIMS)
    return (case,)


def modes_of(scenario, modes):
    """Those of `modes` that a scenario has."""
    return [mode for mode in modes if mode == "forward" or scenario != "decode"]
