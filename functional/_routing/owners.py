"""Owners: modules whose tensors adapters replace, run group by group where each row has tensors of its own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .._abilities import Leaves
from .._binding.replaced import over
from .._layers.routed import SelectedAdapter
from .._locating.finder import locate
from .._method import SiteAdapter
from .._rows import Groups, PerAdapter
from .._sites.kinds import describe
from .._sites.site import Site
from .._skeleton.context import CallContext
from .._skeleton.marking import mark, reduce_marked
from .._skeleton.parameters import AdaptedParameters
from .._skeleton.runtime import AdaptedModule
from .._skeleton.swaps import TensorSwap
from .._unsupported import UnsupportedCall
from .route import Routed


@dataclasses.dataclass(eq=False)
class RoutedOwner:
    """The facts that a module which owns replaced tensors has beyond its class.

    Attributes:
        path: Path of the user's module.
        context: CallContext of the skeleton.
        swaps: The leaves that replace its tensors.
        cls: Class of the module, adapted or not.
        site: Where its input has rows.
    """

    path: str
    context: CallContext
    swaps: Sequence[TensorSwap]
    cls: Any
    site: Site

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "cls": None}  # an adapted class has no name to be found by; the module knows it

    def routed(self) -> dict[str, Routed]:
        """Return the routed stacks that replace tensors of this module."""
        trees = self.context.trees or {}
        stacks = {name: tree for name, tree in trees.items() if isinstance(tree, Routed)}
        if not any(swap.adapter in stacks for swap in self.swaps):
            return {}
        mine = {swap.adapter for swap in self.swaps}
        return {name: tree for name, tree in stacks.items() if name in mine or self.path in tree.tree}

    def run(self, stacks: Mapping[str, Routed], forward: Any, adapters: Mapping[str, SiteAdapter], x: Any) -> Any:
        """Run the module's forward on each group of rows, under `vmap`, with the leaves and adapters of its own."""
        if any(tree.tokens > 1 for tree in stacks.values()):
            raise UnsupportedCall(
                f"{self.path}: an adapter replaces tensors of this {self.cls.__name__}, which cannot be done token by "
                "token; use one adapter for each row, or a config that replaces no tensors (modules_to_save, bias)"
            )
        size = max(tree.rows.size for tree in stacks.values())
        if not isinstance(x, Tensor) or any(size % tree.rows.size for tree in stacks.values()):
            raise ValueError(
                f"{self.path}: an adapter replaces tensors of this module, which is called with a {type(x).__name__} "
                f"and {sorted(tree.rows.size for tree in stacks.values())} rows in one call; routing it needs a tensor "
                "and one number of rows. Use torch.vmap over the stack, or one adapter at a time"
            )
        declared = next(iter(stacks.values())).declared
        layout = locate(self.site, x, size, declared, self.context.finder, self)
        rows = layout.to_rows(x, size)
        picked, groups = _pick(stacks, self.path, self.swaps, adapters, size)

        def run_group(parts: dict[str, Any], x: Tensor) -> Tensor:
            y = self._under(parts, functools.partial(forward, layout.from_rows(x, len(x))))
            if not isinstance(y, Tensor):
                raise TypeError(
                    f"{self.path}: an adapter replaces tensors of this module, whose forward returns a "
                    f"{type(y).__name__}; routing it needs a tensor. Use torch.vmap over the stack"
                )
            return layout.to_rows(y, len(x))

        y = torch.vmap(run_group, randomness="different")(picked, rows.unflatten(0, (groups[0].size, -1)))
        if all(group.base for group in groups):
            # A row without any adapter has the base's output bit for bit.
            active = functools.reduce(torch.logical_or, [group.active(y.ndim) for group in groups])
            alone = self._under(dict.fromkeys(stacks), functools.partial(forward, x))
            y = torch.where(active, y, layout.to_rows(alone, size).view(y.shape))
        return layout.from_rows(y.flatten(0, 1), size)

    def _under(self, parts: Mapping[str, Any], forward: Any) -> Any:
        """Run the forward with these parts in the place of the stacks; `None` switches one off."""
        context, before, kept = self.context, self.context.trees or {}, self.context.kept or {}
        tensors = {swap.key: kept[swap.key] for swap in self.swaps if swap.key in kept}
        for swap in self.swaps:
            if (part := parts.get(swap.adapter)) is not None:
                new = over(tensors[swap.key], part["replaced"][f"{swap.path}.{swap.leaf}"], swap.index)
                on = part["on"].get("replaced")
                tensors[swap.key] = new if on is None else torch.where(on, new, tensors[swap.key])
        held = [(container, name, container[name]) for swap in self.swaps for container, name in swap.places]
        trees = {name: _in_group(tree, parts[name]) if name in parts else tree for name, tree in before.items()}
        try:
            context.trees = {name: tree for name, tree in trees.items() if tree is not None}
            for swap in self.swaps:
                for container, name in swap.places if swap.key in tensors else ():
                    container[name] = tensors[swap.key]
            return forward()
        finally:
            context.trees = before
            for container, name, tensor in held:
                container[name] = tensor


def _in_group(tree: Routed, part: Any) -> GroupAdapter | Routed | None:
    """Return what a group of rows has in the place of a stack; `None` where it is switched off."""
    if part is None:
        return None
    return GroupAdapter(part) if part["leaves"] else tree.single(part["adapter"])  # the module itself is no site


