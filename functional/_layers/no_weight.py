"""The placeholder for the weight of a module where each row has its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class NoWeight(Tensor):
    """The weight of a routed module: it answers what does not depend on the row and refuses everything else."""

    _facts: frozenset[Callable[..., Any]] = frozenset(
        {
            getattr(Tensor, name).__get__
            for name in (
                "dtype",
                "device",
                "shape",
                "ndim",
                "requires_grad",
                "layout",
                "is_cuda",
                "is_meta",
                "itemsize",
            )
        }
        | {Tensor.size, Tensor.dim, Tensor.stride, Tensor.numel, Tensor.is_floating_point, Tensor.element_size}
    )
    path: str

    @classmethod
    def of(cls, weight: Tensor, path: str) -> NoWeight:
        new = weight.detach().as_subclass(cls)
        new.path = path
        return new

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in cls._facts:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise RuntimeError(
            f"{_path_of((args, kwargs))}: the model reads the weight of this module instead of calling it, and with "
            "route each row has its own weight; leave it out of target_modules, or call the graft with one adapter "
            "at a time"
        )


def stand_in(tensor: Tensor, path: str) -> Tensor:
    """Make a placeholder for a tensor of which each row has its own: some parents ask a weight for its dtype."""
    if torch.compiler.is_compiling():  # mixing it with the model's tensors is an error there
        return tensor.detach().to("meta")
    return NoWeight.of(tensor, path)


def _path_of(x: Any) -> str:
    if isinstance(x, NoWeight):
        return str(x.__dict__.get("path"))
    if isinstance(x, dict):
        x = list(x.values())
    return next((p for item in x if (p := _path_of(item))), "") if isinstance(x, (list, tuple)) else ""
