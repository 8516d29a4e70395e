"""Placing: an adapter that is bound and checked goes into the model."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from torch import nn

from torchgraft.functional.extending import each

from ..._config.tokens import LEAF as TOKENS
from ..beside.biases import ATTRIBUTE, Biases
from ..beside.modules_to_save import ModulesToSaveWrapper
from ..beside.tokens import TrainableTokensWrapper
from ..layer.containers import SharedContainers
from ..layer.leaves import key_of
from ..layer.parameters import ParameterLayer
from ..layer.tuner_layer import BaseTunerLayer
from ..switch import take_out
from ..walk import layers, named, parts
from .bound import Injection, Shared, within
from .positions import Positions

Placements = Iterator[tuple[nn.Module, BaseTunerLayer | ModulesToSaveWrapper | TrainableTokensWrapper]]
"""Modules of the user's, and what takes the place of each."""


def place(injection: Injection, model: nn.Module, positions: Positions) -> None:
    """Put an adapter into a model, where it is not active yet; merged ones are unmerged first.

    Raises:
        RuntimeError: Something else wrote to the weights while adapters were merged.
        ValueError: Biases that cannot be trained where they are.
    """
    before = layers(model).values()
    disabled = bool(before) and all(layer.disable_adapters for layer in before)
    take_out(parts(model))
    copies = _Copies(injection, model)
    for module, part in itertools.chain(
        _layers(injection, model, positions), copies.own(), _tokens(injection, model), copies.shared()
    ):
        positions.put(module, part)
        if disabled and not part.disable_adapters:
            part.enable_adapters(False)
    if injection.biases:
        biases = _biases(injection)
        vars(model)[ATTRIBUTE] = biases
        if disabled:
            biases.enable_adapters(False)


def _layers(injection: Injection, model: nn.Module, positions: Positions) -> Placements:
    """Add the adapter to the layers of its targets, which are made where there are none."""
    found = layers(model).values()
    carriers = {key_of(layer): layer for layer in found}
    containers = SharedContainers(layer.shared_containers() for layer in found)
    for path, module in injection.targets.items():
        entry = injection.entries[path]
        layer = carriers.get((id(module), entry.site.leaf))
        if layer is None and entry.site.is_parameter:
            layer = ParameterLayer(positions.tops.get(id(module), module), entry.site.leaf)
            positions.tops[id(module)] = layer
        elif layer is None:
            layer = BaseTunerLayer(module, positions.parents(module))
        layer.add(injection.name, entry, injection.leaves[path], containers)
        yield module, layer


class _Copies:
    """The wrappers of modules that the adapter trains copies of, which are made where there are none."""

    def __init__(self, injection: Injection, model: nn.Module):
        self.injection = injection
        found = named(model, ModulesToSaveWrapper).values()
        self._wrappers = {id(wrapper.original_module): wrapper for wrapper in found}

    def _around(self, module: nn.Module) -> ModulesToSaveWrapper:
        if id(module) not in self._wrappers:
            self._wrappers[id(module)] = ModulesToSaveWrapper(module)
        return self._wrappers[id(module)]

    def own(self) -> Placements:
        """Add copies of `modules_to_save`."""
        for path, module in self.injection.saved.items():
            wrapper = self._around(module)
            wrapper.add(self.injection.name, self.injection.given_within(path))
            yield module, wrapper

    def shared(self) -> Placements:
        """Add copies of modules that have a tensor in common with one of these, whose parameter they share."""
        for path, one in self.injection.followers.items():
            if one.leaf != TOKENS:
                module = self.injection.modules[path]
                wrapper = self._around(module)
                wrapper.add(self.injection.name, tied={one.name: self._source(one)})
                yield module, wrapper

    def _source(self, one: Shared) -> nn.Parameter:
        saved = self.injection.saved
        at = next(path for path in saved if within(one.source, [path]))
        copied = self._around(saved[at]).modules_to_save[self.injection.name]
        return copied.get_parameter(f"{one.source}.{one.leaf}".removeprefix(f"{at}."))


def _tokens(injection: Injection, model: nn.Module) -> Placements:
    """Add rows of embeddings, and have modules that are tied to these follow them."""
    found = named(model, TrainableTokensWrapper).values()
    wrappers = {id(one.token_adapter.base_layer): one for one in found}
    for path, module in injection.embeddings.items():
        wrappers.setdefault(id(module), TrainableTokensWrapper(module, path))
    for path, leaf, one in each(injection.replaced):
        if leaf == TOKENS and one.rows is not None:
            module = injection.modules[path]
            wrappers[id(module)].add(injection.name, one.rows, injection.given(path, leaf))
            yield module, wrappers[id(module)]
    for path, shared in injection.followers.items():
        if shared.leaf == TOKENS:
            module = injection.modules[path]
            wrappers[id(module)].follow(injection.name, wrappers[id(injection.modules[shared.source])])
            yield module, wrappers[id(module)]


def _biases(injection: Injection) -> Biases:
    """Return the biases that the adapter trains where they are."""
    modules = {path: injection.modules[path] for path in injection.biases}
    given = {path: injection.params[path]["bias"] for path in modules} if injection.params is not None else {}
    return Biases(injection.name, modules, given)
