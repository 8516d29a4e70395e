"""Calls of a PEFT-style model whose rows have adapters, tasks or activated tokens of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.functional import UnsupportedCall

from .. import _inplace as inplace
from .._inplace.walk import layers
from .._methods.lora.activated import activated_positions


def by_rows(
    model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], generates: bool = False
) -> inplace.AdapterRows | None:
    """Return what is called in the place of a model; `None` where it is the model with its active adapters.

    Takes `adapter_names`, `task_ids` and `alora_offsets` out of the arguments. Tokens that an activated LoRA adapts are
    found in `input_ids`, as in PEFT.

    Args:
        model: A model with injected adapters.
        args: Arguments of the call; the first may be `input_ids`.
        kwargs: Arguments by name.
        generates: Whether it is a call of `generate`.

    Raises:
        UnsupportedCall: Several active adapters, of which one is asked for; tokens that cannot be found.
    """
    names, tasks, offsets = (kwargs.pop(name, None) for name in ("adapter_names", "task_ids", "alora_offsets"))
    active, off = inplace.active_adapters(model), all(layer.disable_adapters for layer in layers(model).values())
    tokens = {} if off else _invocations(model, active if names is None else names)
    if names is None and tasks is None and not tokens:
        return None
    ids = _ids(args, kwargs, generates, offsets) if tokens else None
    if names is None:
        if len(active) != 1:
            what = "task_ids" if ids is None else "alora_invocation_tokens"
            raise UnsupportedCall(
                f"{what}: the active adapters are {active}, expected one; call set_adapter(name), or give adapter_names"
            )
        names = active * len(tasks if ids is None else ids)
    positions = None if ids is None else _positions(ids, names, tokens, offsets)
    return inplace.adapter_rows(model, names, task_ids=tasks, positions=positions)


def _invocations(model: Any, names: Sequence[str]) -> dict[str, list[int]]:
    """Return the tokens of those adapters that are activated LoRAs, by name."""
    configs = ((name, model.peft_config.get(name)) for name in dict.fromkeys(names))
    found = ((name, getattr(config, "alora_invocation_tokens", None)) for name, config in configs)
    return {name: tokens for name, tokens in found if tokens is not None}


def _ids(args: Sequence[Any], kwargs: Mapping[str, Any], generates: bool, offsets: Any) -> Tensor:
    """Return the ids in which the invocation is looked for."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    problem = None
    if generates and ids is None:
        ids = kwargs.get("inputs")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        problem = "the call has no input_ids, (batch, tokens)"
    elif inplace.cached_tokens(args, kwargs) and offsets is None:
        problem = "with a cache of keys and values the ids are not those of the whole prompt"
    if problem is not None:
        raise UnsupportedCall(
            f"alora_invocation_tokens: {problem}, in which to look for the invocation; say which tokens are adapted: "
            "adapter_rows(model, names, positions=rows)(...), with rows of activated_positions(ids, tokens), in a step "
            "with a cache rows[:, -1:]"
        )
    assert isinstance(ids, Tensor)
    return ids


def _positions(ids: Tensor, names: Sequence[str], tokens: Mapping[str, list[int]], offsets: Any) -> Tensor:
    """Return 0 for tokens that their row's adapter adapts, -1 for others; offsets count tokens from the end."""
    positions = torch.zeros_like(ids)
    for row, name in enumerate(names):
        if name not in tokens:
            continue
        if offsets is None:
            positions[row] = activated_positions(ids[row : row + 1], tokens[name])[0]
        else:
            positions[row, : max(0, ids.shape[1] - (offsets[row] or 0))] = -1
    return positions
