"""The config and the modules that the keys of a state dict speak of."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping

from torch import Tensor, nn

from torchgraft.functional.extending import SHARED as SHARED_LEAVES
from torchgraft.functional.extending import with_parts

from ..._config.base import AdapterConfig
from ..._config.keys import split_key
from ..._config.messages import names_of
from ..._config.targets import exact, find_targets


def from_keys(
    config: AdapterConfig, state_dict: Mapping[str, Tensor], modules: Mapping[str, nn.Module], model: nn.Module
) -> tuple[AdapterConfig, list[str]]:
    """Return the config that fits these keys, and the modules they name in the model's order."""
    if getattr(config, "target_parameters", None):
        raise ValueError(
            f"{type(config).__name__}: state_dict is given with target_parameters, whose keys do not say which "
            "parameter they are of; inject without it, then set_peft_model_state_dict, or load_adapter"
        )
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in config.form.unpack(config, state_dict).items():
        if (split := split_key(config, key)) is not None:
            found.setdefault(split[0], {})[split[1]] = tensor
    if not found.keys() - {SHARED_LEAVES}:
        raise ValueError(
            f"state_dict has no key of {config.method.name}, expected keys like '<module>.{config.form.leaves[0]}'"
        )
    unknown = sorted(path for path in found if path not in modules and path != SHARED_LEAVES)
    if unknown:
        raise ValueError(f"state_dict names modules that the model does not have: {names_of(unknown)}")
    paths = [path for path in modules if path in found]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            meant = config.for_model(model, modules)
            named = {path for path, _ in with_parts(modules, find_targets(meant, modules, model))}
        except ValueError:
            named = set()
    if named and named != set(paths):
        warnings.warn(
            f"{type(config).__name__} and state_dict name different modules; state_dict counts. Only the config has "
            f"{sorted(named - set(paths))[:6]}, only state_dict has {sorted(set(paths) - named)[:6]}",
            RuntimeWarning,
            stacklevel=3,
        )
    config = exact(config, paths, modules)
    return dataclasses.replace(config, **(config.form.infer(config, found) if config.form.infer else {})), paths
