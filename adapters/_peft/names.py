"""Names of PEFT's that are none of torchgraft's, and what stands for them."""

from __future__ import annotations

from collections.abc import Iterable

from torchgraft.functional.extending import did_you_mean

_INSTEAD = {
    "prepare_model_for_kbit_training": "inject_adapter_in_model(config, model), which freezes the base",
}


def instead_of(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about a name that is not here.

    >>> instead_of("LoRAConfig", ["LoraConfig"])
    "; did you mean 'LoraConfig'?"
    """
    if name in _INSTEAD:
        return f"; here it is {_INSTEAD[name]}"
    return did_you_mean(name, [one for one in known if not one.startswith("_")])
