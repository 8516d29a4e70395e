"""The interfaces of an adapter method, which one file implements, and of its config."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from ._abilities import KeepsDtype, Leaves, MergesOver, Original
from ._constants import Constants, register
from ._places import Places
from ._rows import Rows
from ._sites.site import Site
from ._sites.tensors import Dense, check_leaves, check_shapes

A = TypeVar("A")

SHARED = "*"
"""Where a tree has the leaves that several sites share."""


Tree = dict[str, Any]
"""A parameter tree: `{path: {leaf: tensor}}`, or `{name: {path: {leaf: tensor}}}`."""


class Weights(Protocol):
    """The interface by which a method reads the base: each call reads, so a method that needs nothing costs nothing."""

    def __call__(self, path: str, /) -> Tensor:
        """Return the base's canonical weight at a site, detached and in its own dtype."""
        ...

    def bias(self, path: str, /) -> Tensor | None:
        """Return its bias, detached; `None` where it has none."""
        ...


class ActiveTree(Protocol):
    """The interface of what a call has in place of an adapter's tree: a routed stack, one adapter of a padded one."""

    tree: Tree
    per_row: ClassVar[bool]
    """Whether each row of the batch has an adapter of its own."""

    def check(self, shapes: Mapping[str, Mapping[str, tuple[int, ...]]], what: str) -> None:
        """Refuse a tree that does not have the leaves of one adapter, as `trees.check` does."""
        ...

    def with_tree(self, tree: Tree) -> ActiveTree:
        """Return the same over another tree."""
        ...

    def layer(self, below: Any, adapter: SiteAdapter, finder: Any) -> Any:
        """Return the layer that a site gets around the one below."""
        ...

    def tensors(self) -> Any:
        """Return all tensors that a call depends on."""
        ...


def is_per_row(tree: Tree | ActiveTree) -> bool:
    """Return whether a tree, or what a call has in its place, gives each row an adapter of its own.

    >>> is_per_row({"layers.0": {}})
    False
    """
    return type(tree) is not dict and tree.per_row  # type: ignore[union-attr]


