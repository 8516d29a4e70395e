"""What all configs share: frozen fields named as in PEFT, and the modules they target."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from torch import nn

from torchgraft.functional import Method

from .targets import find_targets

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Fields that every method has.

    Attributes:
        target_modules: Modules to adapt: names (a whole name, or its end after a dot), a regular expression for the
            whole name, or `"all-linear"`.
        exclude_modules: Modules to leave out, in the same notation.
        layers_to_transform: Indices of the layers to adapt; `None` or `[]` for all. Whole names ignore it.
        layers_pattern: Names of the module list that holds the layers, where it is not the first numbered one.
    """

    method: ClassVar[Method]
    site_fields: ClassVar[frozenset[str]] = frozenset(
        {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
    )
    """Fields that only choose modules, so that the adapters of a stack may differ in them."""

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def targets(self, model: nn.Module) -> list[str]:
        """Names of the modules of `model` to adapt, in the order of `named_modules`."""
        return find_targets(self, model)


def by_pattern(patterns: Mapping[str, T], path: str, default: T) -> T:
    """The value of the first pattern that matches the end of a path, as PEFT's `rank_pattern` has it.

    >>> by_pattern({"q_proj": 4, "^head": 2}, "layers.0.q_proj", 8)
    4
    >>> by_pattern({"q_proj": 4, "^head": 2}, "lm.head", 8)
    8
    """
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def require(condition: bool, config: Any, message: str) -> None:
    """Raise a `ValueError` that starts with the config's name, unless the condition holds."""
    if not condition:
        raise ValueError(f"{type(config).__name__}: {message}")
