"""Linear layers: `y = x W^T + b`, also those whose weight is packed where no attribute holds it."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .site import Kind, Registration, Routing, Site, add_kind


def _call(site: Site, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def _registered(path: str, module: Any, sizes: tuple[int, int], kernel: tuple[int, ...]) -> Site:
    return Site(path, "linear", *sizes)


LINEAR = add_kind(
    Kind("linear", _call, features=1, routing=Routing(by_token=True), registration=Registration(_registered))
)


def describe_linear(path: str, module: nn.Linear) -> Site:
    """Describe a linear layer."""
    return Site(path, "linear", module.in_features, module.out_features, module.bias is not None)


def describe_packed(path: str, module: Any) -> Site:
    """Describe a linear layer whose weight and bias are packed where no attribute holds them as tensors."""
    return Site(path, "linear", module.in_features, module.out_features, weight_names=())
