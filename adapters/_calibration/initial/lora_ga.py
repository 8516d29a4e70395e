"""LoRA-GA: factors along the gradient that full fine-tuning would take first.

Wang et al., *LoRA-GA: Low-Rank Adaptation with Gradient Approximation*, 2024, arXiv:2407.05000; PEFT's
`tuners/lora/loraga.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .configs import LoraGAConfig
from .spectral import SEED, Factors, randomised_svd

STEPS = 4
"""Steps of subspace iteration, as PEFT takes."""


def lora_ga(weight: Tensor, gradient: Tensor, r: int, scaling: float, how: LoraGAConfig) -> Factors:
    """Two shares of the `2 r` first singular vectors of the gradient: right ones in `A`, left ones in `B`.

    `B` is multiplied by the singular values of its share, as in PEFT.

    Args:
        weight: `"out in"`.
        gradient: The gradient of the loss with respect to it, `"out in"`.
        r: Rank, at most half of the smaller side.
        scaling: The adapter's scaling factor.
        how: Which share is whose (`direction`), and the size of the factors (`scale`).

    >>> gradient = torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5]))
    >>> a, b = lora_ga(torch.eye(4), gradient, 1, 1.0, LoraGAConfig(scale="unit"))
    >>> a.abs().round().tolist(), b.abs().round().flatten().tolist()
    ([[1.0, 0.0, 0.0, 0.0]], [0.0, 2.0, 0.0, 0.0])
    """
    generator = torch.Generator().manual_seed(SEED)
    u, s, vh = randomised_svd(gradient, min(4 * r, *gradient.shape), STEPS, generator)
    own, other = _shares(r, how.direction, generator)
    a, b, largest = vh[own], u[:, other] * s[other], s[other][0]
    if how.scale == "stable":
        b = b * (weight.shape[0] ** 0.25 / how.stable_gamma**0.5)
    elif how.scale == "weight_svd" and largest > 0:
        b = b * (randomised_svd(weight, r, STEPS, generator)[1][0] / largest)
    elif how.scale == "gd_scale":
        a, b = a / scaling, b / scaling
    return a.contiguous(), b.contiguous()


def _shares(r: int, direction: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return which singular vectors `A` and `B` take."""
    every = torch.arange(2 * r)
    if direction == "ArBr":
        return every[1::2], every[0::2]
    if direction == "A2rBr":
        return every[r:], every[:r]
    if direction == "ArB2r":
        return every[:r], every[r:]
    chosen = torch.randperm(2 * r, generator=generator)[:r]
    return chosen, chosen
