"""Stacks of adapters that differ in rank, scaling or sites: one graft over several configs of one method."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import trees
from .finder import Finder
from .follow import Follower
from .graft import Graft
from .leaves import initialise, shapes_of
from .method import Config, Entry, Tree
from .parameters import Key, key_of
from .plan import for_model, plan_sites, structure_for
from .replaced import plan_replaced
from .routed import Chosen, with_constants
from .rows import PerAdapter, Rows, is_readable
from .site import Site
from .wrappers import modules_of

Shapes = dict[str, dict[str, tuple[int, ...]]]


class StackedGraft(Graft):
    """A model and a stack of adapters of one method, each with a config of its own; made by `bind(model, [...])`.

    Leaves of the stack have the largest size that any adapter has at their site, padded with zeros; padded numbers
    get no gradient, so that momentum and weight decay leave them zero, and a step on the stack is a step of each
    adapter. An adapter that has no module at a site leaves the base alone there.

    Attributes:
        members: The configs, in the order of the stack.
    """

    def __init__(self, model: nn.Module, members: Sequence[Config], allow_unreached: bool):
        model = structure_for(members, model)
        self.members = [for_model(config, model) for config in members]
        check_configs(self.members)
        modules = modules_of(model)
        self._plans = [plan_sites(config, modules, config.targets(model)) for config in self.members]
        _check_leaves(self.members, self._plans)
        each_replaces = [
            plan_replaced(config, modules, model, plan) for config, plan in zip(members, self._plans, strict=True)
        ]
        for i, other in enumerate(each_replaces[1:], start=1):
            if differing := set(other) ^ set(each_replaces[0]):
                raise ValueError(
                    f"bind: only one of configs[0] and configs[{i}] replaces tensors of {min(differing)!r}, which the "
                    "adapters of a stack do together; bind them apart"
                )
        self._own = [
            shapes_of(config, plan, each_replaces[0]) for config, plan in zip(self.members, self._plans, strict=True)
        ]
        sites = _union(self.members[0], self._plans, model)
        super().__init__(model, {"": self.members[0]}, False, allow_unreached, {"": sites})

    def init(
        self,
        generator: Any = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tree:
        """Make a fresh stack.

        Args:
            generator: One source of randomness for all adapters in turn, or a sequence with one for each.
            dtype: Dtype of the leaves, as for a graft of one config.
            device: Device of the leaves.

        Returns:
            A stacked tree, leaves `"N ..."`.

        >>> from torchgraft.adapters import LoraConfig
        >>> from torchgraft.functional import bind
        >>> graft = bind(torch.nn.Linear(4, 3), [LoraConfig(r=r, target_modules="all-linear") for r in (1, 2)])
        >>> {leaf: tuple(t.shape) for leaf, t in graft.init()[""].items()}
        {'lora_A': (2, 2, 4), 'lora_B': (2, 3, 2)}
        """
        count = len(self.members)
        generators = list(generator) if isinstance(generator, Sequence) else [generator] * count
        if len(generators) != count:
            raise ValueError(
                f"init: got {len(generators)} generators, expected one for each of the {count} adapters, or one for all"
            )
        return self.stack(
            [
                initialise(self.model, config, plan, own, dtype, device, self.replaced[""])
                for config, plan, own in zip(self.members, self._plans, generators, strict=True)
            ]
        )

    def stack(self, adapters: Sequence[Tree]) -> Tree:
        """Stack one tree of each config, in order, padded with zeros; differentiable.

        Args:
            adapters: Trees as the grafts of the single configs have them.

        Raises:
            KeyError, TypeError, ValueError: A tree that its config does not fit, or not one for each config.

        >>> from torchgraft.adapters import LoraConfig
        >>> from torchgraft.functional import bind
        >>> graft = bind(torch.nn.Linear(4, 3), [LoraConfig(r=r, target_modules="all-linear") for r in (1, 2)])
        >>> many = graft.stack([graft.member(i).init() for i in range(2)])
        >>> [t[""]["lora_A"].shape[0] for t in graft.unstack(many)]
        [1, 2]
        """
        adapters = list(adapters)
        if len(adapters) != len(self.members):
            raise ValueError(
                f"stack: got {len(adapters)} trees, expected one for each of the {len(self.members)} configs"
            )
        for i, (tree, shapes) in enumerate(zip(adapters, self._own, strict=True)):
            trees.check(tree, shapes, f"trees[{i}]")
        stacked: Tree = {}
        for path, leaves in self._shapes[""].items():
            stacked[path] = {}
            for name, shape in leaves.items():
                given = [tree.get(path, {}).get(name) for tree in adapters]
                having = next(leaf for leaf in given if leaf is not None)
                parts = [having.new_zeros(shape) if leaf is None else _padded(leaf, shape) for leaf in given]
                stacked[path][name] = torch.stack(parts)
        return trees.sort(stacked)

    def unstack(self, stacked: Tree) -> list[Tree]:
        """Split a stack into trees of each config's own shapes and sites; their leaves are views.

        Raises:
            KeyError, TypeError, ValueError: A stack that does not fit.
        """
        trees.check(stacked, self._shapes[""], "the stack", stacked=len(self.members))
        return [
            {
                path: {name: stacked[path][name][(i, *map(slice, shape))] for name, shape in leaves.items()}
                for path, leaves in own.items()
            }
            for i, own in enumerate(self._own)
        ]

    def member(self, index: int) -> Graft:
        """The graft of one config alone, for trees that `unstack` returns."""
        return Graft(self.model, {"": self.members[index]}, False, self.allow_unreached)

    def at(self, index: int | Tensor) -> Member:
        """The graft of one adapter as the stack has it, padded: for `torch.vmap` over stack and index.

        Args:
            index: Which adapter: an integer or an integer tensor without axes, which `vmap` may map over.

        >>> from torchgraft.adapters import LoraConfig
        >>> from torchgraft.functional import bind
        >>> graft = bind(torch.nn.Linear(4, 3), [LoraConfig(r=r, target_modules="all-linear") for r in (1, 2)])
        >>> many, x = graft.init(), torch.ones(5, 4)
        >>> torch.vmap(lambda i, params: graft.at(i)(params, x))(torch.arange(2), many).shape
        torch.Size([2, 5, 3])
        """
        return Member(self, index)

    def active(self, params: Any) -> dict[str, Any]:
        if isinstance(params, dict):
            raise TypeError(
                f"params is a dict; this graft was bound with {len(self.members)} configs: call it with "
                "route(stacked, rows), or call graft.at(i) for adapter i of the stack, or graft.member(i) for its own "
                "tree"
            )
        active = super().active(params)
        rows, members = getattr(params, "rows", None), getattr(params, "members", None)
        if rows is not None and rows.count != (len(self.members) if members is None else len(members)):
            raise ValueError(
                f"the stack has {rows.count} adapters, and this graft was bound with {len(self.members)} configs; say "
                f"which of them it holds: route(stacked, rows, members=...) with {rows.count} indices"
            )
        return active

    def expected(self) -> dict[str, Shapes]:
        sites = self.sites[""]
        paths = sorted({*sites, *self.replaced[""]})
        return {"": {path: _largest(path, sites.get(path), self._own) for path in paths}}

    def entries(self, name: str) -> dict[str, Entry]:
        return {path: self._entry(path, entry) for path, entry in super().entries(name).items()}

    def _entry(self, path: str, entry: Entry) -> Entry:
        if isinstance(entry, Follower):
            raise ValueError(
                f"bind: {path} is tied to {entry.follow.source} (ensure_weight_tying), and a stack of several configs "
                "has no such ties; bind them apart, or stack trees of one config"
            )
        known = tuple(path in plan for plan in self._plans)
        device = entry.site.like(modules_of(self.model)[entry.site.owner]).device
        return StackedEntry(entry.config, entry.site, torch.tensor(known, device=device), known)


@dataclasses.dataclass(frozen=True, eq=False)
class StackedEntry(Entry):
    """A stack's part at one site, which some of its adapters may not have."""

    present: Tensor
    known: tuple[bool, ...]

    def along(self, members: Tensor | None, rows: Rows) -> tuple[Entry, Rows]:
        if members is None:
            return self, rows.only(self.present, self.known)
        constants = {
            name: PerAdapter(constant.values[members])
            for name, constant in self.site.constants.items()
            if isinstance(constant, PerAdapter)
        }
        readable = not torch.compiler.is_compiling() and is_readable(members)
        known = tuple(self.known[i] for i in members.tolist()) if readable else None
        return with_constants(self, constants), rows.only(self.present[members], known)

    def several(self, count: int) -> Entry:
        having = [i for i, known in enumerate(self.known) if known]
        members = torch.tensor([having[i % len(having)] for i in range(count)], device=self.present.device)
        return self.along(members, Rows(None, count))[0]

    def at(self, index: int | Tensor) -> tuple[Entry, Tensor | None]:
        """One adapter's part, and whether it has the site (`None` for yes)."""
        constants = {
            name: _at(constant.values, index)
            for name, constant in self.site.constants.items()
            if isinstance(constant, PerAdapter)
        }
        return with_constants(self, constants), None if all(self.known) else _at(self.present, index)


