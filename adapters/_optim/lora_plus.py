"""LoRA+: `B` learns `ratio` times as fast as `A`.

Hayou et al., *LoRA+: Efficient Low Rank Adaptation of Large Models*, 2024, arXiv:2402.12354; PEFT's
`optimizers/loraplus.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import optree
from torch import Tensor, nn

from torchgraft.functional import Tree

from .._inplace.walk import unwrap
from .._methods.lora.dora import MAGNITUDE


def lora_plus_groups(
    params: nn.Module | Tree,
    lr: float,
    ratio: float,
    *,
    weight_decay: float = 0.0,
    embedding_lr: float = 1e-6,
) -> list[dict[str, Any]]:
    """Parameter groups of LoRA+ for any optimizer of `torch.optim`, those of PEFT's `create_loraplus_optimizer`.

    The matrices of embeddings have a rate of their own; `B`, its bias and all other vectors have `lr * ratio`; the rest
    has `lr`. Biases and the vectors of normalisation layers are not decayed.

    Args:
        params: A model with injected adapters, whose trained parameters are taken; or a tree of leaves that require
            gradients, of one adapter, of several by name, or a stack.
        lr: Rate of `A`.
        ratio: Rate of `B` over that of `A`.
        weight_decay: Weight decay.
        embedding_lr: Rate of an embedding's `A` and `B`.

    Returns:
        Four groups, some perhaps empty, with `"params"`, `"lr"`, `"weight_decay"` and a `"name"`.

    Raises:
        ValueError: Nothing that LoRA trains; rates that are not positive.
        TypeError: Neither a model nor a tree.

    >>> import torch
    >>> from torchgraft.adapters import LoraConfig, inject_adapter_in_model
    >>> model = inject_adapter_in_model(LoraConfig(target_modules=["0"]), nn.Sequential(nn.Linear(4, 3)))
    >>> groups = lora_plus_groups(model, lr=1e-4, ratio=16)
    >>> [(group["name"], group["lr"]) for group in groups if group["params"]]
    [('A', 0.0001), ('B', 0.0016)]
    >>> optimizer = torch.optim.AdamW(groups)
    """
    for name, value in (("lr", lr), ("ratio", ratio), ("embedding_lr", embedding_lr)):
        if not value > 0:
            raise ValueError(f"lora_plus_groups: {name} is {value!r}, expected a positive number")
    found: dict[str, list[Tensor]] = {"A": [], "embedding": [], "B": [], "B without decay": []}
    named = list(_of_model(params) if isinstance(params, nn.Module) else _of_tree(params))
    for name, tensor, undecayed in named:
        found[_group(name, tensor, undecayed)].append(tensor)
    if not any(_parts(name) & {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"} for name, _, _ in named):
        raise ValueError(
            f"lora_plus_groups: none of the {len(named)} trained tensors is LoRA's A or B; inject or bind a "
            "LoraConfig, and let its parameters require gradients"
        )
    rates = {"A": lr, "embedding": embedding_lr, "B": lr * ratio, "B without decay": lr * ratio}
    return [
        {"name": name, "params": tensors, "lr": rates[name], "weight_decay": 0.0 if "without" in name else weight_decay}
        for name, tensors in found.items()
    ]


def _of_model(model: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Trained parameters by name, and whether each is a normalisation layer's."""
    model = unwrap(model)
    norms = {id(p) for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, parameter, id(parameter) in norms


def _of_tree(params: Any) -> Iterator[tuple[str, Tensor, bool]]:
    if not isinstance(params, Mapping):
        raise TypeError(
            f"lora_plus_groups: params is of type {type(params).__name__}, expected a model or a parameter tree"
        )
    paths, leaves, _ = optree.tree_flatten_with_path(params)
    for path, leaf in zip(paths, leaves, strict=True):
        if not isinstance(leaf, Tensor):
            raise TypeError(f"lora_plus_groups: {path} is of type {type(leaf).__name__}, expected a tensor")
        yield ".".join(map(str, path)), leaf, False


def _parts(name: str) -> set[str]:
    return set(name.split("."))


def _group(name: str, tensor: Tensor, undecayed: bool) -> str:
    parts = _parts(name)
    if parts & {"lora_embedding_A", "lora_embedding_B"}:
        return "embedding"
    bias = bool(parts & {"bias", "lora_B_bias"})
    # In a stack, a magnitude has two axes.
    vector = tensor.ndim == 1 or bias or (MAGNITUDE in parts and tensor.ndim == 2)
    if not vector and "lora_B" not in parts:
        return "A"
    return "B without decay" if bias or undecayed else "B"
