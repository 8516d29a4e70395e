"""Embeddings of which adapters train the rows of some tokens: PEFT's `trainable_token_indices`, in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.functional.extending import (
    Tree,
    child_of_wrapper,
    resting,
    unwrapped,
    whole,
)

from ..._config.keys import replaced_key
from ..._config.tokens import LEAF
from ..placed import Layout, Owners, Slot, own_modules, refuse_tied
from ..switched import Switched
from ..tensors.originals import Originals
from .token_rows import TrainableTokensLayer

DELTA = "token_adapter.trainable_tokens_delta"
"""Where a wrapper has the rows."""


class TrainableTokensWrapper(Switched, nn.Module):
    """What stands in the place of an embedding of which adapters train rows, or of a module that is tied to one.

    Attributes:
        token_adapter: The module and the rows.
        path: Name of the module in the model, for messages.
        merged_adapters: Names of the adapters whose rows are part of the module's weight now.
    """

    def __init__(self, module: nn.Module, path: str = ""):
        super().__init__()
        self.token_adapter = TrainableTokensLayer(module)
        self.path = path
        self.merged_adapters: list[str] = []
        self._originals = Originals()
        self.training = module.training
        self._sources: dict[str, list[TrainableTokensWrapper]] = {}  # in a list, which keeps it out of the module tree
        self._active: list[str] = []
        self._disabled = False

    def add(self, name: str, indices: Iterable[int], given: Tensor | None = None) -> None:
        """Take rows of the base's as an adapter's, or `given` ones; they are not active yet."""
        layer = self.token_adapter
        weight: Tensor = whole(resting(layer.base_layer, "weight")).detach()
        layer.token_indices[name] = list(indices)
        rows = (
            weight[torch.tensor(layer.token_indices[name], device=weight.device)] if given is None else given.detach()
        )
        layer.trainable_tokens_delta[name] = nn.Parameter(rows.to(weight.device))

    def follow(self, name: str, source: TrainableTokensWrapper) -> None:
        """Have the rows that another module has for an adapter, which is tied to this one."""
        self._sources[name] = [source]

    @property
    def carried_adapters(self) -> list[str]:
        """Names of the adapters that have rows here."""
        return [*self.token_adapter.trainable_tokens_delta, *self._sources]

    is_layer = False
    adapter_layer_names = (DELTA,)
    other_param_names = ("token_adapter.token_indices",)

    def _get_available_adapters(self) -> set[str]:
        return set(self.carried_adapters)

    @property
    def _adapters(self) -> set[str]:
        return set(self.carried_adapters)

    @property
    def original_module(self) -> Any:
        """The user's module."""
        return self.token_adapter.base_layer

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Return the name in this wrapper of an adapter's rows, by its name in files; a tied module has none."""
        if adapter_name not in self.token_adapter.trainable_tokens_delta:
            return {}
        return {DELTA: f"{DELTA}.{adapter_name}"}

    def adapter_state_dict(self, adapter_name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return an adapter's rows by their name in files, from the state dict of this wrapper."""
        return {name: state_dict[key] for name, key in self.adapter_state_dict_load_map(adapter_name).items()}

    def rows(self, name: str) -> tuple[Tensor, list[int]]:
        """Return an adapter's rows and their indices."""
        if name in self._sources:
            return self._sources[name][0].rows(name)
        return self.token_adapter.rows(name)

    def freeze_others(self, names: list[str]) -> None:
        """Freeze the rows of adapters other than these."""
        for name, delta in self.token_adapter.trainable_tokens_delta.items():
            if name not in names:
                delta.requires_grad_(False)

    def activate(self, names: Iterable[str], trained: bool) -> None:
        """Use the rows of these adapters, trainable or not; others stay as frozen as they are."""
        self._active = [name for name in names if name in self.carried_adapters]
        self.set_requires_grad(self._active, trained)

    def check_active(self, names: Iterable[str]) -> None:
        """Refuse adapters that have rows for the same token."""
        for first, second, index in self._overlaps(names):
            raise ValueError(
                f"adapters {first!r} and {second!r} both train token {index} (trainable_token_indices), so only one of "
                "them can be active; set one"
            )

    def check_merge(self, names: Iterable[str]) -> None:
        """Refuse adapters that have other numbers for the same token."""
        for first, second, index in self._overlaps(names):
            one, two = (rows[indices.index(index)] for rows, indices in map(self.rows, (first, second)))
            if not torch.equal(one, two.to(one)):
                raise ValueError(
                    f"{self.path}: adapters {first!r} and {second!r} have other numbers for token {index} "
                    "(trainable_token_indices), so only one of them can be merged; name one in adapter_names"
                )

    def _overlaps(self, names: Iterable[str]) -> Iterator[tuple[str, str, int]]:
        """Yield pairs of these adapters that have rows for one token, and the token."""
        owners: dict[int, str] = {}
        for name in [name for name in names if name in self.carried_adapters]:
            for index in self.rows(name)[1]:
                if owners.setdefault(index, name) != name:
                    yield owners[index], name, index

    def enable_adapters(self, enabled: bool) -> None:
        """Use the active adapters' rows, or none."""
        self._disabled = not enabled
        self.set_requires_grad(self._active if enabled else self.carried_adapters, enabled)

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """Freeze or unfreeze the rows of these adapters."""
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        for name, delta in self.token_adapter.trainable_tokens_delta.items():
            if name in names:
                delta.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Drop an adapter's rows."""
        if adapter_name in self.token_adapter.trainable_tokens_delta:
            del self.token_adapter.trainable_tokens_delta[adapter_name]
            del self.token_adapter.token_indices[adapter_name]
        self._sources.pop(adapter_name, None)
        self._active = [name for name in self._active if name != adapter_name]

    def widen_adapter(self, adapter_name: str) -> None:
        """Give an adapter's rows float32 where they have a lower precision."""
        rows = self.token_adapter.trainable_tokens_delta
        if adapter_name in rows and rows[adapter_name].itemsize < 4:
            old = rows[adapter_name]
            rows[adapter_name] = nn.Parameter(old.detach().float(), old.requires_grad)

    def own_modules(self) -> Iterable[nn.Module]:
        """Return this wrapper and its rows."""
        return own_modules(self)

    def recall_adapters(self, active: list[str]) -> None:
        """Do nothing: which rows are used is read in each call."""

    @property
    def user_module(self) -> Any:
        """The user's module, without what torch has wrapped around it and its rows."""
        return unwrapped(unwrapped(self.token_adapter).base_layer)

    def under_names(self, name: str) -> Iterable[tuple[str, TrainableTokensWrapper]]:
        """Return this wrapper, under the name of the user's module."""
        return [(name, self)]

    def copied_module(self, adapter_name: str) -> nn.Module:
        """Return the user's module."""
        result: nn.Module = self.token_adapter.base_layer
        return result

    def without_adapters(self) -> nn.Module:
        """Return the user's module, within what torch has wrapped around it and its rows."""
        held: Any = self._modules["token_adapter"]
        inner = child_of_wrapper(held)
        if inner is None:
            result: nn.Module = held.base_layer
            return result
        held._modules[inner] = unwrapped(held).base_layer
        result = held
        return result

    @property
    def weight(self) -> Tensor:
        """The weight with the active rows in it."""
        return self.token_adapter.weight_with(self.rows(name) for name in self._running)

    @property
    def _running(self) -> list[str]:
        """The active adapters that are not merged."""
        return [] if self._disabled else [name for name in self._active if name not in self.merged_adapters]

    def unmerged_tensors(self, path: str) -> Mapping[str, Tensor]:
        """Return the weight as it is without merged rows, if any are merged."""
        return {f"{path}.{leaf}": tensor for leaf, tensor in self._beneath().items()}

    def _beneath(self) -> Mapping[str, Tensor]:
        sources = (self._sources[name][0] for name in self.merged_adapters if self._is_shared(name))
        return next((source._beneath() for source in sources), self._originals.tensors)

    def tensors_of(self, adapter_name: str) -> Iterable[Tensor]:
        """Return an adapter's rows, if they are this module's own."""
        rows = self.token_adapter.trainable_tokens_delta
        return [rows[adapter_name]] if adapter_name in rows else []

    def adapter_tree(self, path: str, layout: Layout) -> Tree:
        """Return the adapter's rows."""
        tree: Tree = {}
        for rows in self.tensors_of(layout.adapter):
            tree[path] = {LEAF: whole(rows)}
        return tree

    def adapter_slots(self, path: str, layout: Layout) -> dict[str, Slot]:
        """Return the adapter's rows."""
        slots = {}
        for rows in self.tensors_of(layout.adapter):
            key = replaced_key(path, LEAF)
            slots[key] = Slot(f"{key}.{layout.adapter}", rows)
        return slots

    def merged_with(self, names: Iterable[str] | None) -> list[str]:
        """Return what is merged together with these adapters, by default with the active ones."""
        return list(dict.fromkeys((*self.merged_adapters, *(self._active if names is None else names))))

    def check_tied(self, path: str, names: Iterable[str], owners: Owners, placed: Mapping[int, Any]) -> None:
        """Refuse to change rows of a weight that another module uses too without having the same rows."""
        for name in [name for name in names if name in self.carried_adapters]:
            rows = self.rows(name)[0]
            tied = owners.others(self.user_module, "weight")
            refuse_tied(
                self.path,
                "weight",
                "rows",
                [where for key, where in tied.items() if not _has_rows(placed.get(key), name, rows)],
            )

    def merge_adapters(self, names: Iterable[str] | None, safe: bool) -> None:
        """Merge the rows of these adapters too."""
        self.remerge(self.merged_with(names), safe)

    def _is_shared(self, name: str) -> bool:
        """Return whether an adapter's rows are merged where another module has them, into the same parameter."""
        source = self._sources.get(name)
        return source is not None and source[0].token_adapter.base_layer.weight is self.token_adapter.base_layer.weight

    def remerge(self, names: Iterable[str], safe: bool = False) -> None:
        """Have just the rows of these adapters in the base's weight.

        Raises:
            ValueError: Rows that are not finite where `safe`.
            RuntimeError: Something else wrote to the weight while rows were merged.
        """
        names = [name for name in names if name in self.carried_adapters]
        base, own = self.token_adapter.base_layer, [name for name in names if not self._is_shared(name)]
        if self._originals.tensors:
            self._originals.restore(base, self.path)
        self.merged_adapters = []
        if own:
            with torch.no_grad():
                weight = self.token_adapter.weight_with(self.rows(name) for name in own)
            self._originals.put(base, self.path, {"weight": weight}, names, safe)
        self.merged_adapters = names

    def unmerge(self, adapter_names: Iterable[str] | None = None) -> None:
        """Take merged rows, by default all, out of the base's weight again, bit for bit."""
        names = self.merged_adapters if adapter_names is None else list(adapter_names)
        if set(names) & set(self.merged_adapters):
            self.remerge([name for name in self.merged_adapters if name not in names])

    def check_unwritten(self) -> None:
        """Make sure that nothing else wrote to the weight while rows were merged.

        Raises:
            RuntimeError: Something did.
        """
        self._originals.check_unwritten(self.token_adapter.base_layer, self.path)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TrainableTokensWrapper:
        move = super()._apply
        self._originals.apply(self.token_adapter.base_layer, fn, lambda: move(fn, recurse))  # type: ignore[no-untyped-call,unused-ignore]
        return self

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the user's module with the active rows."""
        names = self._running
        others = [self.rows(name) for name in names if name in self._sources]
        own = [name for name in names if name not in self._sources]
        return self.token_adapter(own, others, x, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """What the user's module has, or the rows beside it."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "token_adapter" not in self.__dict__.get("_modules", {}):
                raise
        layer = self.token_adapter
        return getattr(layer if name in ("token_indices", "trainable_tokens_delta") else layer.base_layer, name)


def _has_rows(placed: Any, name: str, rows: Tensor) -> bool:
    """Return whether what adapters have around a module are these very rows."""
    has_rows = isinstance(placed, TrainableTokensWrapper) and name in placed.carried_adapters
    return has_rows and placed.rows(name)[0] is rows
