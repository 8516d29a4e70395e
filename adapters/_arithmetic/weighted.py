"""PEFT's `add_weighted_adapter`, on a model with adapters in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from torchgraft.functional import AddsLeafwise

from .. import _inplace as inplace
from .._calibration.initial import REMOVING, kind_of
from .._config.targets import exact
from .._methods.lora.to_plain import to_plain
from .combine import combine
from .given import Weights
from .mixing import PRUNING
from .products import Adapter


def add_weighted_adapter(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Weights,
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> None:
    """Add the weighted sum of injected adapters as another one, frozen and not active: PEFT's function, by `combine`.

    Scaling factors that were written to layers count, and adapters that started as PiSSA and alike are made plain
    first. Where PEFT is silently wrong (rank-stabilised scaling, negative weights with TIES, biases of `B`, DoRA, a
    pruning type with one adapter), this is right or an error: see `docs/differences.md`.

    Args:
        model: A model with injected adapters; changed in place.
        adapters: Names of the adapters.
        weights: A number for each, or `{path: numbers}`.
        adapter_name: Name of the new adapter.
        combination_type: `how` of `combine`; PEFT's default is `"svd"`, `"cat"` is exact; IA3 has that.
        svd_rank: `rank` of `combine`.
        svd_clamp: `clamp` of `combine`.
        svd_full_matrices: Has no effect: what more a full decomposition has is cut off again.
        svd_driver: Has no effect.
        density: As for `combine`.
        majority_sign_method: `majority_sign` of `combine`.

    Options of other types (`svd_rank` for `"cat"`) have no effect, as in PEFT.

    Raises:
        ValueError: A name that the model does not have, or has already; all that `combine` refuses.

    >>> from torchgraft.adapters import LoraConfig, inject_adapter_in_model
    >>> model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), nn.Sequential(nn.Linear(4, 3)), "a")
    >>> _ = inject_adapter_in_model(LoraConfig(r=1, target_modules=["0"]), model, "b")
    >>> add_weighted_adapter(model, ["a", "b"], [0.5, -1.0], "both", "cat")
    >>> model.peft_config["both"].r, inplace.active_adapters(model)
    (3, ['b'])
    """
    if isinstance(adapters, str):
        raise TypeError(f"add_weighted_adapter: adapters is {adapters!r}, expected a list of names")
    known = inplace.adapter_names(model)
    if unknown := [name for name in adapters if name not in known]:
        raise ValueError(f"add_weighted_adapter: adapters has {unknown[0]!r}; the model has {known}")
    if adapter_name in known:
        raise ValueError(
            f"add_weighted_adapter: adapter_name is {adapter_name!r}, which the model has already (it has {known}); "
            "choose another, or call delete_adapter first"
        )
    how = _way(model, adapters, combination_type)
    truncates = how.endswith("svd")
    with torch.no_grad():
        given = [_adapter(model, name) for name in adapters]
        config, params = combine(
            given,
            weights,
            how,
            rank=svd_rank if truncates else None,
            density=density if any(name in how for name in PRUNING) else None,
            majority_sign=majority_sign_method,
            clamp=svd_clamp if truncates else None,
        )
    if config.target_modules != given[0][0].target_modules:  # names that are whole ones in this model
        own = [path for path, leaves in params.items() if any(map(config.form.is_leaf, leaves))]
        config = exact(config, own, inplace.bare_modules(model))
    inplace.inject_adapter_in_model(config, model, adapter_name, params=params, activate=False)


def _way(model: nn.Module, adapters: Sequence[str], combination_type: str) -> str:
    """Return how to combine: PEFT's default is for LoRA, and methods that add up leaf by leaf have the exact sum."""
    configs: Any = getattr(inplace.unwrap(model), "peft_config", {})
    leafwise = all(configs[name].method.ability(AddsLeafwise) for name in adapters)
    return "cat" if leafwise and combination_type == "svd" else combination_type


def _adapter(model: nn.Module, name: str) -> Adapter:
    """Return an injected adapter as data, made plain where its tree alone does not say what it adds."""
    params = inplace.extract_params(model, name)
    configs: Any = inplace.unwrap(model).peft_config
    blocks = getattr(configs[name], "use_bdlora", None) is not None
    if blocks or kind_of(getattr(configs[name], "init_lora_weights", True)) in (*REMOVING, "mica"):
        return to_plain(inplace.extract_graft(model, name), params)
    return inplace.extract_config(model, name), params