class Layer(Protocol):
    """The module under an adapter, as a method sees it: callable, with a canonical weight."""

    @property
    def weight(self) -> Tensor: ...

    @property
    def bias(self) -> Tensor | None: ...

    @property
    def training(self) -> bool: ...

    @property
    def as_linear(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias where a call is just `F.linear` of them, else `None`."""
        ...

    @property
    def original(self) -> Layer:
        """The base without any adapter: the layer itself, or the one at the bottom of the layers beneath it."""
        ...

    def __call__(self, x: Tensor) -> Tensor: ...


class Weighted(abc.ABC):
    """A layer whose weight and bias are those of its dense meaning."""

    __slots__ = ()

    as_linear: tuple[Tensor, Tensor | None] | None = None

    @abc.abstractmethod
    def dense(self) -> tuple[Tensor, Tensor | None]:
        """Return canonical weight and bias."""

    @property
    def weight(self) -> Tensor:
        return self.dense()[0]

    @property
    def bias(self) -> Tensor | None:
        return self.dense()[1]

    @property
    def original(self) -> Any:
        """The base without any adapter."""
        return self


@dataclasses.dataclass(frozen=True)
class Method:
    """An adapter method as pure functions; one file makes one.

    Attributes:
        name: Name of the method, as in `peft_type` (`"LORA"`).
        config: The class of its configs.
        kinds: The kinds of site it supports (`Site.kind`).
        plan: `(config, sites, weights) -> {path: constants}`, run once by `bind`; sees all sites, checks the config
            against each and computes what stays fixed (scaling factors, ranks, shared random tensors). It may ask
            `weights` for a base's weight.
        shapes: `(config, site) -> {leaf: shape}`.
        init: `(config, sites, generator, weights) -> {path: {leaf: tensor}}`, float32, on torch's default device,
            which is the generator's there.
        apply: `(config, site, leaves, base, x) -> y`, the factored forward around the base module's own call.
        merge: `(config, site, leaves, weight, bias) -> (weight, bias)`, the dense meaning, on canonical weights.
            Everything it gets is float32 or wider, of one dtype.
        constants: The class of its constants, which `plan` makes.
        routed: `(config, site, leaves, base, x, rows) -> y`, `apply` for a batch whose rows have adapters of their
            own: leaves are stacked, `"N ..."`, rows lead `x`, and a row that has no adapter gets the base's output. A
            faster way than the general one, which runs `apply` under `vmap`; returns `NotImplemented` for sites it
            is not made for. Constants that differ along the stack are `PerAdapter`.
        varying: Names of the config's fields that may differ between the adapters of a stack, beside those that only
            choose modules. Of the constants, `Varying` says so; one that varies may be a tensor in `apply`.
        abilities: What few methods can; see `torchgraft.functional.abilities`.

    Raises:
        TypeError: A name in `varying` that is no field of the config; two abilities of one kind.
    """

    name: str
    config: type
    kinds: frozenset[str]
    plan: Callable[[Any, list[Site], Weights], Mapping[str, Any]]
    shapes: Callable[[Any, Site], dict[str, tuple[int, ...]]]
    init: Callable[[Any, list[Site], torch.Generator | None, Weights], dict[str, Leaves]]
    apply: Callable[[Any, Site, Leaves, Layer, Tensor], Tensor]
    merge: Callable[[Any, Site, Leaves, Tensor, Tensor | None], Dense]
    constants: type[Constants] = Constants
    routed: Callable[[Any, Site, Leaves, Layer, Tensor, Rows], Any] | None = None
    varying: frozenset[str] = frozenset()
    abilities: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        fields = {field.name for field in dataclasses.fields(self.config)}
        if unknown := sorted(self.varying - fields):
            raise TypeError(
                f"{self.name}: varying names {unknown}, which are no fields of {self.config.__name__}; it has "
                f"{sorted(fields)}"
            )
        by_type = {type(ability): ability for ability in self.abilities}
        if len(by_type) != len(self.abilities):
            raise TypeError(f"{self.name}: abilities has two objects of one type; give one of each")
        object.__setattr__(self, "_by_type", by_type)
        register(self.constants)

    def ability(self, kind: type[A]) -> A | None:
        """Return the ability of a type, `None` where the method does not have it."""
        ability: A | None = self.__dict__["_by_type"].get(kind)
        return ability


class Config(Protocol):
    """The interface of a config: all that `bind` asks of one."""

    method: ClassVar[Method]
    site_fields: ClassVar[frozenset[str]]
    """Fields that only choose modules or say where things came from, so that the adapters of a stack may differ."""

    def for_model(self, model: nn.Module) -> Self:
        """Return the config with its targets named as a model has them."""
        ...

    def structure(self, model: nn.Module) -> nn.Module:
        """Return the model that the config is for: one that shares all tensors with this, where it has more layers."""
        ...

    def targets(self, model: nn.Module) -> list[str]:
        """Return the names of the modules to adapt, in the order of `named_modules`, then of bare parameters."""
        ...

    def replaces(self, modules: Mapping[str, nn.Module], model: nn.Module, paths: list[str]) -> Mapping[str, Any]:
        """Return the tensors of the model that the adapter trains copies of, by path and leaf."""
        ...

    def follows(self, modules: Mapping[str, nn.Module], paths: list[str]) -> Mapping[str, Any]:
        """Return the modules that have the parameters of a site, by path."""
        ...


@dataclasses.dataclass(frozen=True)
class SiteAdapter:
    """One adapter's part at one site.

    Attributes:
        config: The adapter's config.
        site: The site, with the adapter's constants.
        expected: Shapes of the leaves there, by leaf; those that are not named may have any.
    """

    config: Config
    site: Site
    expected: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict, kw_only=True, compare=False)

    def leaves(self, tree: Tree) -> Leaves:
        """Return this part's leaves in its adapter's tree, those that it shares with other sites among them."""
        site = self.site
        if site.shared:
            return with_shared(site, tree.get(site.path, {}), tree)
        leaves: Leaves = tree[site.path]
        return leaves

    def check(self, leaves: Leaves, *stacked: int) -> None:
        """Refuse leaves of other shapes than the site's, which they can get after the adapter was given.

        Args:
            leaves: The leaves at this site.
            stacked: The number of adapters, where the leaves are those of a stack.

        Raises:
            ValueError: Names the site and the leaf.
        """
        check_shapes(self.site.path, leaves, self.expected, stacked)

    def with_constants(self, constants: Mapping[str, Any]) -> SiteAdapter:
        """Return this part with some constants of its site replaced."""
        if not constants:
            return self
        site = dataclasses.replace(self.site, constants=self.site.constants.replace(constants))
        return dataclasses.replace(self, site=site)

    def along(self, members: Tensor | None, rows: Rows, places: Places | None = None) -> tuple[SiteAdapter, Rows]:
        """Return this part for a stack: constants as the stack's members have them, and rows that have this site."""
        return self, rows

    def several(self, count: int) -> SiteAdapter:
        """Return this part for `count` adapters that have this site, whatever the members of a stack are."""
        return self

    def merge(self, leaves: Leaves, weight: Tensor, bias: Tensor | None, original: Original | None = None) -> Dense:
        """Return weight and bias with this adapter in, in float32 or wider.

        Args:
            leaves: The adapter's leaves at this site.
            weight: The canonical weight beneath this adapter.
            bias: The bias beneath it.
            original: The base's own, where other adapters are in `weight` and `bias`.

        Raises:
            ValueError: A leaf on the meta device.
        """
        check_leaves(self.site.path, leaves, weight)
        wide = torch.promote_types(weight.dtype, torch.float32)
        for leaf in leaves.values():
            wide = torch.promote_types(wide, leaf.dtype)
        method = self.config.method
        kept, over = method.ability(KeepsDtype), method.ability(MergesOver)
        leaves = {name: leaf if kept and name in kept.leaves else leaf.to(wide) for name, leaf in leaves.items()}
        weight, bias = _widened((weight, bias), wide)
        if original is None or over is None:
            return method.merge(self.config, self.site, leaves, weight, bias)
        read_original = original
        return over.merge(self.config, self.site, leaves, weight, bias, lambda: _widened(read_original(), wide))


def with_shared(site: Site, leaves: Leaves, tree: Tree) -> Leaves:
    """Return a site's own leaves with those that it shares over them.

    >>> site = Site("a", "linear", 2, 2, shared={"bank": "bank.0"})
    >>> sorted(with_shared(site, {"logits": torch.ones(1)}, {"*": {"bank.0": torch.ones(2)}}))
    ['bank', 'logits']
    """
    return beside(site, leaves | {leaf: tree[SHARED][name] for leaf, name in site.shared.items()})


def beside(site: Site, leaves: Leaves) -> Leaves:
    """Return a site's leaves with those that it shares on the device of its own; what has no values stays as it is."""
    own = (one for leaf, one in leaves.items() if leaf not in site.shared and isinstance(one, Tensor))
    here = next((one.device for one in own), None)
    given = {leaf: leaves[leaf] for leaf in site.shared if isinstance(leaves[leaf], Tensor)}  # others are called
    return leaves | {leaf: one.to(here) for leaf, one in given.items() if not one.is_meta}


def as_tree(path: str, site: Site, leaves: Leaves) -> Tree:
    """Return the tree of a site's leaves at a path, with those that it shares where trees have them.

    >>> site = Site("a", "linear", 2, 2, shared={"bank": "bank.0"})
    >>> as_tree("a", site, {"bank": torch.ones(2), "logits": torch.ones(1)})
    {'a': {'logits': tensor([1.])}, '*': {'bank.0': tensor([1., 1.])}}
    """
    if not site.shared:
        return {path: leaves}
    own = {leaf: one for leaf, one in leaves.items() if leaf not in site.shared}
    shared = {SHARED: {name: leaves[leaf] for leaf, name in site.shared.items()}}
    return {path: own} | shared if own else shared


def _widened(dense: Dense, dtype: torch.dtype) -> Dense:
    return dense[0].to(dtype), None if dense[1] is None else dense[1].to(dtype)
