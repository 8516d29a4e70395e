"""Sites that are bare parameters: a module that reads one gets the adapted weight, factored where its method can."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._abilities import AddsProduct, Leaves
from .._layers.compose import compose
from .._layers.routed import RoutedLayer
from .._method import SiteAdapter
from .._sites.factored import Factored, Term
from .._sites.parameters import HIDES_PRODUCT, Key
from .._sites.tensors import check_leaves
from .._tensors.placement import is_sharded, spread, whole
from .._unsupported import UnsupportedCall
from . import saving
from .context import CallContext
from .entries import Entries
from .row_groups import run_in_groups
from .row_outputs import cannot_route
from .row_weights import RowTerm, RowWeight

Selected = tuple[SiteAdapter, Leaves, Tensor | None]
"""An adapter's part at a site, its leaves, and whether it is there at all (`None` for yes)."""


def check_apart(adapters: Mapping[Key, Mapping[str, SiteAdapter]], paths: Mapping[Key, str]) -> None:
    """Refuse adapters on a module and on one of its parameters."""
    for key in adapters:
        if key[1] and (key[0], "") in adapters:
            raise ValueError(
                f"{paths[key]}: one adapter is on this parameter and another on its module as a whole; target the one "
                "or the other"
            )


@dataclasses.dataclass(eq=False)
class ParameterRuntime:
    """The facts that an adapted parameter has in a skeleton.

    Attributes:
        path: Its path in the user's model.
        leaf: Its name on its module.
        context: What the call in progress says.
        entries: Adapters by name, the innermost first.
        grouped: Whether the code of its module's class names torch's grouped product.
        followed: Whether each entry was followed through its module so far, see `followed.run_followed`.
    """

    path: str
    leaf: str
    context: CallContext
    entries: Mapping[str, SiteAdapter]
    grouped: bool = False
    followed: bool = True

    def read(self, module: nn.Module) -> Any:
        """Return the adapted weight that the module's forward gets."""
        weight: Any = module._parameters.get(self.leaf)
        if weight is None:  # FSDP exchanges it for a part of a flat one
            weight = vars(module)[self.leaf]
        if self.context.reached is not None:
            self.context.reached.add(self.path)
        if self.context.weights is not None and self.path in self.context.weights:
            return self.context.weights[self.path]
        chosen = self._selected()
        if not chosen:
            return weight
        if is_sharded(weight):
            adapted = adapted_weight(whole(weight), chosen, dense=True)
            return spread(adapted, weight.device_mesh, weight.placements)
        return adapted_weight(weight, chosen, torch.compiler.is_compiling() and self._hidden(module, weight))

    def by_rows(self, module: nn.Module, size: int, entries: Entries) -> Any:
        """Return the adapted weight where each of `size` rows has its own; `None` where there is no way to.

        Args:
            module: The parameter's module.
            size: Number of rows.
            entries: Knows whose the entries of tensors are.
        """
        weight, adapters = module._parameters.get(self.leaf), list(self.entries.values())
        by_entry = all(a.site.routing.by_entry and a.config.method.ability(AddsProduct) is not None for a in adapters)
        if weight is None or is_sharded(weight) or not by_entry:
            return None
        layers: list[RoutedLayer] = []
        chosen = self._selected(layers)
        shared = adapted_weight(weight, chosen) if chosen else weight
        for layer in layers:
            check_leaves(self.path, layer.leaves, weight)
        return RowWeight(shared, [_row_term(layer, size) for layer in layers], entries) if layers else shared

    def _selected(self, by_row: list[RoutedLayer] | None = None) -> list[Selected]:
        """Return the adapters that are active, the innermost first; those of rows go to a list of their own."""
        layer = compose(None, self.entries, self.context.active(self.path), self.context.finder)
        selected: list[Selected] = []
        while layer is not None:
            if isinstance(layer, RoutedLayer):
                if layer.rows.size > 1 and by_row is not None:
                    by_row.append(layer)
                    layer = layer.base
                    continue
                if layer.rows.size > 1:
                    raise UnsupportedCall(cannot_route(self.path, "is read outside of the forward of its module"))
                if layer.rows.values != [-1]:
                    selected.append(layer.single())
            else:
                selected.append((layer.entry, layer.leaves, getattr(layer, "on", None)))
            layer = layer.base
        return selected[::-1]

    def _hidden(self, module: nn.Module, weight: Tensor) -> bool:
        """Return whether the forward may call the grouped product that `torch.compile` hides from objects."""
        if weight.ndim != 3:
            return False
        for rule in HIDES_PRODUCT:
            if (hides := rule(module, weight)) is not None:
                return hides
        return self.grouped


def adapted_weight(weight: Tensor, chosen: Sequence[Selected], dense: bool = False) -> Any:
    """Return a weight with adapters: factored where all their methods have factors, else multiplied out.

    Args:
        weight: As it is stored.
        chosen: The adapters, the innermost first.
        dense: Whether to multiply out in any case.
    """
    for adapter, leaves, _ in chosen:
        check_leaves(adapter.site.path, leaves, weight)
        adapter.check(leaves)
    if all(adapter.config.method.ability(AddsProduct) is not None for adapter, _, _ in chosen):
        factored = Factored(weight, [_term(*selected) for selected in chosen])
        return factored.dense() if dense else factored
    site = chosen[0][0].site
    wide: Tensor = site.canonical(weight)
    for adapter, leaves, on in chosen:
        merged = adapter.merge(leaves, wide, None)[0]
        wide = merged if on is None else torch.where(on, merged, wide)
    return site.canonical(wide).to(weight.dtype)


