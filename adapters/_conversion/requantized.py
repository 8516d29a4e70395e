"""Adapters merged into a quantised model: merged in floating point, and quantised again, with the error of that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.functional import Graft, dequantized, merge
from torchgraft.functional.extending import Tree, describe, is_quantised, modules_of

from .report import ConversionReport, ModuleError


def requantized(graft: Graft, params: Tree, quantize: Callable[[nn.Module], Any]) -> tuple[nn.Module, ConversionReport]:
    """Return a quantised model with adapters merged in, and the error that quantising makes of each layer's weight.

    The quantised base is dequantised, the adapters are merged into it (`merge(..., dequantize=True)`), and the library
    that quantised it does so again. Small changes may be lost in the steps of few bits: the report tells, and `to_lora`
    with a quantised base beside it loses nothing.

    Args:
        graft: A graft of a quantised model.
        params: Its parameter tree.
        quantize: A function that quantises a model in place, or returns a quantised one: `lambda model:
            quantize_(model, Int8WeightOnlyConfig())` of torchao, or torch's `quantize_dynamic`.

    Returns:
        `(model, report)`: tensors that neither adapters nor `quantize` change are shared with the graft's model, which
        stays as it is. In the report `norm` is that of the merged weight, `error` that of what quantising changes.

    Raises:
        KeyError, TypeError, ValueError: As for `merge`; a function that leaves no layer quantised.

    >>> from torchgraft.adapters import LoraConfig
    >>> from torchgraft.functional import bind
    >>> graft = bind(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
    >>> requantized(graft, graft.init(), lambda model: model)
    Traceback (most recent call last):
    ValueError: requantized: quantize left no layer quantised; it has to change the model or return another
    """
    state = merge(graft, params, dequantize=True)
    model = dequantized(graft.model)
    model.load_state_dict(state, assign=True)  # what it shares with the graft's model is never written to
    merged = _weights(model)
    result = quantize(model)
    result = model if result is None else result
    if not isinstance(result, nn.Module):
        raise TypeError(f"requantized: quantize returned {type(result).__name__}, expected a model, or None")
    quantised = [path for path, module in modules_of(result).items() if is_quantised(module) and path in merged]
    if not quantised:
        raise ValueError("requantized: quantize left no layer quantised; it has to change the model or return another")
    after = _weights(dequantized(result))
    return result, ConversionReport({path: _error(merged[path], after[path]) for path in quantised})


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a model's layers, by path."""
    found = {}
    for path, module in modules_of(model).items():
        site = describe(path, module)
        if site is not None and len(site.weight_names) == 1:
            found[path] = getattr(module, site.weight_names[0]).detach()
    return found


def _error(merged: Tensor, after: Tensor) -> ModuleError:
    norm = float(torch.linalg.vector_norm(merged.double()))
    return ModuleError(0, norm, float(torch.linalg.vector_norm(after.double() - merged.double())))
