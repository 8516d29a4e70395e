"""Noticing that a model's parameters lie elsewhere than when a view that shares them was made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .._tensors.placement import offloading
from .._versions import DictContents
from .pool import has_storage


class SharedTensors:
    """A forward pre-hook of a view's root: an error if a parameter of the user's model was replaced or moved.

    A view refers to the memory of these parameters. After `parameter.data = other`, `model.to(...)` or
    `load_state_dict(assign=True)` it would go on with what was there before.

    Args:
        modules: The user's modules.
        given: Ids of tensors of theirs that the view has others for.

    >>> model = nn.Linear(2, 2)
    >>> check = SharedTensors([model], ())
    >>> check(None, ())
    >>> model.weight.data = torch.zeros(2, 2)
    >>> try:
    ...     check(None, ())
    ... except RuntimeError as error:
    ...     print(str(error)[:46])
    a parameter of the model was replaced or moved
    """

    def __init__(self, modules: Iterable[nn.Module], given: Iterable[int]):
        known = set(given)
        registries: list[dict[str, Any]] = [
            module._parameters
            for module in modules
            if type(module._parameters) is dict and next(offloading(module), None) is None  # hooks replace those
        ]
        held = {id(t): t for registry in registries for t in registry.values() if t is not None and has_storage(t)}
        self._tensors = sorted([tensor for key, tensor in held.items() if key not in known], key=id)
        self._contents = DictContents(registries)
        self._pointers = list(map(Tensor.data_ptr, self._tensors))

    def __call__(self, module: Any, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        if not self._contents.same() or list(map(Tensor.data_ptr, self._tensors)) != self._pointers:
            raise RuntimeError(
                "a parameter of the model was replaced or moved after this view of it was made (parameter.data = ..., "
                "model.to(...), load_state_dict(..., assign=True)), and the view has what was there before; take a new "
                "view"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return _Owned, ()  # a copy of a view has tensors of its own


class _Owned:
    """The hook of a copied view, which shares nothing."""

    def __call__(self, module: Any, args: Any) -> None:
        return None
