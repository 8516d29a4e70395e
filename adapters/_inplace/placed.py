"""What adapters have in a user's model, and what can be done with each such thing.

There are four kinds: layers around adapted modules, wrappers of `modules_to_save`, wrappers of embeddings of which
rows are trained, and biases of the base that are trained where they are. The first three stand in the module tree, in
the place of a module of the user's. Switching, merging, states and summaries are walks that call these verbs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from torchgraft.functional.extending import Tree

from .._config.base import AdapterConfig


class Slot(NamedTuple):
    """A tensor of an adapter in a model.

    Attributes:
        key: Its key in the model.
        tensor: The tensor.
        put: `(value) -> None` loads another value; `None` where it is the tensor under that key that has to change.
    """

    key: str
    tensor: Tensor
    put: Callable[[Tensor], None] | None = None


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the keys of an adapter's tensors depend on, in files and in the model.

    Attributes:
        adapter: The adapter's name.
        config: Its config.
        carriers: Names of all modules and parameters of the model that carry adapters.
        places: Where files have each of those that carry this adapter, by name.
        unmerged: Tensors of the base as they are without what is merged, by name; those that merging changed.
    """

    adapter: str
    config: AdapterConfig
    carriers: Collection[str]
    places: Mapping[str, str]
    unmerged: Mapping[str, Tensor]


class Owners:
    """The modules of a model without adapters that have each parameter."""

    def __init__(self, modules: Mapping[str, nn.Module]):
        self._names: dict[int, dict[int, str]] = {}
        for name, module in modules.items():
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    self._names.setdefault(id(parameter), {})[id(module)] = f"{name}.{leaf}"

    def others(self, module: nn.Module, leaf: str) -> dict[int, str]:
        """Return the other modules that have a module's parameter, by identity, with the parameter's name there."""
        found = self._names.get(id(module._parameters.get(leaf)), {})
        return {key: name for key, name in found.items() if key != id(module)}


def refuse_tied(path: str, leaf: str, what: str, others: Iterable[str]) -> None:
    """Refuse to change a tensor that others would have changed too.

    Raises:
        ValueError: There are others.
    """
    for other in others:
        raise ValueError(
            f"{path}: its {leaf} is tied to {other}, which would change with it; untie the two, or leave the "
            f"{what} unmerged"
        )


class Placed(Protocol):
    """Something that adapters have in a model.

    Attributes:
        merged_adapters: Names of the adapters that are merged into the base here.
        is_layer: Whether it is a layer, which merges what others have put in their places before.
    """

    merged_adapters: list[str]

    @property
    def is_layer(self) -> bool: ...

    @property
    def carried_adapters(self) -> Collection[str]:
        """Names of the adapters that have something here, in the order they were added."""

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""

    @property
    def disable_adapters(self) -> bool:
        """Whether adapters are switched off here."""

    # -- which run -----------------------------------------------------------------------------------------------

    def check_active(self, names: Iterable[str]) -> None:
        """Refuse adapters that cannot be active together."""

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make these the active adapters, trained unless `inference_mode`; freeze all others."""

    def activate(self, names: Iterable[str], trained: bool) -> None:
        """Make these the active adapters, trained or not; others stay as frozen as they are."""

    def enable_adapters(self, enabled: bool) -> None:
        """Switch adapters on or off."""

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """Freeze or unfreeze what these adapters have here."""

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop what an adapter has here."""

    def widen_adapter(self, adapter_name: str) -> None:
        """Give an adapter's parameters float32 where they have a lower precision."""

    def own_modules(self) -> Iterable[nn.Module]:
        """Return this, and what it has beside the user's module, as far as these are modules."""

    def recall_adapters(self, active: list[str]) -> None:
        """Follow attributes that were restored, with these adapters active."""

    # -- merging -------------------------------------------------------------------------------------------------

    def merged_with(self, names: Iterable[str] | None) -> list[str]:
        """Return what is merged here together with these adapters, by default with the active ones."""

    def check_merge(self, names: Iterable[str]) -> None:
        """Refuse adapters that cannot be merged together."""

    def check_tied(self, path: str, names: Iterable[str], owners: Owners, placed: Mapping[int, Any]) -> None:
        """Refuse to merge these adapters where a module without them would change too.

        Args:
            path: Where this is in the model.
            names: The adapters that are merged then.
            owners: Which modules have a parameter.
            placed: What adapters have around each of the user's modules, by identity.
        """

    def merge_adapters(self, names: Iterable[str] | None, safe: bool) -> None:
        """Merge these adapters, by default the active ones, beside those that are merged."""

    def remerge(self, names: Iterable[str]) -> None:
        """Have just these adapters merged."""

    def unmerge(self, adapter_names: list[str] | None = None) -> None:
        """Take merged adapters, by default all, out again."""

    def check_unwritten(self) -> None:
        """Refuse to go on where something else wrote to what is merged."""

    # -- tensors -------------------------------------------------------------------------------------------------

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters of all adapters here, and the user's that are in their places."""

    def tensors_of(self, adapter_name: str) -> Iterable[Tensor]:
        """Return what an adapter has here; layers that share a tensor each have it."""

    def unmerged_tensors(self, path: str) -> Mapping[str, Tensor]:
        """Return tensors of the base as they are without what is merged here, by name; those that merging changed."""

    def adapter_tree(self, path: str, layout: Layout) -> Tree:
        """Return the part of an adapter's parameter tree that is here: the parameters themselves, if they are whole."""

    def adapter_slots(self, path: str, layout: Layout) -> Mapping[str, Slot]:
        """Return an adapter's tensors here, by their keys in files."""


class PlacedModule(Placed, Protocol):
    """Something that stands in the place of a module of the user's."""

    @property
    def user_module(self) -> Any:
        """The user's module, without what torch has wrapped around it."""

    def under_names(self, name: str) -> Iterable[tuple[str, PlacedModule]]:
        """Return what is around the user's module of this name, each under the name that it goes by."""

    def copied_module(self, adapter_name: str) -> nn.Module:
        """Return the module that runs without adapters, but with an adapter's own copy of it."""

    def without_adapters(self) -> nn.Module:
        """Return the module that takes this one's place when adapters are removed and merged ones stay."""


def own_modules(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module of ours, and what it has beside the user's module."""
    yield module
    for name, child in module._modules.items():
        if child is not None and name not in ("base_layer", "original_module"):
            yield from own_modules(child)
