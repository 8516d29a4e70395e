"""The kernels that torch takes for a linear layer, which round in their own ways, and inputs of ragged rows.

Which kernel multiplies an input of three or more axes whose layout is not one of rows depends on whether the weight
requires a gradient (`should_fold` in ATen's `LinearAlgebra.cpp`): one product of a copy, or a batch of them. A
skeleton's weights require none, so where the user's do the choice is made here, and bits agree with the user's model.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .site import Site

_ORIGINS: Any = WeakIdKeyDictionary()
"""The user's parameter behind each alias of one."""


def set_origin(alias: Tensor, tensor: Tensor) -> None:
    """Note which of the user's parameters an alias is of."""
    _ORIGINS[alias] = weakref.ref(tensor)


def is_trained(weight: Tensor) -> bool:
    """Return whether a weight, or the user's parameter that it is an alias of, requires a gradient.

    >>> layer = torch.nn.Linear(2, 2)
    >>> is_trained(layer.weight), is_trained(layer.weight.detach())
    (True, False)
    """
    if weight.requires_grad:
        return True
    origin = _ORIGINS.get(weight)
    tensor = None if origin is None else origin()
    return tensor is not None and bool(tensor.requires_grad)


def has_rows(x: Tensor) -> bool:
    """Return whether an input is a matrix in another shape: all axes but the last could be one without a copy.

    >>> has_rows(torch.ones(2, 3, 4)), has_rows(torch.ones(2, 3, 4).transpose(0, 1))
    (True, False)
    """
    sizes, steps = x.shape, x.stride()
    if len(sizes) == 3:
        return steps[0] == steps[1] * sizes[1]
    return all(steps[i] == steps[i + 1] * sizes[i + 1] for i in range(len(sizes) - 2))


def is_folded(x: Any, weight: Any, bias: Any) -> bool:
    """Return whether the user's layer copies an input into rows here, though an alias of its weight would not.

    Compiled calls do not ask: the compiler chooses kernels of its own.
    """
    return (
        type(x) is Tensor
        and x.ndim > 2
        and not x.is_nested
        and not has_rows(x)  # which most inputs have, and every call of a layer asks
        and not (bias is not None and x.is_contiguous())
        and torch._C._functorch.maybe_current_level() is None
        and not torch._C._is_any_autocast_enabled()
        and type(weight) in (Tensor, torch.nn.Parameter)
        and not weight.requires_grad
        and is_trained(weight)
    )


def folded(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Call `F.linear` on a copy of the input as rows, and add the bias after: the same kernels, in the same order.

    >>> folded(torch.ones(3, 2, 1).transpose(0, 1), torch.ones(1, 1), torch.ones(1)).shape
    torch.Size([2, 3, 1])
    """
    y = F.linear(x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], len(weight))
    return y if bias is None else y + bias


def over_values(layer: Callable[[Tensor], Tensor], site: Site, x: Tensor) -> Tensor:
    """Call a layer on the rows of a nested tensor, and give its output the same lengths.

    Args:
        layer: A layer of a kind that sees each row by itself.
        site: Its site.
        x: A nested tensor, `"batch length ..."`, of torch's jagged or strided layout.

    Raises:
        TypeError: A layer that mixes rows, or lengths that are not of the first axis after the batch.

    >>> x = torch.nested.nested_tensor([torch.ones(1, 2), torch.ones(3, 2)], layout=torch.jagged)
    >>> over_values(lambda rows: rows * 2, Site("head", "linear", 2, 2), x).shape[0]
    2
    """
    what = f"{site.path}: the input is a nested tensor of layout {x.layout}"
    if not site.routing.by_token:
        raise TypeError(
            f"{what}, and this is a {site.kind}, which torch cannot run on one; pad it, or loop over its parts"
        )
    if x.layout != torch.jagged:
        parts, features = x.unbind(), site.features
        if any(part.ndim < 1 + features for part in parts):
            raise TypeError(f"{what} with parts of shapes {[tuple(part.shape) for part in parts[:3]]}, expected rows")
        y = layer(torch.cat([part.flatten(0, part.ndim - 1 - features) for part in parts]))
        sizes = [part.shape[: part.ndim - features] for part in parts]
        outputs = y.split([size.numel() for size in sizes])
        shaped = [output.view(*size, y.shape[-1]) for output, size in zip(outputs, sizes, strict=True)]
        return torch.nested.as_nested_tensor(shaped)
    nested: Any = x
    if nested._ragged_idx != 1:
        raise TypeError(f"{what} whose lengths are of axis {nested._ragged_idx}, expected axis 1; transpose it back")
    y = layer(nested.values())
    return torch.nested.nested_tensor_from_jagged(y, nested.offsets(), nested.lengths())
