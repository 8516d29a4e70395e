"""What `backward` leaves in `.grad` of a layer's parameters, where PEFT has hooks for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchgraft.functional.extending import SiteAdapter


def hook_gradient(entry: SiteAdapter, leaf: str, parameter: Any) -> None:
    """Have a leaf's gradient changed as its method says, after each `backward` has added to it.

    Other gradients, such as `torch.autograd.grad` returns, are what they are. What the hook does twice it does once.

    Args:
        entry: The adapter's part at the layer.
        leaf: Name of the leaf.
        parameter: The parameter that it is; it may be frozen, and trained later.
    """
    config: Any = entry.config
    change = config.form.gradients(config, entry.site, leaf)
    if change is None:
        return

    @torch.no_grad()
    def accumulated(parameter: Tensor) -> None:
        if parameter.grad is not None:
            parameter.grad.copy_(change(parameter.grad))

    trained = parameter.requires_grad
    parameter.requires_grad_().register_post_accumulate_grad_hook(accumulated)
    parameter.requires_grad_(trained)


def hook_gradients(layer: Any) -> None:
    """Have the gradients of all leaves of a layer changed; copies of parameters have lost their hooks."""
    for name, entry in layer.entries.items():
        for leaf, held, _, part in layer.held(name):
            hook_gradient(entry, leaf, held if part is None else getattr(held, part))
