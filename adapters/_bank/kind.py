"""A kind of adapters: one config that has met a bank's model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from torchgraft.functional import Binding, Graft, StackedGraft
from torchgraft.functional.extending import Tree, check_tree

from .._config.base import AdapterConfig
from .fit import check_method, places_of
from .layout import Layout, Shapes, smallest


@dataclasses.dataclass(frozen=True, eq=False)
class Kind:
    """What all adapters of one config have in common.

    Attributes:
        config: The config, as it was given.
        graft: The graft of this config alone.
        constants: Its row of constants, by dtype.
        present: The paths of its sites.
    """

    config: AdapterConfig
    graft: Graft
    constants: Mapping[str, Tensor]
    present: frozenset[str]
    _index: list[Tensor] = dataclasses.field(default_factory=list, repr=False)

    @property
    def shapes(self) -> Shapes:
        """The shapes of an adapter's own leaves."""
        return self.graft.binding.shapes[""]

    def index(self, layout: Layout, device: torch.device) -> Tensor | None:
        """Return where an adapter's own numbers are in a row, `"own"`; `None` where it fills all of it."""
        if self.shapes == layout.shapes:
            return None
        if not self._index:
            here = layout.views(torch.arange(layout.size, device=device), self.shapes)
            self._index.append(torch.cat([leaf.flatten() for leaves in here.values() for leaf in leaves.values()]))
        return self._index[0]

    def check(self, params: Tree) -> None:
        """Refuse a tree that is none of this config.

        Raises:
            KeyError, TypeError, ValueError: A tree that does not fit.
        """
        check_tree(params, self.shapes)


class Kinds:
    """The kinds of a bank, each planned once.

    Args:
        graft: The stack whose places the slots are.
        most: How many are kept; others are planned again.

    Attributes:
        layouts: Where constants are in rows of theirs, by dtype.
        least: The smallest shapes of leaves in any kind so far.
    """

    def __init__(self, graft: StackedGraft, most: int = 256):
        self._graft, self._most = graft, most
        self._known: dict[str, Kind] = {}
        self.least: Shapes = {}
        bound = graft.places()
        shapes: dict[str, dict[str, dict[str, tuple[int, ...]]]] = {}
        for path, constants in bound.constants.items():
            for name, values in constants.items():
                shapes.setdefault(_name(values.dtype), {}).setdefault(path, {})[name] = tuple(values.shape[1:])
        self.layouts = {name: Layout.of(by_path, getattr(torch, name)) for name, by_path in shapes.items()}
        self.cuts = all(values.ndim == 1 for constants in bound.constants.values() for values in constants.values())
        """Whether leaves may be cut: no constant has the size of a rank."""

    def of(self, config: AdapterConfig) -> Kind:
        """Return what follows from a config.

        Raises:
            TypeError, ValueError: A config that the bank has no room for, or that differs in what its adapters share.
        """
        check_method(self._graft, config)
        key = _key(config)
        if key in self._known:
            self._known[key] = self._known.pop(key)
            return self._known[key]
        kind = self._plan(config)
        if key:
            self._known[key] = kind
            if len(self._known) > self._most:
                del self._known[next(iter(self._known))]
        return kind

    def _plan(self, config: AdapterConfig) -> Kind:
        places = places_of(self._graft, config)
        model, bound = self._graft.model, self._graft.bound
        graft = Graft(model, Binding.plan(model, {"": config}, False), allow_unreached=bound.allow_unreached)
        if bound.training is not None:
            graft = graft.in_mode(bound.training)
        rows = {}
        for name, layout in self.layouts.items():
            row = next(iter(places.present.values())).new_zeros(layout.size, dtype=getattr(torch, name))
            layout.write(row, {p: {n: places.constants[p][n][0] for n in ns} for p, ns in layout.shapes.items()})
            rows[name] = row
        present = frozenset(path for path, here in places.known.items() if here[0])
        kind = Kind(config, graft, rows, present)
        self.least = smallest([self.least, kind.shapes])
        return kind


def _key(config: AdapterConfig) -> str:
    """Return what tells configs apart; nothing for those with parts in memory only, which are planned each time."""
    if any(getattr(config, name) is not None for name in getattr(type(config), "in_memory", ())):
        return ""
    return json.dumps([type(config).__qualname__, config.to_dict()], sort_keys=True, default=repr)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
