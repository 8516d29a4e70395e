"""What the adapters of a stack share, and how what differs is padded to one size."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._method import Config
from .._rows import PerAdapter
from .._sites.parameters import Key, key_of
from .._sites.site import Site
from .._tensors.wrappers import modules_of
from .binding import Binding, Shapes
from .padding import pad_to, whole_by


class SharedFieldError(ValueError):
    """A field of a config differs between adapters of a stack, which share it.

    Attributes:
        field: Its name.
        given: Its value in one config.
        shared: Its value in the others.
    """

    def __init__(self, message: str, field: str, given: Any, shared: Any):
        super().__init__(message)
        self.field, self.given, self.shared = field, given, shared


class NoRoomError(ValueError):
    """A leaf does not fit a stack.

    Attributes:
        path: The site that it is of.
        leaf: Its name.
        shape: Its shape.
        room: The shape that there is room for; empty where there is none.
        pieces: Why it has to fill its room, empty where it has not to.
    """

    def __init__(self, message: str, path: str, leaf: str, shape: tuple[int, ...], room: tuple[int, ...], pieces: str):
        super().__init__(message)
        self.path, self.leaf, self.shape, self.room, self.pieces = path, leaf, shape, room, pieces


def check_configs(configs: Sequence[Config]) -> None:
    """Check that the configs of a stack agree in all that its adapters share.

    Raises:
        TypeError: Configs of several methods.
        ValueError: A field that differs and that the method cannot have differ.
    """
    first = configs[0]
    for i, config in enumerate(configs[1:], start=1):
        if config.method is not first.method:
            raise TypeError(
                f"bind: configs[{i}] is a {type(config).__name__} and configs[0] a {type(first).__name__}; a stack has "
                "one method. Bind several methods by name: bind(model, {'first': ..., 'second': ...})"
            )
        free = first.method.varying | first.site_fields
        for field in dataclasses.fields(config):  # type: ignore[arg-type]
            name = field.name
            if name not in free and getattr(config, name) != getattr(first, name):
                given, shared = getattr(config, name), getattr(first, name)
                message = (
                    f"bind: configs[{i}].{name} is {given!r} and configs[0].{name} is {shared!r}; the adapters of a "
                    f"{first.method.name} stack share it. Bind them apart"
                )
                raise SharedFieldError(message, name, given, shared)


def check_leaves(singles: Sequence[Binding]) -> None:
    """Refuse configs that train different leaves of one site."""
    names_at: dict[str, tuple[Any, ...]] = {}
    for single in singles:
        for path, site in single.sites[""].items():
            names = (*sorted(single.configs[""].method.shapes(single.configs[""], site)), *sorted(site.shared.items()))
            if names_at.setdefault(path, names) != names:
                raise ValueError(
                    f"{path}: the configs train different leaves: {list(names_at[path])} and {list(names)}; bind them "
                    "apart"
                )


def union(config: Config, plans: Sequence[Mapping[str, Site]], model: nn.Module) -> dict[str, Site]:
    """Return every site that some adapter has, with the constants of all."""
    modules = modules_of(model)
    paths = {path: None for plan in plans for path in plan}
    names: dict[Key, str] = {}
    for path in paths:
        other = names.setdefault(key_of(modules, path), path)
        if other != path:
            raise ValueError(f"bind: {other} and {path} are one module under two names; target it by one of them")
    return {path: _merged(path, config, [plan.get(path) for plan in plans]) for path in paths}


def _merged(path: str, config: Config, sites: Sequence[Site | None]) -> Site:
    """Return a site with the constants of all that have it; a tensor that one of them lacks is zero there."""
    having = [site for site in sites if site is not None]
    first = having[0]
    constants: dict[str, Any] = {}
    for name in config.method.constants.names():
        values = [None if site is None else getattr(site.constants, name) for site in sites]
        if all(value is None for value in values):
            continue
        value = next(value for value in values if value is not None)
        if all(_same(value, getattr(site.constants, name)) for site in having):
            continue
        elif name in config.method.constants.varying():
            constants[name] = PerAdapter(_padded_stack(values))
        else:
            raise ValueError(
                f"{path}: the configs differ in {name!r}, which the adapters of a {config.method.name} stack share; "
                "bind them apart"
            )
    return dataclasses.replace(first, constants=first.constants.replace(constants))


def constants_in_places(path: str, site: Site, sites: Sequence[Site | None], device: torch.device) -> dict[str, Tensor]:
    """Return the constants that may vary, one for each place, padded to what was bound."""
    constants: dict[str, Tensor] = {}
    for name in site.constants.names():
        bound = getattr(site.constants, name)
        values = [None if placed is None else getattr(placed.constants, name) for placed in sites]
        if bound is None and all(value is None for value in values):
            continue
        if bound is None or name not in site.constants.varying():
            if any(value is not None and not _same(value, bound) for value in values):
                raise ValueError(
                    f"{path}: a config differs in {name!r} from those that the graft was bound with, which the "
                    "adapters of the stack share; bind them apart"
                )
            continue
        first = bound.values[0] if isinstance(bound, PerAdapter) else bound
        like = first if isinstance(first, Tensor) else torch.tensor(first, dtype=torch.float64)
        shape = tuple(like.shape)
        parts = [
            like.new_zeros(shape)
            if value is None
            else pad_to(torch.as_tensor(value, dtype=like.dtype, device=like.device), shape)
            for value in values
        ]
        constants[name] = torch.stack(parts).to(device)
    return constants


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b or (a is not None and b is not None and a.shape == b.shape and torch.equal(a, b))
    return bool(a == b)


def _padded_stack(values: Sequence[Any]) -> Tensor:
    tensors = [
        None if v is None else v if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64) for v in values
    ]
    present = [t for t in tensors if t is not None]
    shape = tuple(map(max, zip(*(t.shape for t in present), strict=True)))
    return torch.stack([present[0].new_zeros(shape) if t is None else pad_to(t, shape) for t in tensors])


def largest(
    path: str, config: Config, site: Site | None, member_shapes: Sequence[Shapes]
) -> dict[str, tuple[int, ...]]:
    """Return the room that each leaf of a path needs for the adapters of a stack.

    Raises:
        ValueError: Leaves of several shapes that cannot be padded.
    """
    having = [shapes[path] for shapes in member_shapes if path in shapes]
    largest, whole = {}, whole_by(config, site)
    for name in {name: None for shapes in having for name in shapes}:
        sizes = [shapes[name] for shapes in having if name in shapes]
        largest[name] = tuple(map(max, zip(*sizes, strict=True)))
        if whole is not None and len(set(sizes)) > 1:
            raise ValueError(
                f"{path}: {whole}, which padding would shift, and {name} has shapes {sorted(set(sizes))}; give "
                "it one rank in all configs"
            )
    return largest
