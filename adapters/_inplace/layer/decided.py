"""The call of a layer, decided when something changed: one step with what it takes, and a look whether that holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch.nn.modules.module as torch_module
from torch import Tensor

from torchgraft.functional.extending import Leaves, Step, count_writes

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(getattr(torch_module, f"_global{kind}") for kind in _HOOKS)
"""What torch's `_has_any_global_hook` looks at."""


class Decided:
    """One step, with the modules that it replaces.

    It holds as long as no module among them gets other attributes, parameters, hooks or another class: until then each
    call would be decided in the same way.

    Args:
        step: The step.
        base: The wrapped module.
        holders: Modules that hold leaves, and those of dropout.
        leaves: Reads the leaves, once what they hang in is watched.
        registries: Other dicts that the decision depends on.
    """

    __slots__ = ("_classes", "_dicts", "_hooks", "_modules", "_taken", "_writes")

    def __init__(
        self,
        step: Step,
        base: Any,
        holders: Iterable[Any],
        leaves: Callable[[], Leaves],
        registries: Iterable[dict[str, Any]],
    ):
        self._modules = [base, *holders]
        own = [vars(module) for module in self._modules]
        held = [attributes["_parameters"] for attributes in own]
        self._hooks = (*(attributes[name] for attributes in own for name in _HOOKS), *_GLOBAL_HOOKS)
        self._dicts = (*own, *(one for one in held if one), *registries)
        self._writes, self._classes = count_writes(self._dicts), list(map(type, self._modules))
        self._taken = step, held[0]["weight"], held[0]["bias"], leaves(), base.training

    def run(self, x: Tensor) -> Tensor | None:
        """Return the output; `None` where something has changed, or where the step cannot give it."""
        if (
            any(self._hooks)
            or count_writes(self._dicts) != self._writes
            or list(map(type, self._modules)) != self._classes
        ):
            return None
        step, weight, bias, leaves, training = self._taken
        return step(x, weight, bias, leaves, training)
