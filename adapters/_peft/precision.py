"""The dtypes of a model that is to be trained with adapters: PEFT's functions of `peft.utils`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_HALF = (torch.float16, torch.bfloat16)
_ENABLE = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
_KWARGS = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
_PACKED = ("aqlm", "eetq", "gptq", "hqq", "torchao")
"""Values of `quantization_method` whose models keep their dtypes."""


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Freeze a model and give its half-precision parameters float32; a quantised one checkpoints its gradients too.

    It is for transformers' models that were loaded in 4 or 8 bits, whose norms and embeddings are trained around in
    float32 then. A model in half precision that is not quantised becomes float32 as a whole, as with PEFT.

    Args:
        model: The model, before adapters are injected; changed in place.
        use_gradient_checkpointing: Whether a quantised model is to recompute activations.
        gradient_checkpointing_kwargs: Arguments of `model.gradient_checkpointing_enable`; with `use_reentrant` false
            the embeddings need not require gradients.
        auto_clear_cache: Whether to give memory of the accelerator's cache back.

    Returns:
        `model`.

    Raises:
        TypeError: A quantised model that cannot checkpoint, or `gradient_checkpointing_kwargs` where it takes none.

    >>> model = prepare_model_for_kbit_training(nn.Sequential(nn.Linear(2, 2, dtype=torch.bfloat16)))
    >>> model[0].weight.dtype, model[0].weight.requires_grad
    (torch.float32, False)
    """
    kwargs = dict(gradient_checkpointing_kwargs or {})
    method = getattr(model, "quantization_method", None)
    packed = str(getattr(method, "value", method)) in _PACKED or bool(getattr(model, "hqq_quantized", False))
    loaded = bool(getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False))
    checkpointing = use_gradient_checkpointing and (loaded or packed)
    enable = _enabling(model) if checkpointing else None
    name = next((one for one in _KWARGS if enable and one in inspect.signature(enable).parameters), None)
    if enable is not None and kwargs and name is None:
        raise TypeError(
            f"gradient_checkpointing_kwargs is {kwargs}, which {type(model).__name__}.{enable.__name__} does not take; "
            "leave it out"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if not packed and parameter.dtype in _HALF and type(parameter).__name__ != "Params4bit":
            parameter.data = parameter.data.float()
    if auto_clear_cache and not packed and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if enable is not None:
        if kwargs.get("use_reentrant", True):
            _let_embeddings_require_grad(model)
        enable(**({name: kwargs} if name else {}))
    return model


def _enabling(model: Any) -> Any:
    """Return how a model is told to recompute activations; transformers has renamed it."""
    found = next((getattr(model, name) for name in _ENABLE if hasattr(model, name)), None)
    if found is None:
        raise TypeError(
            f"{type(model).__name__} has no {_ENABLE[-1]}; pass use_gradient_checkpointing=False for a model that "
            "cannot recompute activations"
        )
    return found


def _let_embeddings_require_grad(model: Any) -> None:
    """Have the outputs of a model's embeddings require gradients, which reentrant checkpoints need."""
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
        return

    def require_grad(module: nn.Module, args: Any, output: Tensor) -> None:
        output.requires_grad_(True)

    model.get_input_embeddings().register_forward_hook(require_grad)


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Give a model's frozen parameters a dtype, and those that are trained float32, in place.

    Args:
        model: The model, with injected adapters.
        dtype: `torch.float16` or `torch.bfloat16`.

    Raises:
        RuntimeError: Adapters are merged, whose weights would be rounded and could not come back.

    >>> from torchgraft.adapters import LoraConfig, inject_adapter_in_model
    >>> model = inject_adapter_in_model(LoraConfig(target_modules=["0"]), nn.Sequential(nn.Linear(2, 2)))
    >>> cast_mixed_precision_params(model, torch.bfloat16)
    >>> model[0].base_layer.weight.dtype, model[0].lora_A["default"].weight.dtype
    (torch.bfloat16, torch.float32)
    """
    merged = [name for name, module in model.named_modules() if getattr(module, "merged_adapters", None)]
    if merged:
        raise RuntimeError(f"{merged[0]}: adapters are merged; call unmerge_adapter(model) before its dtype changes")
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
