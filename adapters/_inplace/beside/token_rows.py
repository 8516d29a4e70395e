"""An embedding, and the rows that adapters have of it, by adapter name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchgraft.functional.extending import (
    is_sharded,
    offloading,
    over,
    resting,
    spread,
    whole,
)


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
        """Return the base's weight with these rows in it."""
        weight = whole(resting(self.base_layer, "weight"))
        for delta, indices in rows:
            weight = over(weight, delta, torch.tensor(indices, device=weight.device))
        result: Tensor = weight
        return result

    adapter_layer_names = ("trainable_tokens_delta",)
    other_param_names = ("token_indices",)

    def get_base_layer(self) -> Any:
        """Return the user's module."""
        return self.base_layer

    def get_merged_weights(self, active_adapters: Iterable[str]) -> Tensor:
        """Return the base's weight with the rows of these adapters, in their order."""
        return self.weight_with(self.rows(name) for name in active_adapters)

    def rows(self, name: str) -> tuple[Tensor, list[int]]:
        """Return an adapter's rows and their indices."""
        return resting(self.trainable_tokens_delta, name), self.token_indices[name]

    def forward(self, names: Iterable[str], others: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The base's forward with the rows that adapters have here, and with others; called, so that hooks run."""
        rows = [*others, *map(self.rows, names)]
        if not rows:
            return self.base_layer(x, *args, **kwargs)
        return self.run(self.weight_with(rows), x, args, kwargs)

    def run(self, weight: Tensor, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return the base's forward with another weight."""
        base = self.base_layer
        if type(base) is nn.Linear and not (base._forward_hooks or base._forward_pre_hooks):
            return F.linear(x, weight, base.bias)
        return _with_weight(base, weight)(x, *args, **kwargs)


def _with_weight(base: Any, weight: Tensor) -> Any:
    """Return a module with another weight, and with all else that it has, its hooks too.

    Not `torch.func.functional_call`, which goes by the names of parameters: FSDP1 has tensors in their place during a
    forward, and what accelerate loads would take the given weight's.
    """
    own, module = vars(base), object.__new__(type(base))
    state = {key: value for key, value in own.items() if key != "weight"}
    parameters = {name: resting(base, name) for name in own["_parameters"] if name != "weight"}
    if next(offloading(base), None) is not None:
        state = {key: value for key, value in state.items() if key not in ("_hf_hook", "_old_forward", "forward")}
    laid = base.weight
    if is_sharded(laid) and base._forward_pre_hooks:  # parallelize_module's hooks have it compute with shards
        weight = spread(weight, laid.device_mesh, laid.placements)
    vars(module).update(state, _parameters={**parameters, "weight": weight})
    return module
