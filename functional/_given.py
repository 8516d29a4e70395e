"""What users give: held against what is expected, with words for what is given by mistake."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from ._graft import Graft
from ._messages import advice_on, given_type
from ._skeleton.parameters import AdaptedParameters
from ._skeleton.runtime import AdaptedModule


def check_graft(graft: Any, what: str, instead: str = "") -> None:
    """Refuse what is no graft.

    Args:
        graft: What was given.
        what: The function that it was given to.
        instead: What to call for a model.

    Raises:
        TypeError: Something else than a graft.
    """
    if isinstance(graft, Graft):
        return
    hint = ""
    if isinstance(graft, nn.Module):
        hint = f": graft = bind(model, config){instead}"
    elif isinstance(graft, Mapping):
        hint = f", which comes first: {what}(graft, params, ...)"
    raise TypeError(f"{what}: graft is {given_type(graft)}, expected what bind returned{hint}")


def check_module(model: Any, what: str = "", other: Any = None) -> None:
    """Refuse what is no module.

    Args:
        model: What was given.
        what: The beginning of the message.
        other: Another argument, which may be the module.

    Raises:
        TypeError: Something else than a module.
    """
    if isinstance(model, nn.Module):
        return
    hint = ""
    if isinstance(other, nn.Module):
        hint = "; are the arguments swapped? The other one is a module"
    elif isinstance(model, Graft):
        hint = (
            "; a graft has no adapters in place and leaves its model, graft.model, as it is: give that one, or use the "
            "functions of grafts (graft(params, x), merge(graft, params), graft.view(params))"
        )
    elif isinstance(model, type):
        hint = "; give a module, not its class"
    elif isinstance(model, (str, os.PathLike)):
        hint = "; nothing is loaded by name or path here, load the model first"
    raise TypeError(f"{what}model is {given_type(model)}, expected a torch.nn.Module{hint}")


def check_no_view(model: nn.Module, what: str, instead: str) -> None:
    """Refuse a view of a graft.

    Args:
        model: A module.
        what: The function that it was given to.
        instead: What to do.

    Raises:
        TypeError: It is one; names the first adapted module.
    """
    for path, module in model.named_modules():
        if isinstance(module, (AdaptedModule, AdaptedParameters)):
            raise TypeError(
                f"{what}: {path or 'the model'} is already adapted: this is a view of another graft. {instead}"
            )


def check_config(config: Any, what: str, fits: bool, within: Any = None) -> None:
    """Refuse what is no config.

    Args:
        config: What was given.
        what: The argument that it was given for.
        fits: Whether it is one.
        within: The dict or the list that has it.

    Raises:
        TypeError: Something else than a config.
    """
    if fits:
        return
    if advice := advice_on(config):
        raise TypeError(f"{what} is {given_type(config)}, and {advice}")
    name = config.__name__ if isinstance(config, type) and hasattr(config, "method") else "LoraConfig"
    hint = f"expected a config object such as {name}(target_modules=[...])"
    if isinstance(within, Mapping):
        hint += "; a dict maps names of adapters to configs"
    fields = config if isinstance(config, Mapping) else within
    if isinstance(fields, Mapping) and fields and all(map(_is_field, fields, fields.values())):
        words = ", ".join(f"{key}={value!r:.30}" for key, value in fields.items())
        hint += f"; fields of one config are given as {name}({words})"
    raise TypeError(f"{what} is {_shown(config)}, {hint}")


def _is_field(name: Any, value: Any) -> bool:
    return isinstance(name, str) and name.isidentifier() and not hasattr(value, "method")


def _shown(value: Any) -> str:
    return f"{value!r:.60}" if isinstance(value, (str, int, float, list, tuple, set)) else given_type(value)
