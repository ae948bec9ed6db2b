"""Figures that others have published, as data: what a result of ours is set against, with its source.

They were measured on the authors' machines, not here: shapes and clocks differ, so they say where one stands, no more.
"""

from typing import NamedTuple

_THREE = "Shah et al., FlashAttention-3 (2024), arXiv:2407.08608"
_TWO = "Dao, FlashAttention-2 (2023), arXiv:2307.08691"
# What stands behind each figure. The paper's pictures print their figures; those of QuACK are read off its chart.
SOURCES = {
    "3 forward": f"{_THREE}, figure 5: attention forward speed (FP16/BF16) on H100",
    "3 backward": f"{_THREE}, figure 6: attention backward speed (FP16/BF16) on H100",
    "2 both": f"{_TWO}, figure 4: attention forward + backward speed on A100",
    "H100": "NVIDIA H100 Tensor Core GPU datasheet, H100 SXM, without sparsity",
    "QuACK": "Guo, Zadouri and Dao, Getting Memory-bound Kernels to Speed-of-Light (2025-07-10), its chart in bf16; "
    "Dao-AILab/quack, README",
    "llm.c": "karpathy/llm.c, README and discussions (2024): a round figure, its page was not noted",
}


class Attention(NamedTuple):
    """TFLOP/s of one implementation over sequence lengths; B T = 16k, H D = 2048, fp16."""

    name: str
    gpu: str
    mode: str
    D: int
    causal: bool
    tflops: dict
    source: str


def _row(name, mode, D, causal, figures, gpu="H100 SXM", source=None):
    lengths = (512, 1024, 2048, 4096, 8192, 16384)
    return Attention(name, gpu, mode, D, causal, dict(zip(lengths, figures)), SOURCES[source or f"3 {mode}"])


ATTENTION = (
    _row("FlashAttention-2", "forward", 64, True, (180, 229, 262, 284, 295, 299)),
    _row("Triton tutorial", "forward", 64, True, (152, 291, 342, 363, 376, 363)),
    _row("cuDNN", "forward", 64, True, (225, 288, 334, 363, 379, 388)),
    _row("FlashAttention-3", "forward", 64, True, (197, 265, 371, 420, 460, 473)),
    _row("FlashAttention-2", "forward", 64, False, (282, 306, 318, 321, 322, 324)),
    _row("Triton tutorial", "forward", 64, False, (340, 382, 396, 400, 401, 403)),
    _row("cuDNN", "forward", 64, False, (335, 373, 395, 408, 412, 413)),
    _row("FlashAttention-3", "forward", 64, False, (333, 392, 460, 476, 496, 497)),
    _row("FlashAttention-2", "forward", 128, True, (191, 260, 298, 319, 333, 335)),
    _row("Triton tutorial", "forward", 128, True, (146, 273, 323, 353, 369, 378)),
    _row("cuDNN", "forward", 128, True, (315, 410, 484, 518, 529, 539)),
    _row("FlashAttention-3", "forward", 128, True, (292, 423, 521, 579, 602, 616)),
    _row("FlashAttention-2", "backward", 64, False, (198, 238, 264, 279, 287, 291)),
    _row("cuDNN", "backward", 64, False, (266, 348, 395, 417, 432, 433)),
    _row("FlashAttention-3", "backward", 64, False, (272, 363, 422, 453, 472, 474)),
    _row(
        "FlashAttention-2",
        "forward and backward",
        64,
        True,
        (88, 119, 140, 156, 165, 171),
        gpu="A100 SXM",
        source="2 both",
    ),
)


class Figure(NamedTuple):
    """One figure: what was measured, how much of what, on which GPU."""

    what: str
    value: float
    unit: str
    gpu: str
    source: str


OTHERS = (
    Figure("dense bf16 products, datasheet", 989, "TFLOP/s", "H100 SXM", SOURCES["H100"]),
    Figure("memory, datasheet", 3350, "GB/s", "H100 SXM", SOURCES["H100"]),
    Figure("RMSNorm forward, N = 1k", 2580, "GB/s", "H100 SXM", SOURCES["QuACK"]),
    Figure("cross-entropy, V = 65k", 3180, "GB/s", "H100 SXM", SOURCES["QuACK"]),
    Figure("cross-entropy, V = 65k, torch.compile", 1480, "GB/s", "H100 SXM", SOURCES["QuACK"]),
    Figure("cross-entropy, V = 65k, Liger", 990, "GB/s", "H100 SXM", SOURCES["QuACK"]),
    Figure("training GPT-2 124M", 475e3, "tokens/s", "H100 SXM", SOURCES["llm.c"]),
    Figure("training GPT-2 124M", 237e3, "tokens/s", "A100 SXM", SOURCES["llm.c"]),
)
