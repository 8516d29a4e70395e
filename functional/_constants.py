"""Constants of a method: what binding fixes for each site, as a dataclass."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Self, TypeVar

import optree
import torch.utils._pytree as pytree

T = TypeVar("T")

_VARIES = "varies along a stack"

_REGISTERED: set[type] = set()

Varying = Annotated[T, _VARIES]
"""`Varying[float]` marks a constant that may differ between the adapters of a stack, and is a tensor there."""


@dataclasses.dataclass(frozen=True, eq=False)
class Constants:
    """Base class of a method's constants; a method without any uses this one.

    A subclass is a frozen dataclass. What is `None` at a site is not there.

    >>> @dataclasses.dataclass(frozen=True, eq=False)
    ... class Scaled(Constants):
    ...     r: int
    ...     scaling: Varying[float]
    >>> Scaled.varying(), dict(Scaled(4, 2.0).items())
    (frozenset({'scaling'}), {'r': 4, 'scaling': 2.0})
    """

    @classmethod
    @functools.cache
    def varying(cls) -> frozenset[str]:
        """Return the names of the constants that may differ along a stack."""
        hints = typing.get_type_hints(cls, include_extras=True)
        return frozenset(name for name, hint in hints.items() if _VARIES in getattr(hint, "__metadata__", ()))

    @classmethod
    @functools.cache
    def names(cls) -> tuple[str, ...]:
        """Return the names of all constants."""
        return tuple(field.name for field in dataclasses.fields(cls))

    def items(self) -> Iterator[tuple[str, Any]]:
        """Yield name and value of each constant that is not `None`."""
        for name, value in vars(self).items():
            if value is not None:
                yield name, value

    def replace(self, values: Mapping[str, Any]) -> Self:
        """Return the constants with some replaced.

        Raises:
            TypeError: A name that does not exist.
        """
        return dataclasses.replace(self, **values) if values else self


def register(cls: type[Constants]) -> None:
    """Register a class of constants as a pytree with torch and optree, once.

    >>> @dataclasses.dataclass(frozen=True, eq=False)
    ... class Halved(Constants):
    ...     scaling: Varying[float]
    >>> register(Halved)
    >>> optree.tree_map(lambda x: x / 2, Halved(3.0), namespace="torchgraft").scaling
    1.5
    """
    if cls not in _REGISTERED:
        _REGISTERED.add(cls)
        names = cls.names()

        def flatten(constants: Constants) -> tuple[list[Any], None]:
            return [getattr(constants, name) for name in names], None

        def unflatten(values: Iterable[Any], _: Any) -> Constants:
            return cls(*values)

        pytree.register_pytree_node(cls, flatten, unflatten)
        optree.register_pytree_node(cls, flatten, lambda _, values: cls(*values), namespace="torchgraft")