@dataclasses.dataclass(frozen=True, eq=False)
class Padded:
    """One adapter's padded tree and its place in the stack, given to a call in place of a tree."""

    tree: Tree
    index: int | Tensor

    def check(self, shapes: Mapping[str, Mapping[str, tuple[int, ...]]], what: str) -> None:
        trees.check(self.tree, shapes, what)

    def with_tree(self, tree: Tree) -> Padded:
        """Another tree of the same adapter."""
        return Padded(tree, self.index)

    def layer(self, below: Any, entry: Entry, finder: Finder | None) -> Chosen:
        assert isinstance(entry, StackedEntry)
        own, on = entry.at(self.index)
        return Chosen(below, own, entry.leaves(self.tree), on)

    def tensors(self) -> Any:
        return self.tree, self.index


class Member:
    """One adapter of a stack as a function of its padded tree; made by `StackedGraft.at`."""

    def __init__(self, graft: StackedGraft, index: int | Tensor):
        self.graft, self.index = graft, index

    def __call__(self, params: Tree, *args: Any, **kwargs: Any) -> Any:
        return self.graft(Padded(params, self.index), *args, **kwargs)  # type: ignore[arg-type]


def check_configs(configs: Sequence[Config]) -> None:
    """Hold the configs of a stack against each other.

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
        free = first.method.varying | getattr(first, "site_fields", frozenset())
        for field in dataclasses.fields(config):  # type: ignore[arg-type]
            name = field.name
            if name not in free and getattr(config, name) != getattr(first, name):
                raise ValueError(
                    f"bind: configs[{i}].{name} is {getattr(config, name)!r} and configs[0].{name} is "
                    f"{getattr(first, name)!r}; the adapters of a {first.method.name} stack share it. Bind them apart"
                )


def _check_leaves(configs: Sequence[Config], plans: Sequence[Mapping[str, Site]]) -> None:
    """Refuse configs that train different leaves of one site."""
    found: dict[str, tuple[str, ...]] = {}
    for config, plan in zip(configs, plans, strict=True):
        for path, site in plan.items():
            own = tuple(sorted(config.method.shapes(config, site)))
            if found.setdefault(path, own) != own:
                raise ValueError(
                    f"{path}: the configs train different leaves: {list(found[path])} and {list(own)}; bind them apart"
                )


def _union(config: Config, plans: Sequence[Mapping[str, Site]], model: nn.Module) -> dict[str, Site]:
    """Every site that some adapter has, with the constants of all."""
    modules = modules_of(model)
    paths = {path: None for plan in plans for path in plan}
    names: dict[Key, str] = {}
    for path in paths:
        other = names.setdefault(key_of(modules, path), path)
        if other != path:
            raise ValueError(f"bind: {other} and {path} are one module under two names; target it by one of them")
    return {path: _merged(path, config, [plan.get(path) for plan in plans]) for path in paths}


def _merged(path: str, config: Config, sites: Sequence[Site | None]) -> Site:
    """A site with the constants of all that have it; a tensor that one of them lacks is zero there."""
    having = [site for site in sites if site is not None]
    first = having[0]
    constants: dict[str, Any] = {}
    for name in {name: None for site in having for name in site.constants}:
        values = [None if site is None else site.constants.get(name) for site in sites]
        value = next(one for one in values if one is not None)
        if all(name in site.constants and _same(value, site.constants[name]) for site in having):
            constants[name] = value
        elif name in config.method.varying:
            constants[name] = PerAdapter(_padded_stack(values))
        else:
            raise ValueError(
                f"{path}: the configs differ in {name!r}, which the adapters of a {config.method.name} stack share; "
                "bind them apart"
            )
    return dataclasses.replace(first, constants=constants)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and torch.equal(a, b))
    return bool(a == b)


def _padded_stack(values: Sequence[Any]) -> Tensor:
    tensors = [
        None if v is None else v if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64) for v in values
    ]
    present = [t for t in tensors if t is not None]
    shape = tuple(map(max, zip(*(t.shape for t in present), strict=True)))
    return torch.stack([present[0].new_zeros(shape) if t is None else _padded(t, shape) for t in tensors])


def _largest(path: str, site: Site | None, own: Sequence[Shapes]) -> dict[str, tuple[int, ...]]:
    having = [shapes[path] for shapes in own if path in shapes]
    largest = {}
    for name in {name: None for shapes in having for name in shapes}:
        sizes = [shapes[name] for shapes in having if name in shapes]
        largest[name] = tuple(map(max, zip(*sizes, strict=True)))
        if site is not None and site.groups > 1 and len(set(sizes)) > 1:
            raise ValueError(
                f"{path}: a convolution with {site.groups} groups has parameters group by group, which padding would "
                f"shift, and {name} has shapes {sorted(set(sizes))}; give it one rank in all configs"
            )
        if site is not None and site.experts and len(set(sizes)) > 1:
            raise ValueError(
                f"{path}: a parameter of {site.experts} experts has leaves of all experts in one, which padding would "
                f"shift, and {name} has shapes {sorted(set(sizes))}; give it one rank in all configs"
            )
    return largest


def _padded(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    missing = [size - own for size, own in zip(shape, tensor.shape, strict=True)]
    if not any(missing):
        return tensor
    return F.pad(tensor, [edge for size in reversed(missing) for edge in (0, size)])


def _at(values: Tensor, index: int | Tensor) -> Tensor:
    """`values[index]`, without reading an index that is a tensor."""
    if isinstance(index, Tensor):
        return values.index_select(0, index.view(1)).squeeze(0)
    return values[index]
