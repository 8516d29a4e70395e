"""What an adapter method has to say for itself."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from .rows import Rows
from .sites.site import Dense, Site, check_leaves

Leaves = dict[str, Tensor]


Tree = dict[str, Any]
"""A parameter tree: `{path: {leaf: tensor}}`, or `{name: {path: {leaf: tensor}}}`."""


Weights = Callable[[str], Tensor]
"""The base's canonical weight of the site at a path, detached and in its own dtype; computed when asked for."""


Original = Callable[[], Dense]
"""The base's own canonical weight and bias, beneath all adapters; computed when asked for."""


class ActiveTree(Protocol):
    """What a call can have in place of an adapter's tree: a routed stack, one adapter of a padded one."""

    tree: Tree

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


class Layer(Protocol):
    """The module under an adapter, as a method sees it: callable, with a canonical weight."""

    @property
    def weight(self) -> Tensor: ...

    @property
    def bias(self) -> Tensor | None: ...

    @property
    def training(self) -> bool: ...

    @property
    def plain(self) -> tuple[Tensor, Tensor | None] | None:
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

    plain: tuple[Tensor, Tensor | None] | None = None

    @abc.abstractmethod
    def dense(self) -> tuple[Tensor, Tensor | None]:
        """Canonical weight and bias."""

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
        kinds: The kinds of site it supports (`Site.kind`).
        plan: `(config, sites, weights) -> {path: constants}`, run once by `bind`; sees all sites, checks the config
            against each and computes what stays fixed (scaling factors, ranks, shared random tensors). It may ask
            `weights` for a base's weight.
        shapes: `(config, site) -> {leaf: shape}`.
        init: `(config, sites, generator, weights) -> {path: {leaf: tensor}}`, float32.
        apply: `(config, site, leaves, base, x) -> y`, the factored forward around the base module's own call.
        merge: `(config, site, leaves, weight, bias) -> (weight, bias)`, the dense meaning, on canonical weights.
            Everything it gets is float32 or wider, of one dtype, but for leaves of `own_dtype`.
        merge_over: `(config, site, leaves, weight, bias, original) -> (weight, bias)`, `merge` on a weight that
            other adapters are in already, for methods whose meaning depends on the base's own, which is
            `original() -> (weight, bias)`; `None` for methods that only see what is beneath them.
        routed: `(config, site, leaves, base, x, rows) -> y`, `apply` for a batch whose rows have adapters of their
            own: leaves are stacked, `"N ..."`, rows lead `x`, and a row that has no adapter gets the base's output. A
            faster way than the general one, which runs `apply` under `vmap`; returns `NotImplemented` for sites it
            is not made for. Constants that differ along the stack are `PerAdapter`.
        part: `(config, site, leaves, rows, columns) -> leaves`, the adapter of some outputs of a linear map, from some
            of its inputs; leaves may be stacked. For methods that support sites of the kind `"attention"`.
        varying: Names of the config's fields and of the constants that may differ between the adapters of a stack;
            a constant that varies may be a tensor in `apply`.
        own_dtype: Leaves that `merge` gets as they are, because what they were rounded to counts.
        factors: `(config, site, leaves) -> (up, down, scaling)`, for methods that add `scaling * up @ down` to a bare
            parameter, `"[experts] out r"` and `"[experts] r in"`: it is multiplied out only where the model does more
            with the parameter than to multiply with it. `None` for methods whose parameters are always dense.
        precompute: `(config, site, leaves, base) -> constants`, what `apply` computes from the leaves and the base's
            weight alone, for views that are said to be constant: there it runs once, and `apply` finds what it
            returned among the site's constants.
        needs_real: `config -> description`, what of a config has no meaning for complex weights; `None` for nothing.
    """

    name: str
    kinds: frozenset[str]
    plan: Callable[[Any, list[Site], Weights], Mapping[str, Mapping[str, Any]]]
    shapes: Callable[[Any, Site], dict[str, tuple[int, ...]]]
    init: Callable[[Any, list[Site], torch.Generator | None, Weights], dict[str, Leaves]]
    apply: Callable[[Any, Site, Leaves, Layer, Tensor], Tensor]
    merge: Callable[[Any, Site, Leaves, Tensor, Tensor | None], Dense]
    merge_over: Callable[[Any, Site, Leaves, Tensor, Tensor | None, Original], Dense] | None = None
    routed: Callable[[Any, Site, Leaves, Layer, Tensor, Rows], Any] | None = None
    part: Callable[[Any, Site, Leaves, slice, slice], Leaves] | None = None
    varying: frozenset[str] = frozenset()
    own_dtype: frozenset[str] = frozenset()
    factors: Callable[[Any, Site, Leaves], tuple[Tensor, Tensor, float | Tensor]] | None = None
    precompute: Callable[[Any, Site, Leaves, Layer], dict[str, Any]] | None = None
    needs_real: Callable[[Any], str | None] = lambda config: str(config.method.name)


class Config(Protocol):
    """What `bind` needs of a config: its method, and the modules it targets."""

    method: ClassVar[Method]

    def targets(self, model: nn.Module) -> list[str]:
        """Names of the modules of `model` to adapt, in the order of `named_modules`, then of bare parameters."""
        ...


@dataclasses.dataclass(frozen=True)
class SiteAdapter:
    """One adapter's part at one site."""

    config: Config
    site: Site

    def leaves(self, tree: Tree) -> Leaves:
        """This part's leaves in its adapter's tree."""
        own: Leaves = tree[self.site.path]
        return own

    def with_constants(self, constants: Mapping[str, Any]) -> SiteAdapter:
        """Return this part with some constants of its site replaced."""
        if not constants:
            return self
        return dataclasses.replace(
            self, site=dataclasses.replace(self.site, constants={**self.site.constants, **constants})
        )

    def along(self, members: Tensor | None, rows: Rows) -> tuple[SiteAdapter, Rows]:
        """This part for a stack: constants as the stack's members have them, and rows that have this site."""
        return self, rows

    def several(self, count: int) -> SiteAdapter:
        """This part for `count` adapters that have this site, whatever the members of a stack are."""
        return self

    def merge(self, leaves: Leaves, weight: Tensor, bias: Tensor | None, original: Original | None = None) -> Dense:
        """Dense meaning in float32 or wider.

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
        leaves = {name: leaf if name in method.own_dtype else leaf.to(wide) for name, leaf in leaves.items()}
        weight, bias = _widened((weight, bias), wide)
        if original is None or method.merge_over is None:
            return method.merge(self.config, self.site, leaves, weight, bias)
        own = original
        return method.merge_over(self.config, self.site, leaves, weight, bias, lambda: _widened(own(), wide))


def _widened(dense: Dense, dtype: torch.dtype) -> Dense:
    return dense[0].to(dtype), None if dense[1] is None else dense[1].to(dtype)
