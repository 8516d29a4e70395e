"""Runs of the base alone that call `see(path, x)` at each site."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .bound_model import BoundModel


@contextlib.contextmanager
def watched_base(bound: BoundModel, see: Callable[[str, Tensor], None]) -> Iterator[nn.Module]:
    """Yield a module like the user's in evaluation mode, without autograd, calling `see(path, x)` at each site."""
    lease = bound.pool().lease()
    skeleton = lease.skeleton
    skeleton.own_buffers()
    context, modes = skeleton.context, [module.training for _, module in skeleton.modules]
    context.trees, context.see = {}, see
    devices = {t.device for t in skeleton.aliases.values() if t.device.type not in ("cpu", "meta")}
    try:
        for _, module in skeleton.modules:
            module.training = False
        kind = next(iter(devices)).type if devices else "cuda"
        with torch.no_grad(), torch.random.fork_rng(list(devices), device_type=kind):
            yield skeleton.root
    finally:
        context.see = None
        for (_, module), mode in zip(skeleton.modules, modes, strict=True):
            module.training = mode
        lease.release()
