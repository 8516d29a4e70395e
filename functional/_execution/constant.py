"""Views that are said to be constant: what depends on no input is computed once, when the view is made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import optree
import torch
from torch import Tensor

from .._abilities import Precomputes
from .._layers.adapted import Adapted
from .._layers.base import Base
from .._method import SiteAdapter
from .._skeleton.runtime import SiteRuntime
from .._skeleton.skeleton import Skeleton


def check_constant(params: Mapping[str, Any]) -> None:
    """Refuse trees that a constant view cannot have.

    Args:
        params: The active trees, or `ActiveTree`s in their place, by adapter name.

    Raises:
        ValueError: A leaf that requires a gradient, or one that a transform of `torch.func` follows.
    """
    for name, tree in params.items():
        where = f"params[{name!r}]" if name else "params"
        paths, leaves, _ = optree.tree_flatten_with_path(tree if isinstance(tree, dict) else tree.tensors())
        for path, leaf in zip(paths, leaves, strict=True):
            followed = isinstance(leaf, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(leaf)
            if isinstance(leaf, Tensor) and (leaf.requires_grad or followed):
                at = "".join(f"[{key!r}]" for key in path)
                what = "is part of a transform" if followed else "requires a gradient"
                raise ValueError(
                    f"view: constant is True, and {where}{at} {what}, which what is computed once would lose; detach "
                    "the leaves, or leave constant out"
                )


@torch.no_grad()
def precompute(skeleton: Skeleton) -> None:
    """Compute constants at a skeleton's sites from the trees that are active, for all calls to come.

    Sites whose rows have adapters of their own compute theirs in each call.
    """
    for _, module in skeleton.modules:
        runtime: SiteRuntime | None = vars(module).get("_runtime")
        if runtime is not None:
            known = {id(adapter): constants for adapter, constants in _constants(runtime.layer())}
            runtime.entries = {
                name: adapter.with_constants(known.get(id(adapter), {})) for name, adapter in runtime.entries.items()
            }
            runtime.decide()


def _constants(layer: Any) -> Iterator[tuple[SiteAdapter, Mapping[str, Any]]]:
    """Yield each adapter around a module that can compute constants, and these, the outermost first."""
    while isinstance(layer, Adapted):
        adapter = layer.entry
        method = adapter.config.method
        ability = method.ability(Precomputes)
        if ability is not None and _is_single(layer):
            yield adapter, ability.compute(adapter.config, adapter.site, layer.leaves, layer.base)
        layer = layer.base


def _is_single(layer: Any) -> bool:
    """Return whether neither this layer nor one below has rows with adapters of their own."""
    while isinstance(layer, Adapted):
        layer = layer.base
    return isinstance(layer, Base)