def _term(adapter: SiteAdapter, leaves: Leaves, on: Tensor | None) -> Term:
    ability = adapter.config.method.ability(AddsProduct)
    assert ability is not None
    up, down, scaling = ability.factors(adapter.config, adapter.site, leaves)
    if on is not None:
        scaling = torch.where(on, scaling, 0.0)
    return Term(down.mT, up.mT, scaling) if adapter.site.transposed else Term(up, down, scaling)


def _row_term(layer: RoutedLayer, size: int) -> RowTerm:
    """Return the products of all adapters of a stack; scalings that differ between them are multiplied in."""
    factor: list[float] = []

    def product(adapter: SiteAdapter, leaves: Leaves) -> tuple[Tensor, Tensor]:
        left, right, scaling = _term(adapter, leaves, None)
        if isinstance(scaling, Tensor):
            return left * scaling, right
        factor.append(scaling)
        return left, right

    rows = layer.rows
    left, right = layer.each(product)
    index = torch.arange(rows.count, device=left.device) if rows.index is None else rows.index
    base = any(adapter < 0 for adapter in rows.values or ())
    return RowTerm(left, right, factor[0] if factor else 1.0, index.repeat_interleave(size // rows.size), base)


def names_grouped(cls: type) -> bool:
    """Return whether the code of a class names torch's grouped product.

    >>> names_grouped(nn.Linear)
    False
    """
    codes = [
        getattr(getattr(value, "__func__", value), "__code__", None) for base in cls.__mro__ for value in _own(base)
    ]
    return any(code is not None and {"grouped_mm", "_grouped_mm"} & set(code.co_names) for code in codes)


def _own(cls: type) -> list[Any]:
    return [] if cls in (nn.Module, object) else list(vars(cls).values())


class AdaptedParameters:
    """A base class of modules with adapted parameters: reading one gives the adapted weight."""

    def in_groups(self, forward: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a forward of this module, group by group where rows have parameters of their own."""
        runtimes: Mapping[str, ParameterRuntime] = self.__dict__["_parameter_runtimes"]
        return run_in_groups(runtimes.values(), forward, args, kwargs)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        for leaf, runtime in self.__dict__["_parameter_runtimes"].items():
            value = runtime.read(self)
            dense = value.dense() if isinstance(value, Factored) else value
            saving.write(runtime.path, destination, prefix, {leaf: dense}, keep_vars)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = dict(self.__dict__)
        runtimes = state.pop("_parameter_runtimes")
        classes = type(self).__mro__  # others may stand in front
        return _revive, (classes[classes.index(AdaptedParameters) + 1], runtimes), state

    def __deepcopy__(self, memo: dict[int, Any]) -> AdaptedParameters:
        revive, args, state = self.__reduce_ex__(4)
        new = memo[id(self)] = revive(*copy.deepcopy(args, memo))
        new.__dict__.update(copy.deepcopy(state, memo))
        result: AdaptedParameters = new
        return result

    def extra_repr(self) -> str:
        runtimes: Mapping[str, ParameterRuntime] = self.__dict__["_parameter_runtimes"]
        described = super().extra_repr()  # type: ignore[misc]
        adapted = ", ".join(
            f"{leaf}: {', '.join(adapter.config.method.name for adapter in runtime.entries.values())}"
            for leaf, runtime in runtimes.items()
        )
        return f"{described}, adapted=({adapted})" if described else f"adapted=({adapted})"


@functools.lru_cache(maxsize=256)
def parametrised_class(cls: Any, leaves: tuple[str, ...]) -> Any:
    """Return `cls` with properties in the place of these parameters."""
    members: dict[str, Any] = {leaf: _property(leaf) for leaf in leaves}
    members["forward"] = _by_rows(cls.forward)
    if issubclass(cls, nn.RNNBase):
        members["_flat_weights"] = property(_flat_weights, _put_flat_weights)
    return type(
        cls.__name__, (AdaptedParameters, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__, **members}
    )


def _by_rows(inherited: Any) -> Any:
    """Return a forward that keeps rows with parameters of their own apart, with the signature of the inherited one."""

    @functools.wraps(inherited)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.in_groups(super(AdaptedParameters, self).forward, args, kwargs)

    return forward


def _property(leaf: str) -> property:
    def read(self: Any) -> Any:
        return self.__dict__["_parameter_runtimes"][leaf].read(self)

    def write(self: Any, value: Any) -> None:
        self._parameters[leaf] = value

    return property(read, write)


def _flat_weights(self: Any) -> list[Tensor | None]:
    """Return the list that torch's kernels for recurrent layers get, with the adapted weights multiplied out."""
    weights = list(self.__dict__["_flat_weights"])
    for index, name in enumerate(self.__dict__["_flat_weights_names"]):
        if name in self.__dict__["_parameter_runtimes"]:
            weight = self.__dict__["_parameter_runtimes"][name].read(self)
            weights[index] = weight.dense() if isinstance(weight, Factored) else weight
    return weights


def _put_flat_weights(self: Any, value: list[Tensor | None]) -> None:
    self.__dict__["_flat_weights"] = value


def adapt_parameters(shell: nn.Module, cls: Any, runtimes: Mapping[str, ParameterRuntime]) -> None:
    """Turn a bare copy of a module into one with adapted parameters, in place; its `__dict__` stays.

    Args:
        shell: The copy.
        cls: Class of the user's module.
        runtimes: By the parameter's name.
    """
    shell.__class__ = parametrised_class(cls, tuple(runtimes))
    shell.__dict__["_parameter_runtimes"] = dict(runtimes)


def _revive(cls: Any, runtimes: Mapping[str, ParameterRuntime]) -> nn.Module:
    """Make a module with adapted parameters and without a state yet, for copies and pickles."""
    shell = object.__new__(cls)
    adapt_parameters(shell, cls, runtimes)
    result: nn.Module = shell
    return result
