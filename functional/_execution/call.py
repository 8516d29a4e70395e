"""What one call of a bound model is asked: the active trees, tensors of the base, arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor


class Call(NamedTuple):
    """One call of a bound model.

    Attributes:
        active: The active trees, or `ActiveTree`s in their place, by adapter name.
        base: Tensors that replace the base's in this call, by their names in the user's model.
        args: Positional arguments of the model's forward.
        kwargs: Its arguments by name.
        return_buffers: Whether what the forward left in the model's buffers is asked for too.
    """

    active: Mapping[str, Any]
    base: Mapping[str, Tensor]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    return_buffers: bool = False
