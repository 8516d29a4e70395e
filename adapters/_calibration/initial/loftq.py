"""LoftQ: factors that restore what quantising a weight loses.

Li et al., *LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models*, 2023, arXiv:2310.08659; PEFT's
`utils/loftq_utils.py`, whose quantisers are those of bitsandbytes. Here they are a few lines of torch, on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .spectral import Factors

BLOCK = 64
"""Entries of a weight that share one scale in NF4."""

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""The 16 values of NF4: quantiles of a normal distribution. Dettmers et al., 2023, arXiv:2305.14314, appendix E."""


def loftq(weight: Tensor, r: int, bits: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise a weight and fit factors to the rest, in turns: `Q = q(W - B A)`, then `B A = svd_r(W - Q)`.

    Args:
        weight: `"out in"`.
        r: Rank.
        bits: 4 for NF4, 8 for int8.
        iterations: Number of turns.

    Returns:
        The quantised weight as numbers, `"out in"`; `A`, `"r in"`; `B`, `"out r"`.

    >>> weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    >>> quantised, a, b = loftq(weight, 2, 4, 1)
    >>> bool((weight - quantised - b @ a).norm() < (weight - quantised).norm())
    True
    """
    target = weight
    for _ in range(iterations):
        quantised = quantise(target, bits)
        a, b = _share(weight - quantised, r)
        target = weight - b @ a
    return quantised, a, b


def _share(matrix: Tensor, r: int) -> Factors:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:r].sqrt()
    return root[:, None] * vh[:r], u[:, :r] * root


def quantise(weight: Tensor, bits: int) -> Tensor:
    """Return the nearest numbers that a quantised weight can hold.

    >>> quantise(torch.tensor([[1.0, 0.5, -0.1, 0.0]]), 4).tolist()[0][::3]
    [1.0, 0.0]
    >>> quantise(torch.tensor([[127.0, 63.6]]), 8)
    tensor([[127.,  64.]])
    """
    if bits == 8:
        scale = weight.abs().amax(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny) / 127
        return (weight / scale).round() * scale
    blocks = torch.nn.functional.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    levels = torch.tensor(NF4, dtype=weight.dtype, device=weight.device)
    nearest = torch.bucketize(blocks / scale, (levels[1:] + levels[:-1]) / 2)
    return (levels[nearest] * scale).flatten()[: weight.numel()].view(weight.shape)
