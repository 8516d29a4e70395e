"""Routed layers: a site whose rows have different adapters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .._abilities import Leaves
from .._locating.finder import Declared, Finder, locate
from .._locating.layout import LEADING, Layout
from .._method import Layer, SiteAdapter, Weighted
from .._rows import Groups, PerAdapter, Rows
from .._sites.tensors import check_leaves
from .._unsupported import UnsupportedCall
from .around import Around
from .noise import OtherDraw, OwnNoise, RowNoise


class RoutedLayer(Weighted):
    """A layer with a stack of adapters on it, one for each row, or for each of the `tokens` tokens of a row."""

    __slots__ = ("base", "declared", "entry", "finder", "leaves", "owner", "rows", "tokens")

    def __init__(
        self,
        base: Any,
        adapter: SiteAdapter,
        leaves: Leaves,
        rows: Rows,
        finder: Finder | None,
        owner: Any,
        declared: Declared,
        tokens: int,
    ):
        adapter.check(leaves, rows.count)
        self.base, self.entry, self.leaves, self.rows, self.finder = base, adapter, leaves, rows, finder
        self.owner, self.declared, self.tokens = owner, declared, tokens

    def __call__(self, x: Tensor) -> Tensor:
        adapter, size = self.entry, self.rows.size // self.tokens
        for leaf in self.leaves.values():
            if leaf.is_meta:
                check_leaves(adapter.site.path, self.leaves, x)
        if x.is_nested:
            raise TypeError(
                f"{adapter.site.path}: the input is a nested tensor, whose rows have no places of their own to route "
                "by; pad it, or call the graft with one adapter at a time"
            )
        layout = locate(adapter.site, x, size, self.declared, self.finder, self.owner, self.tokens)
        method = adapter.config.method
        base: Layer = self.base
        if layout != LEADING:
            x, base = layout.to_rows(x, size), _Moved(base, layout, size)
        y: Any = NotImplemented
        apart = self._has_many_groups()
        noisy = self.rows.noise is not None and base.training
        if method.routed is not None and not (adapter.site.routing.by_adapter and apart):
            with RowNoise(self.rows) if noisy else contextlib.nullcontext(), contextlib.suppress(OtherDraw):
                y = method.routed(adapter.config, adapter.site, self.leaves, base, x, self.rows)
        if y is NotImplemented:
            y = self._by_adapter(base, x) if apart or noisy else self._general(base, x)
        return y if layout == LEADING else layout.from_rows(y, size)

    def _has_many_groups(self) -> bool:
        """Return whether tokens have so many groups that parameters of their own for each are not worth it."""
        known = self.rows.known() if self.tokens > 1 else None
        if known is None or known.groups.size <= self.rows.count:
            return False
        return sum(1 for _ in self._chain()) == 1

    def _by_adapter(self, base: Layer, x: Tensor) -> Tensor:
        """Run the method's `apply` once for each adapter, on the rows that have it."""
        known = self.rows.known()
        if known is None:
            raise UnsupportedCall(
                f"{self.entry.site.path}: noise from generators of each adapter's own takes rows whose values can be "
                "read, which compiled and transformed calls have not; set the config's dropout to 0"
            )
        order = self.rows.order()
        parts, noise = [], self.rows.noise if base.training else None
        for i, part in enumerate(x.index_select(0, order).split(known.counts)) if len(order) else ():
            if len(part):
                leaves = {name: leaf[i] for name, leaf in self.leaves.items()}
                constants = {name: c.values[i] for name, c in _varying(self.entry).items()}
                with contextlib.nullcontext() if noise is None else OwnNoise(noise[i]):
                    parts.append(self._build(iter([(leaves, constants, {})]), outermost=True)(part))
        if len(order) == self.rows.size:
            y = torch.cat(parts)
            return torch.empty_like(y).index_copy(0, order, y)
        y = base(x)
        return y.index_copy(0, order, torch.cat(parts)) if parts else y

    def each(self, run: Callable[[SiteAdapter, Leaves], Any]) -> Any:
        """Return what a function makes of each adapter of the stack, along a leading axis."""
        constants = {name: c.values for name, c in _varying(self.entry).items()}
        return torch.vmap(lambda leaves, own: run(self.entry.with_constants(own), leaves))(self.leaves, constants)

    def single(self) -> tuple[SiteAdapter, Leaves, Tensor | None]:
        """Return the adapter of the one row, its leaves, and whether it is there at all, `None` for yes.

        A forward may read a parameter many times, once for each expert; they are picked once.
        """
        key = self.entry.site.path, torch.is_grad_enabled()
        if key not in self.owner.picked:
            self.owner.picked[key] = self._single()
        picked: tuple[SiteAdapter, Leaves, Tensor | None] = self.owner.picked[key]
        return picked

    def _single(self) -> tuple[SiteAdapter, Leaves, Tensor | None]:
        leaves, constants, on = self._pick(self.rows.each())
        adapter = self.entry.with_constants({name: value[0] for name, value in constants.items()})
        return adapter, {name: leaf[0] for name, leaf in leaves.items()}, on["on"][0] if on else None

    def _general(self, base: Layer, x: Tensor) -> Tensor:
        """Run the method's `apply` on each group of rows, under `vmap`; adapters below come along, group by group."""
        layers = list(self._chain())
        size = max(layer.rows.size for layer in layers)
        if any(size % layer.rows.size for layer in layers):
            sizes = sorted({layer.rows.size for layer in layers})
            raise ValueError(
                f"{self.entry.site.path}: adapters are routed over {sizes} rows in one call; give one batch one "
                "length of rows"
            )
        alone = len(layers) == 1
        groups = [self.rows.groups()] if alone else [layer.rows.expanded(size).each() for layer in layers]
        parts = [layer._pick(group) for layer, group in zip(layers, groups, strict=True)]

        def run_group(parts: list[Any], x: Tensor, known: list[Tensor]) -> Tensor:
            layer = self._build(iter(parts), outermost=True)
            for y in known:
                layer.base = _Known(layer.base, x, y)
            result: Tensor = layer(x)
            return result

        # Tensors are leaves, and `None` is for a layer that every group has.
        wide, narrow = _under_autocast(x)  # which does not reach into vmap
        wide = groups[0].mask(wide.unflatten(0, (groups[0].size, -1)), 0)
        own: Any = None
        known: list[Tensor] = []
        if groups[0].base or (alone and x.is_floating_point() and x.itemsize < 4):
            own = base(x).unflatten(0, (groups[0].size, -1))
            known = [groups[0].mask(own, 0)] if alone and narrow is None else []
        y = torch.vmap(run_group, randomness="different")(parts, wide, known)
        y = y if narrow is None else y.to(narrow)
        if groups[0].base:
            y = torch.where(groups[0].active(y.ndim), y, own)
        return y.flatten(0, 1)

    def _chain(self) -> Iterator[RoutedLayer]:
        layer: Any = self
        while layer is not None:
            if isinstance(layer, RoutedLayer):
                yield layer
            layer = getattr(layer, "base", None)

    def _pick(self, groups: Groups) -> tuple[Leaves, dict[str, Tensor], dict[str, Tensor]]:
        """Return each group's part of this layer: leaves, constants and whether there is an adapter at all."""
        leaves = {name: self._pick_leaf(name, leaf, groups) for name, leaf in self.leaves.items()}
        constants = {name: groups.pick(c.values) for name, c in _varying(self.entry).items()}
        return leaves, constants, {"on": groups.active(1)} if groups.base else {}

    def _pick_leaf(self, name: str, leaf: Tensor, groups: Groups) -> Tensor:
        """Return each group's own part of a leaf; what sites share is picked once for all of them."""
        shared, picked = self.entry.site.shared.get(name), getattr(self.owner, "picked", None)
        if shared is None or picked is None or groups.index is None:
            return groups.pick(leaf)
        key = shared, id(groups.index), groups.base
        if key not in picked:
            picked[key] = groups.index, groups.pick(leaf)  # the index stays, and with it its identity
        part: Tensor = picked[key][1]
        return part

    def _build(self, parts: Iterator[Any], outermost: bool = False) -> Any:
        leaves, constants, on = next(parts)
        below = self.base
        if isinstance(below, RoutedLayer):
            below = below._build(parts)
        elif hasattr(below, "base"):
            below = below.over(_rebuilt(below.base, parts))
        adapter = self.entry.with_constants(constants)
        return SelectedAdapter(below, adapter, leaves, None if outermost else on.get("on"))

    def dense(self) -> tuple[Tensor, Tensor | None]:
        raise RuntimeError(
            f"{self.entry.site.path}: the weight of a routed module was asked for, and each row has its own. An "
            "adapter on top whose method needs the dense weight can be routed too: route(stack([tree]), zeros)"
        )

    @property
    def original(self) -> Any:
        """The base without any adapter."""
        return self.base.original

    @property
    def training(self) -> bool:
        result: bool = self.base.training
        return result


