"""Layers of other libraries that carry adapters, known by name so that nothing is imported."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.functional import Site
from torchgraft.functional.extending import register_by_name, register_hidden_product


def _conv1d(path: str, module: Any) -> Site:
    """Describe `transformers`' `Conv1D`, a linear map that stores `"in out"`."""
    weight: Any = module._parameters.get("weight")
    flat = weight is None or weight.ndim != 2  # what FullyShardedDataParallel makes of it between calls
    rows, columns = (module.nx, module.nf) if flat else weight.shape
    return Site(path, "linear", rows, columns, has_bias=True, transposed=True)


def _hides_grouped(module: nn.Module, weight: Tensor) -> bool | None:
    """Return whether experts of `transformers`, which choose it by a setting, compile torch's grouped product."""
    if getattr(getattr(module, "config", None), "_experts_implementation", None) != "grouped_mm":
        return None
    return weight.dtype == torch.bfloat16


register_hidden_product(_hides_grouped)
register_by_name("transformers.pytorch_utils", "Conv1D", _conv1d, linear_forward=True)