@dataclasses.dataclass(frozen=True, eq=False)
class GroupAdapter:
    """One group's part of a stack, given to a module in place of a tree."""

    part: Any
    per_row: ClassVar[bool] = False

    def layer(self, below: Any, adapter: SiteAdapter, finder: Any) -> SelectedAdapter:
        """Return the layer that the module gets."""
        part = self.part
        return SelectedAdapter(
            below, adapter.with_constants(part["constants"]), part["leaves"], part["on"].get("leaves")
        )


def _pick(
    stacks: Mapping[str, Routed],
    path: str,
    swaps: Sequence[TensorSwap],
    adapters: Mapping[str, SiteAdapter],
    size: int,
) -> tuple[dict[str, Any], list[Groups]]:
    """Return what each group of rows has of each stack here, and the groups."""
    alone = len(stacks) == 1
    parts: dict[str, Any] = {}
    all_groups: list[Groups] = []
    for name, tree in stacks.items():
        mine = [swap for swap in swaps if swap.adapter == name]
        rows = tree.rows.expanded(size)
        constants: dict[str, Any] = {}
        adapter = adapters.get(name)
        site_rows = rows
        if adapter is not None:
            adapter, site_rows = tree.along(adapter, rows)
            constants = {key: c for key, c in adapter.site.constants.items() if isinstance(c, PerAdapter)}
        together = alone and site_rows is rows
        groups, of_method = (
            (rows.groups() if together else rows.each()),
            (site_rows.groups() if together else site_rows.each()),
        )
        replaced = {f"{swap.path}.{swap.leaf}": groups.pick(tree.tree[swap.path][swap.leaf]) for swap in mine}
        at_site: Leaves = {}
        if adapter is not None:
            at_site = adapter.leaves(tree.tree)
            adapter.check(at_site, rows.count)
        on = {"replaced": groups.active(1)} if groups.base else {}
        if of_method.base:
            on["leaves"] = of_method.active(1)
        parts[name] = {
            "replaced": replaced,
            "leaves": {leaf: of_method.pick(tensor) for leaf, tensor in at_site.items()},
            "constants": {key: of_method.pick(c.values) for key, c in constants.items()},
            "on": on,
            "adapter": torch.arange(groups.size).unsqueeze(1) if groups.index is None else groups.index.unsqueeze(1),
        }
        all_groups.append(groups)
    return parts, all_groups


class OwnerModule:
    """A base class placed in front of the class of a module that owns replaced tensors."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, AdaptedParameters):
            return self.in_groups(self._forward, args, kwargs)
        return self._forward(*args, **kwargs)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        owner: RoutedOwner = self.__dict__["_owner"]
        inherited = super().forward  # type: ignore[misc]
        x = args[0] if args else next(iter(kwargs.values()), None)
        if owner.context.reached is not None:
            owner.context.reached.add(owner.path)
        stacks = owner.routed()
        if owner.context.see is not None and (stacks or not isinstance(self, AdaptedModule)) and isinstance(x, Tensor):
            owner.context.see(owner.path, x)
        if not stacks:
            return inherited(*args, **kwargs)
        count = sum(isinstance(arg, Tensor) for arg in (*args, *kwargs.values()))
        if count > 1 or (isinstance(self, _NormBase) and self.training):
            why = "normalises over the batch" if isinstance(self, _NormBase) else f"takes {count} tensors"
            raise ValueError(
                f"{owner.path}: an adapter replaces tensors of this {owner.cls.__name__}, which {why}, so its rows "
                "cannot be run in groups; use torch.vmap over the stack, or one adapter at a time"
            )
        adapters = self.__dict__["_runtime"].entries if isinstance(self, AdaptedModule) else {}
        if args:
            return owner.run(stacks, lambda x: inherited(x, *args[1:], **kwargs), adapters, x)
        name = next(iter(kwargs))
        return owner.run(stacks, lambda x: inherited(**{**kwargs, name: x}), adapters, x)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduce_marked(self, "_owner", super().__reduce_ex__(protocol), _mark)


def _mark(module: Any, owner: RoutedOwner) -> None:
    mark(module, "_owner", owner, owner_class)


@functools.lru_cache(maxsize=256)
def owner_class(cls: Any) -> Any:
    """Return `cls` with the forward of `OwnerModule` in front."""
    return type(cls.__name__, (OwnerModule, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def mark_owners(
    context: CallContext, copies: Sequence[tuple[nn.Module, Any]], swaps: Sequence[TensorSwap], paths: Mapping[int, str]
) -> None:
    """Turn the modules of a skeleton that own replaced tensors into `OwnerModule`s.

    Args:
        context: The skeleton's.
        copies: The model's modules, each with its copy in the skeleton.
        swaps: Where replaced tensors hang.
        paths: Names of the model's modules by identity.
    """
    for original, copied in copies:
        registry = id(copied._parameters) if isinstance(copied, nn.Module) else None
        mine = [
            dataclasses.replace(swap, places=[place for place in swap.places if id(place[0]) == registry])
            for swap in swaps
            if any(id(place[0]) == registry for place in swap.places)
        ]
        if mine:
            path = paths[id(original)]
            site = describe(path, original) or Site(path, "linear", 0, 0)
            _mark(copied, RoutedOwner(path, context, mine, type(copied), site))
