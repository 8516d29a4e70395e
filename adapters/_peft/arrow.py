"""PEFT's entry to Arrow: a model whose tokens are routed among LoRA adapters from files."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from torchgraft.functional import bind
from torchgraft.functional.extending import Tree

from .. import _inplace as inplace
from .._arithmetic.experts import arrow_experts
from .._config.base import AdapterConfig
from .._files.disk.hub import local_folder
from .._files.load import load_adapter
from .peft_model import PeftModel
from .weights import check_without_effect

ROUTER = "arrow_router"
"""The name that the router's adapter has, as in PEFT."""


@dataclasses.dataclass
class ArrowConfig:
    """How tokens are routed among adapters, under PEFT's names.

    Attributes:
        top_k: Number of adapters that a token has; all of them where there are fewer.
        router_temperature: What similarities are divided by.
        use_gks: Whether the mean of adapters of general knowledge is subtracted from each.
        rng_seed: Seed of the vector from which directions are found; `None` is 0.

    >>> ArrowConfig(use_gks=True).top_k
    3
    """

    top_k: int = 3
    router_temperature: float = 1.0
    use_gks: bool = False
    rng_seed: int | None = None


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: Sequence[str | os.PathLike[str]],
    arrow_config: ArrowConfig,
    general_adapter_paths: Sequence[str | os.PathLike[str]] | None = None,
    **adapter_kwargs: Any,
) -> PeftModel:
    """Put LoRA adapters from directories into a model as the experts of one adapter, "arrow_router".

    The experts are one stack of frozen parameters at each layer, where PEFT has an adapter for each: `arrow_experts` is
    the function that makes it, of any trees. Nothing is injected where one of the directories does not fit.

    Args:
        base_model: The model; changed in place.
        task_specific_adapter_paths: Directories, or names on the Hub that were downloaded before.
        arrow_config: How tokens are routed.
        general_adapter_paths: Those of general knowledge, for `use_gks`.
        adapter_kwargs: `subfolder`, `revision` and `cache_dir`, of all of them; others of PEFT's about downloads.

    Returns:
        A `PeftModel` in evaluation mode.

    Raises:
        ValueError: No directories, or adapters that are not alike.
    """
    if not task_specific_adapter_paths:
        raise ValueError("task_specific_adapter_paths is empty, expected the directory of an adapter at least")
    if arrow_config.use_gks and not general_adapter_paths:
        raise ValueError("use_gks is True and general_adapter_paths is empty, expected directories of general adapters")
    where = {
        name: adapter_kwargs.pop(name) for name in ("subfolder", "revision", "cache_dir") if name in adapter_kwargs
    }
    check_without_effect("create_arrow_model", adapter_kwargs)

    def read(path: str | os.PathLike[str]) -> tuple[Any, Tree]:
        folder = local_folder(path, **where)
        config = AdapterConfig.from_pretrained(folder)
        graft = bind(base_model, config)
        return graft.configs[""], load_adapter(graft, folder)

    config, params = arrow_experts(
        [read(path) for path in task_specific_adapter_paths],
        [read(path) for path in general_adapter_paths or ()] if arrow_config.use_gks else (),
        top_k=arrow_config.top_k,
        router_temperature=arrow_config.router_temperature,
        rng_seed=arrow_config.rng_seed,
    )
    given = dataclasses.replace(config, inference_mode=True)
    inplace.inject_adapter_in_model(given, base_model, ROUTER, params=params)
    return PeftModel.class_for(given).around(base_model, given).eval()
