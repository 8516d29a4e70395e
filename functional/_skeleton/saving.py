"""State dicts of adapted modules: their adapted tensors, not those of the base that hang in the module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

INSTEAD = "use save_adapter for the adapter alone, or merge(graft, params) for the adapted model"


def write(path: str, destination: dict[str, Any], prefix: str, tensors: Mapping[str, Any], keep_vars: bool) -> None:
    """Put a site's adapted tensors in the place of the base's in a state dict.

    Args:
        path: The site's path.
        destination: The state dict.
        prefix: What the names of the module's tensors start with in it.
        tensors: Adapted tensors by the module's names; `None` where each row has a tensor of its own.
        keep_vars: Whether they stay part of the autograd graph.

    Raises:
        ValueError: Tensors of each row; a weight that its module computes.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{path}: each row has an adapter of its own in this view, and a state dict has one {name}; save the "
                "adapters (save_adapter), or merge(graft, unstack(many)[i])"
            )
        if prefix + name not in destination:
            raise ValueError(
                f"{path}: {name} is computed (a parametrization or weight norm), so no entry of the state dict is the "
                f"adapted one; {INSTEAD}"
            )
        destination[prefix + name] = tensor if keep_vars else tensor.detach()
