"""Objects that have adapters already, PEFT's and those in place: what errors say of them. PEFT is never imported."""

from __future__ import annotations

from typing import Any

from torch import nn

from torchgraft.functional.extending import register_advice

_IN_PLACE = f"{__name__.partition('._config')[0]}._inplace"


def _peft_module(module: nn.Module) -> str:
    return (
        "is PEFT's: give the model as it was before get_peft_model (peft_model.unload() takes PEFT's adapters out); "
        "load_adapter(model, folder) reads those that its save_pretrained wrote"
    )


def _peft_config(config: Any) -> str:
    if not hasattr(config, "to_dict"):
        return "it is PEFT's"
    return f"it is PEFT's: {type(config).__name__}.from_dict(config.to_dict()), of torchgraft's class, makes one of it"


def _in_place(module: nn.Module) -> str:
    return (
        "has adapters in place: extract_graft(model) and extract_params(model) give a graft and a tree of one, and "
        "unload(model) takes them out, before it is bound to others"
    )


register_advice("peft", nn.Module, _peft_module)
register_advice("peft", object, _peft_config)
register_advice(_IN_PLACE, nn.Module, _in_place)
