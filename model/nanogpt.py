"""The methods that whoever comes from nanoGPT looks for on a model."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kernels.checks import check_number
from model.config import GPT2Config, brief


class NanoGPTNames:
    """For a model with `transformer` and `config`."""

    # Of the model.
    config: GPT2Config
    device: torch.device
    transformer: Any
    num_parameters: Callable[..., Any]
    release_graphs: Callable[..., Any]

    def get_num_params(self, non_embedding: bool = True) -> int:
        """The number of parameters, without position embeddings; token embeddings count, as the head's weights."""
        return self.num_parameters() - (self.transformer.wpe.weight.numel() if non_embedding else 0)

    def configure_optimizers(
        self, weight_decay: float, learning_rate: float, betas: tuple[float, float], device_type: str | None = None
    ) -> torch.optim.Optimizer:
        """AdamW with decay for matrices and embeddings alone. device_type: the model's, which need not be said."""
        from model.training.optimizer import adamw

        if device_type is not None and not (isinstance(device_type, str) and device_type == self.device.type):
            raise ValueError(
                f"configure_optimizers: device_type is {brief(device_type)}; the model is on {self.device}"
            )
        options = {"weight_decay": weight_decay, "betas": betas, "function": "configure_optimizers"}
        return adamw(self, lr=learning_rate, **options)

    def estimate_mfu(self, fwdbwd_per_iter: int, dt: float, peak_flops: float | None = None) -> float:
        """The share of the device's FLOP/s that `fwdbwd_per_iter` sequences of n_positions in dt seconds used.

        peak_flops: of the device; by default its data sheet's for 16-bit products. nanoGPT's is always an A100's.
        """
        from model.training import optimizer

        for name, value in (("fwdbwd_per_iter", fwdbwd_per_iter), ("dt", dt), ("peak_flops", peak_flops)):
            if name != "peak_flops" or value is not None:
                words = "finite, and positive"
                check_number("estimate_mfu", value, name, words, lambda x: 0.0 < x < math.inf)
        peak = optimizer.peak_flops(self.device) if peak_flops is None else peak_flops
        if peak is None:
            raise ValueError(f"estimate_mfu: no data sheet of {self.device} is at hand; give its peak_flops, in FLOP/s")
        T = self.config.n_positions
        return optimizer.flops_per_token(self, T) * T * fwdbwd_per_iter / dt / peak

    def crop_block_size(self, block_size: int) -> None:
        """Shortens the model to `block_size` positions, in place."""
        most = self.config.n_positions
        check_number(
            "crop_block_size", block_size, "block_size", f"1 to {most}", lambda n: 1 <= n <= most, integer=True
        )
        wpe = self.transformer.wpe
        with torch.no_grad():
            wpe.weight = nn.Parameter(wpe.weight[:block_size].clone(), requires_grad=wpe.weight.requires_grad)
        wpe.num_embeddings = self.config.n_positions = block_size
        self.release_graphs()
