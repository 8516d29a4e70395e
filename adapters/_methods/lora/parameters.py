"""LoRA on bare parameters: a matrix, or one for each expert.

    W'_e = W_e + s B_e A_e

All `A_e` are one leaf, `"experts*r in"`, expert by expert, and all `B_e` are one, `"out r*experts"`, rank by rank, as
in PEFT's `ParamWrapper` (`tuners/lora/layer.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from torchgraft.functional import Site, UnsupportedConfig

from ..._config.messages import require

_OF_MODULES = (
    "lora_dropout", "lora_bias", "use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "velora_config",
    "kasa_config", "monteclora_config", "arrow_config",
)  # fmt: skip
"""Fields that speak of a module's input or output, or of variants that PEFT has for modules only."""


def check_parameter(config: Any, site: Site) -> None:
    """Refuse what PEFT has for modules only.

    Raises:
        ValueError: Such a field is set; names it and the parameter.
    """
    for name in _OF_MODULES:
        value = getattr(config, name, None)
        what = f"{name} is {value!r} at {site.path}, a parameter of target_parameters, which this is not made for"
        require(not value, config, f"{what}; leave it out, or target modules", UnsupportedConfig)
    given = config.init_lora_weights
    what = f"init_lora_weights is {given!r} at {site.path}, a parameter; expected True, False or 'gaussian'"
    require(given in (True, False, "gaussian"), config, what, UnsupportedConfig)


def factors_of_parameter(
    config: Any, site: Site, leaves: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, float | Tensor]:
    """`B`, `"[experts] out r"`, `A`, `"[experts] r in"`, and `s`.

    >>> import torch
    >>> from torchgraft.adapters._methods.lora.constants import LoraConstants
    >>> site = Site("up", "experts", 3, 2, experts=4, constants=LoraConstants(4, 8.0, 1.0))
    >>> b, a, _ = factors_of_parameter(None, site, {"lora_A": torch.ones(8, 3), "lora_B": torch.ones(2, 8)})
    >>> b.shape, a.shape
    (torch.Size([4, 2, 2]), torch.Size([4, 2, 3]))
    """
    a, b = leaves["lora_A"], leaves["lora_B"]
    if site.experts:
        a, b = a.unflatten(0, (site.experts, -1)), b.unflatten(1, (-1, site.experts)).movedim(-1, 0)
    return b, a, site.constants.scaling
