"""Sites that are bare parameters: a module that reads one gets the adapted weight, factored where its method can."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import saving
from .adapted import Cell
from .lazy import Factored, Term
from .method import Entry, Leaves
from .placement import is_sharded, spread, whole
from .routed import RoutedLayer
from .site import Site, check_leaves
from .unsupported import UnsupportedCall

Chosen = tuple[Entry, Leaves, Tensor | None]
"""An adapter's part at a site, its leaves, and whether it is there at all (`None` for yes)."""

Key = tuple[int, str]
"""What a site is in a model, whatever its names: a module's id and `""`, or the name of one of its parameters."""


def find(modules: Mapping[str, nn.Module], path: str) -> tuple[nn.Module | None, str]:
    """The module at a path and `""`, or a parameter's module and its name there.

    >>> model = nn.ModuleDict({"a": nn.Linear(2, 2)})
    >>> find(dict(model.named_modules()), "a.weight")[1]
    'weight'
    """
    if path in modules:
        return modules[path], ""
    owner, _, leaf = path.rpartition(".")
    module = modules.get(owner)
    return (module, leaf) if module is not None and module._parameters.get(leaf) is not None else (None, "")


def key_of(modules: Mapping[str, nn.Module], path: str) -> Key:
    """The same for all names of one site."""
    module, leaf = find(modules, path)
    return id(module), leaf


def describe_parameter(path: str, module: nn.Module, leaf: str) -> Site:
    """Describe a parameter as a site: a matrix `"out in"`, or a stack of them, `"experts out in"`.

    Experts are `"experts in out"` in a module that says `is_transposed`, as `transformers`' experts do.

    Args:
        path: Dotted name of the parameter in the user's model.
        module: The module that has it.
        leaf: Its name there.

    Raises:
        ValueError: A parameter of another number of axes, or one that is not of floating point.

    >>> layer = nn.Linear(3, 2)
    >>> describe_parameter("head.weight", layer, "weight").weight_shape
    (2, 3)
    """
    parameter: Any = module._parameters[leaf]
    shape = tuple(parameter.shape)
    if not (parameter.is_floating_point() or parameter.is_complex()):
        raise ValueError(
            f"{path}: the parameter has dtype {parameter.dtype}, expected floating point; a product cannot be added to "
            "it, so leave it out of target_parameters, or dequantise it first"
        )
    if len(shape) == 2:
        return Site(path, "parameter", shape[1], shape[0], weight_names=(leaf,))
    if len(shape) != 3:
        raise ValueError(
            f"{path}: the parameter has shape {shape}, expected 2 axes, or 3 of which the first counts experts; leave "
            "it out of target_parameters"
        )
    transposed = bool(getattr(module, "is_transposed", False))
    rows, columns = shape[1:]
    sizes = (rows, columns) if transposed else (columns, rows)
    return Site(path, "experts", *sizes, transposed=transposed, weight_names=(leaf,), experts=shape[0])


def check_apart(entries: Mapping[Key, Mapping[str, Entry]], paths: Mapping[Key, str]) -> None:
    """Refuse adapters on a module and on one of its parameters."""
    for key in entries:
        if key[1] and (key[0], "") in entries:
            raise ValueError(
                f"{paths[key]}: one adapter is on this parameter and another on its module as a whole; target the one "
                "or the other"
            )


@dataclasses.dataclass(eq=False)
class ParameterSocket:
    """Everything that an adapted parameter knows.

    Attributes:
        path: Its path in the user's model.
        leaf: Its name on its module.
        cell: What the call in progress says.
        entries: Adapter entries by name.
        grouped: Whether the code of its module's class names torch's grouped product.
    """

    path: str
    leaf: str
    cell: Cell
    entries: Mapping[str, Entry]
    grouped: bool = False

    def read(self, module: nn.Module) -> Any:
        """What the module's forward gets."""
        weight: Any = module._parameters.get(self.leaf)
        if weight is None:  # FSDP exchanges it for a part of a flat one
            weight = vars(module)[self.leaf]
        chosen = list(self._chosen(self.cell.active(self.path)))
        if self.cell.reached is not None:
            self.cell.reached.add(self.path)
        if not chosen:
            return weight
        if is_sharded(weight):
            adapted = adapted_weight(whole(weight), chosen, dense=True)
            return spread(adapted, weight.device_mesh, weight.placements)
        return adapted_weight(weight, chosen, torch.compiler.is_compiling() and self._hidden(module, weight))

    def _chosen(self, trees: Mapping[str, Any]) -> Iterator[Chosen]:
        for name, entry in self.entries.items():
            tree = trees.get(name)
            if type(tree) is dict:
                yield entry, entry.leaves(tree), None
            elif tree is not None:
                layer = tree.layer(None, entry, self.cell.finder)
                if isinstance(layer, RoutedLayer):
                    raise UnsupportedCall(no_rows(self.path))
                yield layer.entry, layer.leaves, layer.on

    def _hidden(self, module: nn.Module, weight: Tensor) -> bool:
        """Whether the forward may call torch's grouped product, which `torch.compile` hides from objects (torch 2.13).

        `transformers` chooses it by a setting, and compiles it for bfloat16 alone.
        """
        if weight.ndim != 3:
            return False
        if getattr(getattr(module, "config", None), "_experts_implementation", None) == "grouped_mm":
            return weight.dtype == torch.bfloat16
        return self.grouped