def _under_autocast(x: Tensor) -> tuple[Tensor, torch.dtype | None]:
    """Return the input in a precision that suits parameters, and that of the output if autocast is on."""
    if not torch._C._is_any_autocast_enabled() or not x.is_floating_point():
        return x, None
    if not torch.is_autocast_enabled(x.device.type):
        return x, None
    return x.to(torch.promote_types(x.dtype, torch.float32)), torch.get_autocast_dtype(x.device.type)


def _rebuilt(layer: Any, parts: Iterator[Any]) -> Any:
    if isinstance(layer, RoutedLayer):
        return layer._build(parts)
    return layer.over(_rebuilt(layer.base, parts)) if hasattr(layer, "base") else layer


class SelectedAdapter(Weighted):
    """A layer with one adapter of a stack; `on` is whether it is there at all, `None` for yes."""

    __slots__ = ("base", "entry", "leaves", "on")

    def __init__(self, base: Any, adapter: SiteAdapter, leaves: Leaves, on: Tensor | None):
        self.base, self.entry, self.leaves, self.on = base, adapter, leaves, on

    def __call__(self, x: Tensor) -> Tensor:
        adapter = self.entry
        masked = x if self.on is None else torch.where(self.on, x, 0)  # no gradient from where it is not
        y = adapter.config.method.apply(adapter.config, adapter.site, self.leaves, self.base, masked)
        return y if self.on is None else torch.where(self.on, y, self.base(x))

    def dense(self) -> tuple[Tensor, Tensor | None]:
        weight, bias = self.base.dense()
        original = None if self.base.original is self.base else self.base.original.dense
        if self.on is None:
            return self.entry.merge(self.leaves, weight, bias, original)
        below = torch.where(self.on, weight, weight.detach())
        beside = None if bias is None else torch.where(self.on, bias, bias.detach())
        merged, added = self.entry.merge(self.leaves, below, beside, original)
        return torch.where(self.on, merged, weight), None if added is None else torch.where(self.on, added, bias)

    @property
    def original(self) -> Any:
        """The base without any adapter."""
        return self.base.original

    @property
    def training(self) -> bool:
        result: bool = self.base.training
        return result


class _Known(Around):
    """A layer whose output for one input is known: of all rows at once, rounded as the base's own call rounds it."""

    __slots__ = ("input", "output")

    def __init__(self, base: Layer, input: Tensor, output: Tensor):
        super().__init__(base)
        self.input, self.output = input, output

    def __call__(self, x: Tensor) -> Tensor:
        return self.output if x is self.input else self.base(x)


class _Moved(Around):
    """A layer whose input is not led by the rows: the batch goes to where the module has it."""

    __slots__ = ("layout", "size")

    def __init__(self, base: Layer, layout: Layout, size: int):
        super().__init__(base)
        self.layout, self.size = layout, size

    def __call__(self, x: Tensor) -> Tensor:
        if self.layout.axis is None:
            return self.layout.to_rows(self.base(x[:1]), self.size)
        return self.layout.to_rows(self.base(self.layout.from_rows(x, self.size)), self.size)


def _varying(adapter: SiteAdapter) -> dict[str, PerAdapter]:
    return {name: c for name, c in adapter.site.constants.items() if isinstance(c, PerAdapter)}
