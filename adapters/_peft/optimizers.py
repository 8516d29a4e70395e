"""PEFT's constructors of optimizers, on LoRA+ and LoRA-FA."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from .._inplace import active_adapters
from .._inplace.walk import unwrap
from .._optim.lora_fa import LoraFA
from .._optim.lora_plus import lora_plus_groups


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = 1e-6,
    **kwargs: Any,
) -> Optimizer:
    """Make an optimizer whose rate is larger for `B` than for `A`; see `lora_plus_groups`.

    Args:
        model: A model with injected adapters.
        optimizer_cls: The optimizer's class.
        lr: Rate of `A`.
        loraplus_lr_ratio: Rate of `B` over that of `A`.
        loraplus_weight_decay: Weight decay.
        loraplus_lr_embedding: Rate of an embedding's `A` and `B`.
        kwargs: Other arguments of the optimizer.

    Returns:
        An optimizer of four groups, in PEFT's order, of which some may be empty.

    Raises:
        ValueError: Nothing that LoRA trains; rates that are not positive.

    >>> import torch
    >>> from torchgraft.adapters import LoraConfig, inject_adapter_in_model
    >>> model = inject_adapter_in_model(LoraConfig(target_modules=["0"]), nn.Sequential(nn.Linear(4, 3)))
    >>> optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16)
    >>> [group["lr"] for group in optimizer.param_groups if group["params"]]
    [0.0001, 0.0016]
    """
    groups = lora_plus_groups(
        model, lr, loraplus_lr_ratio, weight_decay=loraplus_weight_decay, embedding_lr=loraplus_lr_embedding
    )
    return optimizer_cls(groups, lr=lr, **kwargs)  # type: ignore[call-arg]


def create_lorafa_optimizer(
    model: nn.Module,
    r: int,
    lora_alpha: float,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> Optimizer:
    """Make `LoraFA`: `A` is frozen, and `B` gets the gradient that is nearest to the weight's.

    Args:
        model: A model with injected LoRA adapters.
        r: Has no effect, as in PEFT: each layer has its own rank and factor.
        lora_alpha: Has no effect.
        lr: Learning rate.
        weight_decay: Decay, after the step and times the learning rate.
        use_rslora: If given, it has to be what the active adapters' configs say.

    Raises:
        ValueError: Nothing that LoRA-FA trains; another `use_rslora` than the configs'.

    >>> from torchgraft.adapters import LoraConfig, inject_adapter_in_model
    >>> model = inject_adapter_in_model(LoraConfig(target_modules=["0"]), nn.Sequential(nn.Linear(4, 3)))
    >>> type(create_lorafa_optimizer(model, r=8, lora_alpha=8, lr=1e-3)).__name__
    'LoraFA'
    """
    inner: Any = unwrap(model)
    configs: dict[str, Any] = getattr(inner, "peft_config", {})
    active = [name for name in active_adapters(inner) if name in configs]
    other = [name for name in active if getattr(configs[name], "use_rslora", False) != use_rslora]
    if use_rslora is not None and other:
        raise ValueError(
            f"use_rslora is {use_rslora}, and the configs of {other} say otherwise; leave it out, configs count"
        )
    return LoraFA(model, lr=lr, weight_decay=weight_decay)
