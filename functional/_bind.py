"""Binding configs to a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, overload

from torch import nn

from ._binding.binding import Binding
from ._binding.stacked import StackedBinding
from ._given import check_config, check_module, check_no_view
from ._graft import Graft
from ._method import Config
from ._stacks import StackedGraft
from ._tensors.wrappers import check_flat, without_parallel


@overload
def bind(
    model: nn.Module, config: Sequence[Config], *, allow_unreached: bool = ..., names: Sequence[str] | None = ...
) -> StackedGraft: ...


@overload
def bind(model: nn.Module, config: Config | Mapping[str, Config], *, allow_unreached: bool = ...) -> Graft: ...


def bind(
    model: nn.Module,
    config: Config | Mapping[str, Config] | Sequence[Config],
    *,
    allow_unreached: bool = False,
    names: Sequence[str] | None = None,
) -> Graft:
    """Bind adapter configs to a model; the model stays as it is.

    Args:
        model: Any module. It may still move, be evaluated or get new weights later; every call sees it. Of one in
            `DistributedDataParallel`, the module within. One that `fully_shard` has sharded is gathered in calls, owner
            by owner, in which each process takes part.
        config: One config, or several by name. With names, parameters are `{name: tree}`, all adapters in them add up,
            and a name that is missing is switched off. With a list, one config for each adapter of a stack, of which a
            row of a batch has one: see `StackedGraft`. A config without `target_modules` means PEFT's for the model's
            `config.model_type`.
        allow_unreached: Accept forwards that run past a site, as mixtures of experts and encoder-decoder models
            with cached encoder outputs do. Otherwise such a forward is an error.
        names: Names for the adapters of a stack.

    Returns:
        A `Graft`: `graft.init(generator)` makes parameters, `graft(params, *inputs)` runs the model with them.

    Raises:
        TypeError: `model` is no module, or has PEFT's adapters or others in place at a target; `config` is no config.
        ValueError: A config that matches nothing, or a module that its method does not support.

    >>> from torchgraft.adapters import LoraConfig
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    >>> bind(model, LoraConfig(target_modules=["0"]))
    Graft(Sequential, LORA on 1 sites)
    """
    check_module(model, "bind: ", other=config)
    model = without_parallel(model)
    named = isinstance(config, Mapping)
    if names is not None and not isinstance(config, (list, tuple)):
        raise TypeError("bind: names are for the adapters of a stack, bind(model, [config, ...], names=[...])")
    configs: Mapping[str, Any] = {"": config}
    if isinstance(config, Mapping):
        configs = config
    elif isinstance(config, (list, tuple)):
        configs = {f"[{i}]": value for i, value in enumerate(config)}
    if not configs:
        given = "dict of configs; give at least one, as {'name': LoraConfig(...)}"
        raise ValueError(f"bind: got an empty {given if named else 'list of configs; give at least one'}")
    for name, value in configs.items():
        fits = not isinstance(value, type) and hasattr(value, "method") and hasattr(value, "targets")
        what = f"config[{name!r}]" if named else f"config{name}"
        check_config(value, f"bind: {what}", fits, config if value is not config else None)
        if not isinstance(name, str) or (named and not name):
            raise TypeError(f"bind: an adapter's name is a non-empty string, got {name!r}")
    for path, module in model.named_modules():
        check_flat(path or "the model", module)
    check_no_view(
        model,
        "bind",
        "Bind the original model with all configs at once: bind(model, {'first': ..., 'second': ...})",
    )
    if isinstance(config, (list, tuple)):
        binding = StackedBinding.plan_stack(model, list(configs.values()))
        return StackedGraft(model, binding, allow_unreached=allow_unreached, names=names)
    return Graft(model, Binding.plan(model, configs, named), allow_unreached=allow_unreached)
