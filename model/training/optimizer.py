"""AdamW as GPT-2's kind is trained with it, its learning rate, and how much of the chip a step uses."""

import math

import torch
from torch.distributed.tensor import DTensor

from kernels.checks import check_number
from model.config import brief

# Dense 16-bit matrix products with fp32 sums, FLOP/s, from NVIDIA's data sheets, by a part of the device's name.
PEAK = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def adamw(model, *, lr, weight_decay=0.1, betas=(0.9, 0.95), function="adamw"):
    """torch's AdamW, fused where it can be. Matrices and embeddings decay; biases and norms do not.

    Brown et al. 2020, "Language Models are Few-Shot Learners", appendix B, for betas and decay. Raises TypeError or
    ValueError, in the name of `function`, for a rate, a decay or betas that cannot be.
    """
    check_number(function, lr, "learning_rate", "finite, and positive", lambda x: 0.0 < x < math.inf)
    check_number(function, weight_decay, "weight_decay", "finite, and at least 0", lambda x: 0.0 <= x < math.inf)
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise TypeError(f"{function}: betas is {brief(betas)}; it must be two numbers")
    for beta in betas:
        check_number(function, beta, "one of betas", "at least 0, and below 1", lambda x: 0.0 <= x < 1.0)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in ("cpu", "cuda") for p in trained)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=fused)


def clip_gradients(parameters, optimizer, most, *, scaled=False):
    """The norm of the parameters' gradients, which the optimizer's next step takes cut to a norm of `most`, if not 0.

    A fused optimizer divides by its `grad_scale` what it reads, and writes that back: clip_grad_norm_ before it would
    read all gradients once more. It is clip_grad_norm_ where the optimizer is not fused, for DTensors, of which a fused
    one takes no plain factor, and where the step is a GradScaler's (scaled), which has the attribute to itself.
    """
    parameters = list(parameters)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    optimizer.grad_scale = None
    if most and optimizer.defaults["fused"] and not scaled and not isinstance(norm, DTensor):
        optimizer.grad_scale = ((norm + 1e-6) / most).clamp_(min=1.0)
    elif most:
        torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)
    return norm


def learning_rate(step, *, lr, warmup, steps, least):
    """Of step 0, 1, ...: rises linearly over `warmup` steps, then falls as a cosine to `least` at the last one."""
    if step < warmup:
        return lr * (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    return least + 0.5 * (lr - least) * (1.0 + math.cos(math.pi * done))


def flops_per_token(model, T):
    """FLOPs of a training step per token: 6 N + 12 L C T, N all parameters but the position embeddings.

    Chowdhery et al. 2022, "PaLM", appendix B: attention counted in full, recomputation not at all.
    """
    config = model.config
    N = sum(p.numel() for p in model.parameters()) - model.transformer.wpe.weight.numel()
    return 6 * N + 12 * config.n_layer * config.n_embd * T


def peak_flops(device):
    """What the device could do, FLOP/s in 16 bits, or None where no data sheet is at hand."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK.items() if part in name), None)