def no_rows(path: str) -> str:
    """Why an adapted parameter cannot be routed."""
    return (
        f"{path}: this parameter is adapted in a call that routes rows, and a parameter cannot tell whose row it is "
        "multiplied with (experts mix the rows of a batch); use torch.vmap over the stack, call the graft with one "
        "adapter at a time, or leave it out of target_parameters"
    )


def adapted_weight(weight: Tensor, chosen: Sequence[Chosen], dense: bool = False) -> Any:
    """A weight with adapters: factored where all their methods have factors, else multiplied out.

    Args:
        weight: As it is stored.
        chosen: The adapters, the innermost first.
        dense: Whether to multiply out in any case.
    """
    for entry, leaves, _ in chosen:
        check_leaves(entry.site.path, leaves, weight)
    if all(entry.config.method.factors is not None for entry, _, _ in chosen):
        factored = Factored(weight, [_term(*one) for one in chosen])
        return factored.dense() if dense else factored
    site = chosen[0][0].site
    wide: Tensor = site.canonical(weight)
    for entry, leaves, on in chosen:
        merged = entry.merge(leaves, wide, None)[0]
        wide = merged if on is None else torch.where(on, merged, wide)
    return site.canonical(wide).to(weight.dtype)


def _term(entry: Entry, leaves: Leaves, on: Tensor | None) -> Term:
    factors: Any = entry.config.method.factors
    up, down, scaling = factors(entry.config, entry.site, leaves)
    if on is not None:
        scaling = torch.where(on, scaling, 0.0)
    return Term(down.mT, up.mT, scaling) if entry.site.transposed else Term(up, down, scaling)


def names_grouped(cls: type) -> bool:
    """Whether the code of a class names torch's grouped product.

    >>> names_grouped(nn.Linear)
    False
    """
    codes = [getattr(getattr(value, "__func__", value), "__code__", None) for one in cls.__mro__ for value in _own(one)]
    return any(code is not None and {"grouped_mm", "_grouped_mm"} & set(code.co_names) for code in codes)


def _own(cls: type) -> list[Any]:
    return [] if cls in (nn.Module, object) else list(vars(cls).values())


class AdaptedParameters:
    """Mixed into the class of a module with adapted parameters: reading one gives the adapted weight."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[misc]
        for leaf, socket in self.__dict__["_parameter_sockets"].items():
            value = socket.read(self)
            dense = value.dense() if isinstance(value, Factored) else value
            saving.write(socket.path, destination, prefix, {leaf: dense}, keep_vars)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = dict(self.__dict__)
        sockets = state.pop("_parameter_sockets")
        return _revive, (type(self).__mro__[2], sockets), state

    def __deepcopy__(self, memo: dict[int, Any]) -> AdaptedParameters:
        revive, args, state = self.__reduce_ex__(4)
        new = memo[id(self)] = revive(*copy.deepcopy(args, memo))
        new.__dict__.update(copy.deepcopy(state, memo))
        return new

    def extra_repr(self) -> str:
        sockets: Mapping[str, ParameterSocket] = self.__dict__["_parameter_sockets"]
        described = super().extra_repr()  # type: ignore[misc]
        adapted = ", ".join(
            f"{leaf}: {', '.join(entry.config.method.name for entry in socket.entries.values())}"
            for leaf, socket in sockets.items()
        )
        return f"{described}, adapted=({adapted})" if described else f"adapted=({adapted})"


@functools.lru_cache(maxsize=256)
def parametrised_class(cls: Any, leaves: tuple[str, ...]) -> Any:
    """`cls` with properties in the place of these parameters."""
    members: dict[str, Any] = {leaf: _property(leaf) for leaf in leaves}
    if issubclass(cls, nn.RNNBase):
        members["_flat_weights"] = property(_flat_weights, _put_flat_weights)
    return type(
        cls.__name__, (AdaptedParameters, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__, **members}
    )


def _property(leaf: str) -> property:
    def read(self: Any) -> Any:
        return self.__dict__["_parameter_sockets"][leaf].read(self)

    def write(self: Any, value: Any) -> None:
        self._parameters[leaf] = value

    return property(read, write)


def _flat_weights(self: Any) -> list[Tensor | None]:
    """The list that torch's kernels for recurrent layers get, with the adapted weights multiplied out."""
    found = list(self.__dict__["_flat_weights"])
    for index, name in enumerate(self.__dict__["_flat_weights_names"]):
        if name in self.__dict__["_parameter_sockets"]:
            weight = self.__dict__["_parameter_sockets"][name].read(self)
            found[index] = weight.dense() if isinstance(weight, Factored) else weight
    return found


def _put_flat_weights(self: Any, value: list[Tensor | None]) -> None:
    self.__dict__["_flat_weights"] = value


def adapt_parameters(shell: nn.Module, cls: Any, sockets: Mapping[str, ParameterSocket]) -> None:
    """Turn a bare copy of a module into one with adapted parameters, in place; its `__dict__` stays.

    Args:
        shell: The copy.
        cls: Class of the user's module.
        sockets: By the parameter's name.
    """
    shell.__class__ = parametrised_class(cls, tuple(sockets))
    shell.__dict__["_parameter_sockets"] = dict(sockets)


def _revive(cls: Any, sockets: Mapping[str, ParameterSocket]) -> nn.Module:
    """A module with adapted parameters and without a state yet, for copies and pickles."""
    shell = object.__new__(cls)
    adapt_parameters(shell, cls, sockets)
    return shell
