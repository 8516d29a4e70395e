"""What the root of a model with injected adapters is asked for and cannot give: said, instead of left undone."""

from __future__ import annotations

import inspect
import sys
import warnings
from typing import Any

from torch import nn

_CALLERS = 8
"""How many frames above a state dict its `save_pretrained` may be."""


def attach(model: nn.Module) -> None:
    """Have a model refuse `adapter_names=`, and warn when it is saved under names that nothing loads.

    Hooks, so that the model's class and methods stay; each only where it can have something to say.
    """
    if _swallows(model) and not _has(model._forward_pre_hooks, _refuse_names):
        model.register_forward_pre_hook(_refuse_names, with_kwargs=True)
    if hasattr(model, "save_pretrained") and not _has(model._state_dict_pre_hooks, _warn_of_saving):
        model.register_state_dict_pre_hook(_warn_of_saving)


def detach(model: nn.Module) -> None:
    """Take these hooks off again."""
    for key in [key for key, hook in model._forward_pre_hooks.items() if hook is _refuse_names]:
        del model._forward_pre_hooks[key]
        model._forward_pre_hooks_with_kwargs.pop(key, None)
    for key in [key for key, hook in model._state_dict_pre_hooks.items() if hook is _warn_of_saving]:
        del model._state_dict_pre_hooks[key]


def _has(hooks: Any, hook: Any) -> bool:
    return any(one is hook for one in hooks.values())


def _swallows(model: nn.Module) -> bool:
    """Return whether a model's forward takes arguments that it does not know."""
    try:
        parameters = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):
        return False
    return "adapter_names" not in parameters and any(one.kind is one.VAR_KEYWORD for one in parameters.values())


def _refuse_names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if kwargs.get("adapter_names") is not None:
        raise ValueError(
            f"forward() of this {type(model).__name__} got adapter_names={kwargs['adapter_names']!r:.100}, which it "
            "takes without a use for it: injected adapters are one for the whole batch. Call "
            "adapter_rows(model, adapter_names)(...) for one of each row's own, or set_adapter(model, name)"
        )


def _warn_of_saving(model: nn.Module, prefix: str, keep_vars: bool) -> None:
    frame: Any = sys._getframe(1)
    for _ in range(_CALLERS):
        if frame is None:
            return
        if frame.f_code.co_name == "save_pretrained" and any(one is model for one in frame.f_locals.values()):
            break
        frame = frame.f_back
    else:
        return
    warnings.warn(
        f"save_pretrained of a {type(model).__name__} with injected adapters writes adapted layers under names such as "
        "'<layer>.base_layer.weight', which from_pretrained does not know: it starts these layers afresh. Save the "
        "adapter with save_adapter(model, path), or call merge_and_unload(model) first",
        UserWarning,
        stacklevel=2,
    )
