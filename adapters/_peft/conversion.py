"""PEFT's `convert_to_lora`, `save_as_lora` and `supports_lora_conversion`, on a model with adapters in place."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from torchgraft.functional import Graft, bind
from torchgraft.functional.extending import Tree

from .. import _inplace as inplace
from .._config.keys import PREFIX, places, to_keys
from .._conversion.to_lora import to_lora
from .._files.save import save_adapter
from .._inplace.walk import is_wrapped, layers, unwrap
from .._methods.lora.lora import LoraConfig


def supports_lora_conversion(model: nn.Module, adapter_name: str = "default") -> bool:
    """Return whether `convert_to_lora` is for an adapter of a model: it can be merged, and changes no bias.

    In PEFT that is so for methods that add to the weight, in linear layers; here for every method.

    >>> from torchgraft.adapters import OFTConfig, inject_adapter_in_model
    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> model = inject_adapter_in_model(OFTConfig(oft_block_size=2, target_modules=["0"]), model)
    >>> supports_lora_conversion(model), supports_lora_conversion(model, "other")
    (True, False)
    """
    found = [layer for layer in layers(unwrap(model)).values() if adapter_name in layer.entries]
    return bool(found) and all(layer.supports_lora_conversion(adapter_name) for layer in found)


def convert_to_lora(
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Return an injected adapter as a plain LoRA, its config and its state dict: PEFT's function, by `to_lora`.

    The model stays as it is. `extract_graft` and `extract_params` with `to_lora` give the same as a tree, with the
    errors in a report. PEFT refuses methods that do not add (OFT, IA3, DoRA), layers that are not linear, and
    what is trained beside the layers; here all that can be merged is converted, and that stays.

    Args:
        model: A model with injected adapters.
        rank: An integer is the rank; a float is the share of each module's energy to keep, `0 < rank <= 1`.
        adapter_name: The adapter.
        progressbar: Whether a bar shows how far it is, where tqdm is installed.
        compile_kwargs: Has no effect.

    Raises:
        TypeError: A model without that adapter's layers.
        ValueError: A rank out of range, or larger than a layer; an adapter that cannot be converted. Names the path.

    >>> from torchgraft.adapters import LoHaConfig, inject_adapter_in_model
    >>> model = inject_adapter_in_model(LoHaConfig(r=2, target_modules=["0"]), nn.Sequential(nn.Linear(8, 8)))
    >>> config, state = convert_to_lora(model, 4)
    >>> config.r, list(state)
    (4, ['0.lora_A.weight', '0.lora_B.weight'])
    """
    graft, config, tree = _converted(model, rank, adapter_name, progressbar)
    prefix = PREFIX if is_wrapped(model) else ""
    return config, to_keys(config, tree, prefix, places(bind(graft.model, config).sites[""]))


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Write an injected adapter as a plain LoRA, as PEFT's function does; both files at once, or none.

    Args:
        path: The directory; made if it is not there.
        model, rank, adapter_name, progressbar, compile_kwargs: As for `convert_to_lora`.

    Raises:
        OSError: Files that cannot be written; all that `convert_to_lora` raises.

    >>> import tempfile
    >>> from torchgraft.adapters import LoHaConfig, inject_adapter_in_model
    >>> model = inject_adapter_in_model(LoHaConfig(r=2, target_modules=["0"]), nn.Sequential(nn.Linear(8, 8)))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_as_lora(folder, model, 4)
    ...     print(sorted(os.listdir(folder)))
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    graft, config, tree = _converted(model, rank, adapter_name, progressbar)
    save_adapter(bind(graft.model, config), path, params=tree)


def _converted(model: nn.Module, rank: Any, adapter_name: str, progress: bool) -> tuple[Graft, LoraConfig, Tree]:
    if isinstance(rank, bool) or not isinstance(rank, (int, float)):
        raise TypeError(f"convert_to_lora: rank is {rank!r:.60}, expected an integer, or a share of the energy")
    found = {path: layer for path, layer in layers(unwrap(model)).items() if adapter_name in layer.entries}
    if not found:
        raise TypeError(
            f"convert_to_lora: the model has no layer with the adapter {adapter_name!r}; it has the adapters "
            f"{inplace.adapter_names(model)}"
        )
    graft = inplace.extract_graft(model, adapter_name)
    _check_rank(graft, rank)
    if graft.configs[""].method.name == "LORA":
        warnings.warn(
            f"adapter {adapter_name!r} is a LoRA already, and is converted to another one", UserWarning, stacklevel=3
        )
    share = {"energy": rank} if isinstance(rank, float) else {"rank": rank}
    config, tree, _ = to_lora(graft, inplace.extract_params(model, adapter_name), **share, progress=progress)
    return graft, config, tree


def _check_rank(graft: Graft, rank: float) -> None:
    """Refuse a rank that a layer does not have, as PEFT does.

    Raises:
        ValueError: Names the path.
    """
    for path, site in graft.sites[""].items():
        columns = site.weight_shape[-1] if site.experts else site.in_features
        most = min(site.out_features, columns)
        if isinstance(rank, int) and rank > most and not site.kernel_size:
            raise ValueError(
                f"convert_to_lora: rank is {rank}, and {path} has a weight of {site.out_features} x {columns}, so "
                f"{most} is the most; to_lora gives small layers less"
            )
