"""Layers that run several times: PEFT's `layer_replication`.

`[(0, 4), (2, 5)]` makes of the layers 0 to 4 the stack 0 1 2 3 2 3 4. The copies share the base's parameters and are
modules of their own, so that each can have its own adapter. PEFT's `replicate_layers` in `tuners/tuners_utils.py`;
Kim et al., *SOLAR 10.7B: Scaling Large Language Models with Simple yet Effective Depth Up-Scaling*, 2023,
arXiv:2312.15166.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from .messages import require
from .token_fields import TokenFields

Ranges = Sequence[Sequence[int]]

ATTRIBUTE = "_layer_replication"
"""Where a model says which of its layers were replicated, outside of its module tree."""


def replicated(model: nn.Module, ranges: Ranges) -> nn.Module:
    """Return a model with replicated layers, which shares every parameter and buffer with the given one.

    Modules, plain attributes and the model's config are copies, so the given model stays as it is.

    Args:
        model: A model with a list of layers: `layers` (Llama), `encoder.layer` (BERT) or `h` (GPT-2, Falcon), where
            `model` and `bert` are followed to the inner model.
        ranges: `(start, end)` of the layers to take in turn, the end not included.

    Raises:
        ValueError: A model without such a list, or ranges that it does not have.

    >>> model = nn.Module()
    >>> model.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    >>> other = replicated(model, [(0, 2), (1, 2)])
    >>> len(model.layers), len(other.layers), other.layers[2].weight is model.layers[1].weight
    (2, 3, True)
    """
    tensors: list[Any] = [*model.parameters(), *model.buffers()]
    copied = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    replicate(copied, ranges)
    return copied


def replicate(model: nn.Module, ranges: Ranges) -> None:
    """Replicate layers in a model itself; the list of its layers and `config.num_hidden_layers` become others.

    Raises:
        ValueError: A model without such a list, or ranges that it does not have.
    """
    owner, name = _layers(model)
    old: list[nn.Module] = list(owner.get_submodule(name).children())
    for start, end in ranges:
        if not 0 <= start < end <= len(old):
            raise ValueError(
                f"layer_replication has ({start}, {end}), expected 0 <= start < end <= {len(old)}, the number of layers"
            )
    taken = [index for start, end in ranges for index in range(start, end)]
    new = [_copy(old[index]) for index in taken]
    for index, layer in enumerate(new):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):  # the slot of a layer in a cache of keys and values
                vars(module)["layer_idx"] = index
    owner._modules[name] = nn.ModuleList(new).train(owner.training)
    for one in {id(config): config for config in _configs(model, owner)}.values():
        one.num_hidden_layers = len(new)
        kinds = getattr(one, "layer_types", None)  # what transformers' models ask for each layer, by its index
        if isinstance(kinds, list) and len(kinds) == len(old):
            one.layer_types = [kinds[index] for index in taken]
    vars(model)[ATTRIBUTE] = [tuple(one) for one in ranges]


def _copy(layer: nn.Module) -> nn.Module:
    """Return a layer that shares its parameters with another one."""
    return copy.deepcopy(layer, {id(parameter): parameter for parameter in layer.parameters()})


def _layers(model: nn.Module) -> tuple[nn.Module, str]:
    """Return the module that has the list of layers, and the list's name there."""
    inner: Any = model
    while isinstance(getattr(inner, "model", None), nn.Module):
        inner = inner.model
    inner = getattr(inner, "bert", inner)
    encoder = getattr(inner, "encoder", None)
    for owner, name in ((inner, "layers"), (encoder, "layer"), (inner, "h")):
        if isinstance(owner, nn.Module) and isinstance(owner._modules.get(name), nn.ModuleList):
            return owner, name
    raise ValueError(
        f"layer_replication: found no list of layers in {type(model).__name__}, expected layers, encoder.layer or h, "
        "as Llama, BERT and Falcon have them"
    )


def _configs(model: nn.Module, owner: nn.Module) -> list[Any]:
    """Return the configs that say how many layers there are."""
    found = [getattr(module, "config", None) for module in (model, owner)]
    return [config for config in found if hasattr(config, "num_hidden_layers")]


@dataclasses.dataclass(kw_only=True)
class ReplicationFields(TokenFields):
    """Runs layers of the model several times.

    Attributes:
        layer_replication: `[(start, end), ...]`: the layers that the model runs, in turn, each range without its end.
            The copies share the base's parameters and have adapters of their own. A graft has its own, longer model
            (`graft.model`), which shares the user's tensors; its modes are set there. A model with injected adapters
            is changed, and stays longer when they are unloaded, as in PEFT.
    """

    layer_replication: list[tuple[int, int]] | None = None

    def structure(self, model: nn.Module) -> nn.Module:
        """Return the model that the adapter is for: a longer one that shares all tensors, or the model itself.

        Raises:
            ValueError: A model that is replicated in another way already, or whose layers are not found.
        """
        wanted = self._wanted(model)
        return model if wanted is None else replicated(model, wanted)

    def _wanted(self, model: nn.Module) -> Ranges | None:
        """Return the ranges that are still to be replicated."""
        wanted = [tuple(one) for one in self.layer_replication or ()]
        have = vars(model).get(ATTRIBUTE)
        if not wanted or wanted == have:
            return None
        require(
            have is None,
            self,
            f"layer_replication is {wanted}, and the model's layers are replicated as {have} already; give the same",
        )
        return wanted


@contextlib.contextmanager
def replicating(model: nn.Module, config: Any, adapters: Sequence[str]) -> Iterator[None]:
    """Replicate a model's layers as a config says, in place; an error in the context takes that back.

    Args:
        model: The model.
        config: An adapter's config.
        adapters: Names of the adapters in the model.

    Raises:
        ValueError: Layers that carry adapters, or that are replicated in another way already.
    """
    wanted = config._wanted(model) if isinstance(config, ReplicationFields) else None
    if wanted is None:
        yield
        return
    if adapters:
        raise ValueError(
            f"layer_replication is {wanted}, and the model has adapters {list(adapters)} on its layers; inject the "
            "adapter with layer_replication first, or give all the same"
        )
    owner, name = _layers(model)
    old, counts = owner._modules[name], [(one, vars(one).copy()) for one in _configs(model, owner)]
    try:
        replicate(model, wanted)
        yield
    except BaseException:
        owner._modules[name] = old
        for one, before in counts:
            vars(one).update(before)
        vars(model).pop(ATTRIBUTE, None)
        raise
