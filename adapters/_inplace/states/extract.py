"""From adapters in a model to the functional style: their parameters, config and model."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from torchgraft.functional import Binding, Graft
from torchgraft.functional.extending import (
    Tree,
    modules_of,
    sort,
)

from ..._config.base import AdapterConfig
from ..._config.targets import exact
from ..._methods.shared.scalings import check_raw, expressed
from ..layer.tuner_layer import BaseTunerLayer
from ..tensors.gathering import is_flat, kept, on_gathered
from ..walk import layers, named_parts, unwrap
from .bare import bare_copy
from .layouts import config_of, layout_of, source_sites


@on_gathered()
def extract_params(model: nn.Module, adapter_name: str = "default") -> Tree:
    """Return an injected adapter as a parameter tree, which shares storage with the injected parameters.

    Its copies of `modules_to_save` are among the leaves.

    Raises:
        ValueError: A name that the model does not have.

    >>> from torchgraft.adapters import IA3Config, inject_adapter_in_model
    >>> model = inject_adapter_in_model(IA3Config(target_modules=["0"]), nn.Sequential(nn.Linear(2, 2)))
    >>> extract_params(model)["0"]["ia3_l"].shape
    torch.Size([2, 1])
    """
    tree = live_params(unwrap(model), adapter_name)
    return {path: {leaf: kept(tensor) for leaf, tensor in leaves.items()} for path, leaves in tree.items()}


def live_params(model: nn.Module, adapter_name: str) -> Tree:
    """Return an injected adapter as a tree of its parameters themselves, to which gradients flow.

    Raises:
        ValueError: A name that the model does not have.
    """
    layout = layout_of(model, adapter_name)
    tree: Tree = {}
    for path, part in named_parts(model):
        for owner, leaves in part.adapter_tree(path, layout).items():
            tree.setdefault(owner, {}).update(leaves)
    return sort(tree)


@on_gathered()
def extract_graft(model: nn.Module, adapter_name: str = "default") -> Graft:
    """Return a graft of the model beneath the adapters, whose tensors it shares, for trees of `extract_params`.

    The buffers of the adapter's own copies of `modules_to_save` are part of that model.

    Raises:
        ValueError: A name that the model does not have; adapters that are merged into these tensors.
    """
    model = unwrap(model)
    config = config_of(model, adapter_name)
    check_bare(model)
    if is_flat():
        raise TypeError(
            "the model is wrapped by FullyShardedDataParallel, whose flat parameters no graft can gather; shard it "
            "with torch.distributed.fsdp.fully_shard instead, or call extract_graft before it is wrapped"
        )
    base = bare_copy(model, adapter_name)
    config = expressed(config, source_sites(model, adapter_name))
    return Graft(base, bind_extracted(model, adapter_name, base, config), allow_unreached=True)


def check_bare(model: nn.Module) -> None:
    """Refuse a model whose tensors are not the base's own.

    Raises:
        ValueError: Adapters are merged into them.
    """
    for path, layer in layers(model).items():
        if layer.merged:
            raise ValueError(f"{path}: adapters are merged into this weight; call unmerge_adapter(model) first")


def bind_extracted(model: nn.Module, adapter_name: str, base: nn.Module, config: AdapterConfig) -> Binding:
    """Bind an injected adapter to a copy of the model beneath the adapters, with the constants of its layers now."""
    sites = source_sites(model, adapter_name)
    fixed = exact(config, list(sites), modules_of(base))
    # What was planned may have changed since: scaling factors that were set, fixed tensors that were loaded.
    planned = {
        path: layer.entries[adapter_name].site.constants.replace(_fixed(layer, adapter_name))
        for path, layer in layers(model).items()
        if path in sites
    }
    return Binding.plan(base, {"": fixed}, False, {"": planned})


def extract_config(model: nn.Module, adapter_name: str = "default") -> AdapterConfig:
    """Return the config of an injected adapter as it is now: with the scaling factors that were written to its layers.

    A tree carries none, so this is the config that goes with `extract_params`, and the one that `save_adapter` writes.

    Raises:
        ValueError: A name that the model does not have; factors that no config of the method has.

    >>> from torchgraft.adapters import LoraConfig, inject_adapter_in_model
    >>> model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), nn.Sequential(nn.Linear(2, 2)))
    >>> model[0].scaling["default"] *= 0.5
    >>> extract_config(model).lora_alpha
    4
    """
    model = unwrap(model)
    config, sites = copy.deepcopy(config_of(model, adapter_name)), source_sites(model, adapter_name)
    check_raw(config, sites)
    return expressed(config, sites)


def _fixed(layer: BaseTunerLayer, adapter_name: str) -> dict[str, Tensor]:
    leaves = layer.numbers(adapter_name)
    return {leaf: kept(leaves[leaf]) for leaf in layer.fixed(adapter_name)}
