"""Models of quantised layers as models of floating point, which weights can be merged into."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ._messages import given_type
from ._sites.kinds import describe
from ._sites.tensors import quantised_form
from ._tensors.wrappers import modules_of

_EIGHT_BITS = 127.0
"""What bitsandbytes' integers of eight bits go up to."""


def dequantized(model: nn.Module) -> nn.Module:
    """Return a model whose quantised layers are dequantised: with weights in floating point.

    Known are torchao's tensors, torch's own dynamic int8 and bitsandbytes' layers of eight and of four bits. Linear
    layers that are modules of their own kind become `nn.Linear`. Everything else is shared with the given model,
    which stays as it is.

    Args:
        model: The model; one without quantised layers is copied all the same.

    Raises:
        TypeError: No module, or a quantised weight that this does not know; names the path.

    >>> model = nn.Sequential(nn.Linear(4, 3))
    >>> other = dequantized(model)
    >>> other[0] is model[0], other[0].weight is model[0].weight
    (False, True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"dequantized: model is {given_type(model)}, expected a torch.nn.Module")
    memo: dict[int, Any] = {}
    for path, module in modules_of(model).items():
        if id(module) in memo:
            continue
        if (plain := _plain_linear(path, module)) is not None:
            memo[id(module)] = plain.train(module.training)
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in memo:
                memo[id(parameter)] = _plain_parameter(f"{path}.{name}".lstrip("."), parameter)
    memo |= {id(buffer): buffer for buffer in model.buffers() if id(buffer) not in memo}
    result: nn.Module = copy.deepcopy(model, memo)
    return result


def is_quantised(module: nn.Module) -> bool:
    """Return whether a module holds its weight in a form that `dequantized` changes.

    >>> is_quantised(nn.Linear(2, 2))
    False
    """
    site = describe("", module)
    if site is not None and not site.weight_names:
        return True
    return any(quantised_form(one) is not None for one in module._parameters.values() if one is not None)


def _plain_linear(path: str, module: Any) -> nn.Linear | None:
    """Return a module of another library's, or of torch's packed kind, as a linear layer in floating point."""
    site = describe(path, module)
    if site is None:
        return None
    if not site.weight_names:
        return _linear(module.weight().dequantize(), module.bias())
    weight = module._parameters.get("weight")
    if weight is None or type(weight).__module__.partition(".")[0] != "bitsandbytes":
        return None
    return _linear(_of_bitsandbytes(path, module, weight), module.bias)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return made


def _of_bitsandbytes(path: str, module: Any, weight: Any) -> Tensor:
    """Return the dequantised weight of a layer of bitsandbytes.

    Its functions are those of the library that made the weight, which is there then.

    Raises:
        TypeError: A layer that was not quantised yet.
    """
    state = getattr(weight, "quant_state", None)
    if state is not None:
        functional: Any = sys.modules["bitsandbytes.functional"]
        four_bits: Tensor = functional.dequantize_4bit(weight.data, state)
        return four_bits
    held = getattr(module, "state", None)
    scales = next((one for one in (getattr(weight, "SCB", None), getattr(held, "SCB", None)) if one is not None), None)
    if weight.dtype == torch.int8 and scales is not None:
        eight_bits: Tensor = weight.data.float() * scales.float().unsqueeze(1) / _EIGHT_BITS
        return eight_bits
    if weight.is_floating_point():
        unquantised: Tensor = weight.data
        return unquantised
    raise TypeError(
        f"{path}: its weight is of {type(weight).__name__}, without scales; move the layer to its device first"
    )


def _plain_parameter(name: str, parameter: Any) -> Tensor:
    """Return the parameter itself, or the dequantised numbers of a quantised one.

    Raises:
        TypeError: A form that is not known.
    """
    form = quantised_form(parameter)
    if form is None or type(parameter) in (Tensor, nn.Parameter):
        return parameter  # type: ignore[no-any-return,unused-ignore]
    if not callable(getattr(parameter, "dequantize", None)):
        raise TypeError(f"{name}: is {form}, which cannot be dequantised here; load the model as it was before that")
    return nn.Parameter(parameter.dequantize(), requires_grad=False)
