"""Biases of the base that an adapter trains where they are: PEFT's `bias="all"` and `"lora_only"`."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.functional.extending import Tree, offloading, whole, write

from ..._config.keys import held_at, replaced_key
from ..placed import Layout, Owners, Slot
from ..switched import Switched
from ..tensors.gathering import fill, put

ATTRIBUTE = "_trained_biases"
"""Where a model keeps them, outside of its module tree."""


class Biases(Switched):
    """The base's biases as one adapter has them. Only one adapter of a model can have any.

    The parameters stay the base's own objects, under their names, as in PEFT. What is different from PEFT: the base's
    numbers are kept, and are there again while the adapter is not active, is disabled, or is gone.

    Attributes:
        adapter: Name of the adapter.
        modules: The modules whose biases they are, by path.
        merged_adapters: The adapter's name while it is merged: its biases are in their places then, also if another
            adapter is the active one.
    """

    def __init__(self, adapter: str, modules: Mapping[str, nn.Module], given: Mapping[str, Tensor]):
        self.adapter = adapter
        self.modules = dict(modules)
        self._away: dict[str, Tensor] = {}
        for path, parameter in self.named_parameters():
            if next(offloading(self.modules[path]), None) is not None:
                raise ValueError(
                    f"{path}: its bias is offloaded by a hook of accelerate, which loads a new one for each call, so "
                    "none can be trained where it is; set bias='none', or keep this module in memory"
                )
            value = given.get(path)
            like = parameter.detach()
            self._away[path] = like.clone() if value is None else value.detach().to(like.device, like.dtype)
        self._in = False
        self.merged_adapters: list[str] = []
        self._active: list[str] = []
        self._disabled = False

    is_layer = False

    @property
    def carried_adapters(self) -> list[str]:
        """The adapter."""
        return [self.adapter]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the base's parameters by path of their module."""
        for path, module in self.modules.items():
            bias = module._parameters.get("bias")
            if bias is None:
                raise ValueError(
                    f"{path}: its bias, which adapter {self.adapter!r} trains, is no parameter of its own now; wrap "
                    "the model with FullyShardedDataParallel(..., use_orig_params=True), or use fully_shard"
                )
            yield path, bias

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the base's parameters."""
        return (parameter for _, parameter in self.named_parameters())

    def tensors(self) -> dict[str, Tensor]:
        """The adapter's biases by path, wherever they are now: parameters of the base while the adapter is active."""
        return {path: parameter if self._in else self._away[path] for path, parameter in self.named_parameters()}

    def originals(self) -> dict[str, Tensor]:
        """Return the base's own biases by path."""
        return {
            path: self._away[path] if self._in else parameter.detach() for path, parameter in self.named_parameters()
        }

    @property
    def in_place(self) -> bool:
        """Whether the adapter's biases are in their places, and the base's own kept elsewhere."""
        return self._in

    def activate(self, names: Iterable[str], trained: bool) -> None:
        """Have the adapter's biases in their places if it is among these, trainable or not."""
        self._active = list(names)
        self._swap()
        self.set_requires_grad(self._active, trained)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapter on or off."""
        self._disabled = not enabled
        self._swap()
        self.set_requires_grad(self._active, enabled)

    def set_requires_grad(self, adapter_names: str | Iterable[str], requires_grad: bool = True) -> None:
        """Freeze or unfreeze the biases, if the adapter is among these and they are in their places."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if self._in and self.adapter in names:
            for parameter in self.parameters():
                parameter.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Put the base's own biases back for good, if this is the adapter."""
        if adapter_name == self.adapter:
            self.activate([], False)
            self.modules = {}

    def widen_adapter(self, adapter_name: str) -> None:
        """Do nothing: the biases have the base's dtype."""

    def own_modules(self) -> Iterable[nn.Module]:
        """None."""
        return ()

    def recall_adapters(self, active: list[str]) -> None:
        """Have the biases of these active adapters in their places again."""
        self.activate(active, False)

    def merged_with(self, names: Iterable[str] | None) -> list[str]:
        """Return what is merged together with these adapters, by default with the active ones."""
        return list(dict.fromkeys((*self.merged_adapters, *(self._active if names is None else names))))

    def check_merge(self, names: Iterable[str]) -> None:
        """Do nothing: only one adapter has biases."""

    def check_tied(self, path: str, names: Iterable[str], owners: Owners, placed: Mapping[int, Any]) -> None:
        """Do nothing: the trained biases are in the base layer itself."""

    def merge_adapters(self, names: Iterable[str] | None, safe: bool) -> None:
        """Count the adapter as merged if it is among these."""
        self.remerge(self.merged_with(names), safe)

    def remerge(self, names: Iterable[str], safe: bool = False) -> None:
        """Count the adapter as merged if it is among these.

        Raises:
            ValueError: Biases that are not finite where `safe`.
        """
        names = [name for name in names if name == self.adapter]
        for path, value in self.tensors().items() if safe and names else ():
            if not torch.isfinite(whole(value)).all():
                raise ValueError(f"{path}: bias with {names} merged has values that are not finite")
        self.merged_adapters = names
        self._swap()

    def unmerge(self, adapter_names: Iterable[str] | None = None) -> None:
        """Count the adapter as merged no longer, if it is among these."""
        if adapter_names is None or self.adapter in adapter_names:
            self.remerge([])

    def check_unwritten(self) -> None:
        """Do nothing: the base's own biases are kept."""

    def tensors_of(self, adapter_name: str) -> Iterable[Tensor]:
        """Return the adapter's biases, if this is the adapter."""
        return self.tensors().values() if adapter_name == self.adapter else ()

    def unmerged_tensors(self, path: str) -> Mapping[str, Tensor]:
        """None: the base's own are not what is beneath a merge, but beneath the adapter's, see `originals`."""
        return {}

    def unmerged(self, layout: Layout) -> dict[str, Tensor]:
        """Return the adapter's biases by path, also where layers have merged them into their modules."""
        if layout.adapter != self.adapter:
            return {}
        beneath = layout.unmerged if self._in else {}
        return {path: beneath.get(f"{path}.bias", tensor) for path, tensor in self.tensors().items()}

    def adapter_tree(self, path: str, layout: Layout) -> Tree:
        """Return the adapter's biases."""
        return {path: {"bias": whole(bias)} for path, bias in self.unmerged(layout).items()}

    def adapter_slots(self, path: str, layout: Layout) -> dict[str, Slot]:
        """Return the adapter's biases, under the names of the base's."""
        found = {}
        for path, bias in self.unmerged(layout).items():
            key = replaced_key(held_at(path, layout.carriers), "bias", path in layout.carriers)
            name = replaced_key(held_at(path, layout.places), "bias", path in layout.places)
            found[name] = Slot(key, bias, functools.partial(self.put, path))
        return found

    def put(self, path: str, value: Tensor) -> None:
        """Load another value into one of the biases."""
        tensor = self.tensors()[path]
        if isinstance(tensor, nn.Parameter):
            fill(self.modules[path], "bias", value)
        else:
            write(tensor, value)

    def _swap(self) -> None:
        wanted = self.adapter in [*self._active, *self.merged_adapters] and not self._disabled
        if wanted == self._in:
            return
        for path, parameter in self.named_parameters():
            self._away[path] = put(self.modules[path], "bias", self._away[path])
            parameter.requires_grad_(False)
            parameter.grad = None
        self._in = wanted


def biases_of(model: nn.Module) -> Biases | None:
    """Return the biases that an adapter of the model trains."""
    found: Any = vars(model).get(ATTRIBUTE)
    return found if found is not None and found.modules else None
