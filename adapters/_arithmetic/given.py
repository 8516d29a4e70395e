"""What arithmetic is given: adapters as pairs of config and tree, and a weight for each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from torchgraft.functional.extending import given_type, sort

from .._config.base import AdapterConfig
from .._config.messages import names_of
from .mixing import Scalar
from .products import Adapter, is_parameter

Weights = Sequence[Scalar] | Tensor | Mapping[str, Sequence[Scalar] | Tensor]
"""A weight for each adapter, or `{path: weights}` with those of each module."""


def check_adapters(adapters: Any, what: str) -> list[Adapter]:
    """Return adapters that are pairs of a config and a tree.

    Raises:
        TypeError: Something else; says what is meant.
        ValueError: None at all.
    """
    if isinstance(adapters, Mapping) or not isinstance(adapters, Sequence) or isinstance(adapters, str):
        raise TypeError(
            f"{what}: adapters is {given_type(adapters)}, expected a list of pairs, [(config, params), ...]"
        )
    if not adapters:
        raise ValueError(f"{what}: adapters is empty, expected at least one pair, [(config, params), ...]")
    return [check_adapter(one, f"{what}: adapters[{i}]") for i, one in enumerate(adapters)]


def check_adapter(adapter: Any, what: str) -> Adapter:
    """Return one adapter that is a pair of a config and a tree.

    Raises:
        TypeError: Something else.
    """
    if not (isinstance(adapter, (tuple, list)) and len(adapter) == 2):
        raise TypeError(f"{what} is {given_type(adapter)}, expected a pair, (config, params)")
    config, tree = adapter
    if not isinstance(config, AdapterConfig):
        hint = "; a graft has it: graft.configs['']" if hasattr(config, "configs") else ""
        raise TypeError(f"{what} has an object {given_type(config)} first, expected the adapter's config{hint}")
    nested = isinstance(tree, Mapping) and all(isinstance(leaves, Mapping) for leaves in tree.values())
    if not nested or not all(isinstance(leaf, Tensor) for leaves in tree.values() for leaf in leaves.values()):
        raise TypeError(
            f"{what} has an object {given_type(tree)} second, expected one adapter's tree, {{path: {{leaf: tensor}}}}"
        )
    return config, sort(tree)


class Chosen:
    """The weight of each adapter at each module.

    Args:
        given: What the user gave.
        count: Number of adapters.
        what: How errors call the function.

    Raises:
        TypeError, ValueError: Not one finite number for each adapter.
    """

    def __init__(self, given: Weights, count: int, what: str = "combine"):
        self.what, self.by_path = what, isinstance(given, Mapping)
        each = given.items() if isinstance(given, Mapping) else [("", given)]
        self._weights = {path: self._numbers(one, count, path) for path, one in each}

    def _numbers(self, given: Any, count: int, path: str) -> list[Scalar]:
        name = f"{self.what}: weights{f'[{path!r}]' if self.by_path else ''}"
        if isinstance(given, Tensor) and given.ndim == 1:
            given = given.unbind()
        if not isinstance(given, Sequence) or isinstance(given, str):
            raise TypeError(f"{name} is {given_type(given)}, expected a list of numbers, or a tensor with one axis")
        if len(given) != count:
            raise ValueError(f"{name} has {len(given)} numbers, expected one for each of the {count} adapters")
        for one in given:
            if isinstance(one, Tensor) and one.ndim == 0:
                continue
            if isinstance(one, bool) or not isinstance(one, Real) or not math.isfinite(one):
                raise ValueError(f"{name} has {one!r:.60}, expected finite numbers")
        return [one if isinstance(one, Tensor) else float(one) for one in given]

    def at(self, path: str) -> list[Scalar]:
        """Return the weight of each adapter at a module.

        Raises:
            KeyError: Weights by path that lack it.
        """
        if not self.by_path:
            return self._weights[""]
        if path not in self._weights:
            raise KeyError(f"{self.what}: weights lack {path!r}; they have {names_of(self._weights)}")
        return self._weights[path]

    def check_paths(self, paths: Any) -> None:
        """Refuse weights of modules that no adapter has.

        Raises:
            KeyError: Names one.
        """
        unknown = sorted(set(self._weights) - set(paths)) if self.by_path else []
        if unknown:
            raise KeyError(
                f"{self.what}: weights have {unknown[0]!r}, which no adapter has; they have {names_of(paths)}"
            )

    def add_up_to_one(self, path: str) -> bool:
        """Return whether the weights at a module are numbers whose sum is one."""
        numbers = [one for one in self.at(path) if not isinstance(one, Tensor)]
        return len(numbers) == len(self.at(path)) and math.isclose(math.fsum(numbers), 1.0, abs_tol=1e-9)


_SELECTING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")


def check_alike(adapters: Sequence[Adapter], free: frozenset[str], what: str) -> None:
    """Refuse configs that differ in more than fields that are free to.

    Raises:
        ValueError: Names the field, and what both have.
    """
    first = adapters[0][0]
    for index, (config, _) in enumerate(adapters[1:], 1):
        for field in dataclasses.fields(first):
            name = field.name
            if name in free or getattr(config, name) == getattr(first, name):
                continue
            raise ValueError(
                f"{what}: {name} is {getattr(first, name)!r:.80} in adapters[0] and {getattr(config, name)!r:.80} in "
                f"adapters[{index}]; only adapters that agree in it add up"
            )


def selection(adapters: Sequence[Adapter], sites: Sequence[frozenset[str]]) -> dict[str, Any]:
    """Return the fields of a config that targets all modules of all adapters; none where all target the same."""
    first = adapters[0][0]
    names = [name for name in _SELECTING if hasattr(first, name)]
    same = all(getattr(config, name) == getattr(first, name) for config, _ in adapters for name in names)
    if same and len(set(sites)) == 1:
        return {}
    paths = sorted(frozenset().union(*sites))
    parameters = [path for path in paths if any(is_parameter(config, path) for config, _ in adapters)]
    fields: dict[str, Any] = dict.fromkeys(names)
    if "target_parameters" in fields:
        fields["target_parameters"] = parameters or None
    return fields | {"target_modules": [path for path in paths if path not in parameters]}


def check_same_shape(tensors: Sequence[Tensor], path: str, leaf: str, what: str, advice: str) -> None:
    """Refuse tensors of different shapes.

    Raises:
        ValueError: Names the path, the leaf, and the shapes.
    """
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len(set(shapes)) > 1:
        raise ValueError(f"{what}: {path} has {leaf} of shapes {', '.join(map(str, shapes))}; {advice}")


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[Scalar]) -> Tensor:
    """Return the sum of tensors, each times its weight, in float32 or wider."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    total = tensors[0].to(wide) * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total = total + tensor.to(torch.promote_types(wide, tensor.dtype)) * weight
    return total
