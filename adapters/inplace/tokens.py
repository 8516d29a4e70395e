"""Embeddings of which adapters train the rows of some tokens: PEFT's `trainable_token_indices`, in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchgraft.functional.replaced import over


class TrainableTokensLayer(nn.Module):
    """A module with a matrix of embeddings, and the rows that adapters have of it.

    Attributes:
        base_layer: The user's module, frozen.
        trainable_tokens_delta: The rows, by adapter name; those of the embedding, for a module that is tied to one.
        token_indices: Which rows these are, by adapter name.
    """

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer: Any = base_layer
        self.trainable_tokens_delta = nn.ParameterDict().train(base_layer.training)
        self.token_indices: dict[str, list[int]] = {}
        self.training = base_layer.training

    def weight_with(self, rows: Iterable[tuple[Tensor, list[int]]]) -> Tensor:
        """The base's weight with these rows in it."""
        weight = self.base_layer.weight
        for delta, indices in rows:
            weight = over(weight, delta, torch.tensor(indices, device=weight.device))
        return weight

    def run(self, weight: Tensor, x: Tensor, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """The base's forward with another weight."""
        base = self.base_layer
        if type(base) is nn.Linear and not (base._forward_hooks or base._forward_pre_hooks):
            return F.linear(x, weight, base.bias)
        return torch.func.functional_call(base, {"weight": weight}, (x, *args), dict(kwargs), tie_weights=False)


class TrainableTokensWrapper(nn.Module):
    """What stands in the place of an embedding of which adapters train rows, or of a module that is tied to one.

    Attributes:
        token_adapter: The module and the rows.
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.token_adapter = TrainableTokensLayer(module)
        self.training = module.training
        self._sources: dict[str, list[TrainableTokensWrapper]] = {}  # in a list, which keeps it out of the module tree
        self._active: list[str] = []
        self._disabled = False

    def add(self, name: str, indices: Iterable[int], given: Tensor | None = None) -> None:
        """Take rows of the base's as an adapter's, or `given` ones; they are not active yet."""
        layer = self.token_adapter
        weight: Tensor = layer.base_layer.weight.detach()
        layer.token_indices[name] = list(indices)
        rows = (
            weight[torch.tensor(layer.token_indices[name], device=weight.device)] if given is None else given.detach()
        )
        layer.trainable_tokens_delta[name] = nn.Parameter(rows.to(weight.device))

    def follow(self, name: str, source: TrainableTokensWrapper) -> None:
        """Have the rows that another module has for an adapter, which is tied to this one."""
        self._sources[name] = [source]

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that have rows here."""
        return [*self.token_adapter.trainable_tokens_delta, *self._sources]

    def rows(self, name: str) -> tuple[Tensor, list[int]]:
        """An adapter's rows and their indices."""
        if name in self._sources:
            return self._sources[name][0].rows(name)
        return self.token_adapter.trainable_tokens_delta[name], self.token_adapter.token_indices[name]

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters that have rows here."""
        return self._active

    @property
    def disable_adapters(self) -> bool:
        """Whether the user's module runs."""
        return self._disabled

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Use and train the rows of these adapters.

        Raises:
            ValueError: Adapters that have rows for the same token.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.check(names)
        for name, delta in self.token_adapter.trainable_tokens_delta.items():
            if name not in names:
                delta.requires_grad_(False)
        self.activate(names, not inference_mode)

    def activate(self, names: Iterable[str], trained: bool) -> None:
        """Use the rows of these adapters, trainable or not; others stay as frozen as they are."""
        self._active = [name for name in names if name in self.adapters]
        self.set_requires_grad(self._active, trained)

    def check(self, names: Iterable[str]) -> None:
        """Refuse adapters that have rows for the same token."""
        owners: dict[int, str] = {}
        for name in [name for name in names if name in self.adapters]:
            for index in self.rows(name)[1]:
                if owners.setdefault(index, name) != name:
                    raise ValueError(
                        f"adapters {owners[index]!r} and {name!r} both train token {index} (trainable_token_indices), "
                        "so only one of them can be active; set one"
                    )

    def enable_adapters(self, enabled: bool) -> None:
        """Use the active adapters' rows, or none."""
        self._disabled = not enabled
        self.set_requires_grad(self._active if enabled else self.adapters, enabled)

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

    @property
    def weight(self) -> Tensor:
        """The weight with the active rows in it."""
        names = [] if self._disabled else self._active
        return self.token_adapter.weight_with(self.rows(name) for name in names)

    def bake(self) -> None:
        """Make the active rows part of the base's weight."""
        if self._active and not self._disabled:
            self.token_adapter.base_layer.weight.data = self.weight.detach()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The user's module with the active rows."""
        if self._disabled or not self._active:
            return self.token_adapter.base_layer(x, *args, **kwargs)
        return self.token_adapter.run(self.weight, x, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        """What the user's module has."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "token_adapter" not in self.__dict__.get("_modules", {}):
                raise
        return getattr(self.token_adapter.base_layer, name)
