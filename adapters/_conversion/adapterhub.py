"""LoRA in the form of AdapterHub's files: names with `loras`, and a config with one rank and factor for all modules.

Source: adapter-hub/adapters, `src/adapters/methods/lora.py` (`LoRALinear`, whose `lora_A` is `"r in"`, `lora_B` is
`"out r"`, scaled by `alpha / r`), `src/adapters/configuration/adapter_config.py` (`LoRAConfig`), and, for which module
has which role, `src/adapters/models/<model>/mixin_<model>.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchgraft.functional import UnsupportedConfig

from .._config.messages import names_of
from .factors import Factors

_ROLES = {
    r"(self_attn\.q_proj|attention\.self\.query|attention\.q_lin)": "q",
    r"(self_attn\.k_proj|attention\.self\.key|attention\.k_lin)": "k",
    r"(self_attn\.v_proj|attention\.self\.value|attention\.v_lin)": "v",
    r"(intermediate\.dense|mlp\.down_proj|fc1|ffn\.lin1|mlp\.c_fc)": "intermediate",
    r"((?<!attention\.)output\.dense|mlp\.up_proj|fc2|ffn\.lin2|mlp\.c_proj)": "output",
}
"""What AdapterHub's config calls a module, by the end of its name: Llama's `down_proj` is its `intermediate`."""

_KEY = re.compile(r"(?P<path>.+)\.loras\.(?P<name>[^.]+)\.(?P<leaf>.+)")


def to_adapterhub(found: Mapping[str, Factors], name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return tensors and config; where modules differ, ranks are filled up with zeros, and factors go into `B`.

    Raises:
        UnsupportedConfig: A module that its config has no word for.
    """
    roles = {path: _role(path) for path in found}
    layers = {path: tuple(re.findall(r"\.(\d+)\.", f".{path}.")) for path in found}
    for role in set(roles.values()):
        with_role = {layers[path] for path, one in roles.items() if one == role}
        if with_role != set(layers.values()):
            raise UnsupportedConfig(
                f"to_format: only some layers have an adapter on {role!r}, and AdapterHub's config has that for all of "
                "them; convert adapters that are alike in each layer"
            )
    if kernels := [path for path, one in found.items() if one.a.ndim > 2]:
        raise UnsupportedConfig(f"to_format: {kernels[0]} is a convolution, which AdapterHub's LoRA is not for")
    rank = max(one.rank for one in found.values())
    alike = len({(one.rank, one.alpha) for one in found.values()}) == 1
    tensors = {}
    for path, one in found.items():
        own = one if alike else one.folded
        more = rank - own.rank
        tensors[f"{path}.loras.{name}.lora_A"] = torch.nn.functional.pad(own.a, (0, 0, 0, more))
        # The factor alpha / r is one with alpha = r, whatever the rank that zeros fill up.
        tensors[f"{path}.loras.{name}.lora_B"] = torch.nn.functional.pad(own.b, (0, more))
    attention = [role for role in "qkv" if role in roles.values()]
    config = {
        "architecture": "lora", "selfattn_lora": bool(attention), "attn_matrices": attention,
        "intermediate_lora": "intermediate" in roles.values(), "output_lora": "output" in roles.values(),
        "leave_out": [], "r": rank, "alpha": next(iter(found.values())).alpha if alike else rank, "dropout": 0.0,
        "composition_mode": "add", "init_weights": "lora", "use_gating": False,
    }  # fmt: skip
    return tensors, {"name": name, "config": config}


def _role(path: str) -> str:
    for pattern, role in _ROLES.items():
        if re.fullmatch(rf"(.*\.)?{pattern}", path):
            return role
    raise UnsupportedConfig(
        f"to_format: {path} is none of the modules that AdapterHub's config has words for (query, key and value of "
        "self-attention, and the two feed-forward layers); leave it out"
    )


def from_adapterhub(
    tensors: Mapping[str, Tensor], prefix: str | None, fields: Mapping[str, Any] | None
) -> dict[str, Factors]:
    """Return factors by module.

    Raises:
        ValueError: No config, or one of another method or with gates; several adapters; keys of something else.
    """
    config = (fields or {}).get("config", fields)
    if not config or "alpha" not in config:
        raise ValueError("from_format: AdapterHub's tensors do not tell their scaling factor; pass fields, its config")
    others = ("use_gating", "use_dora", "vera_d", "vera_b")
    if config.get("composition_mode", "add") != "add" or any(config.get(name) for name in others):
        raise ValueError(
            "from_format: the config has a composition_mode other than 'add', gates, DoRA or VeRA: no plain LoRA"
        )
    keys = {key: _KEY.fullmatch(key) for key in tensors}
    names = sorted({match["name"] for match in keys.values() if match})
    name = names[0] if prefix is None and len(names) == 1 else prefix
    if name not in names:
        raise ValueError(f"from_format: prefix is {prefix!r}, and the tensors are of the adapters {names}; name one")
    own = {key: match for key, match in keys.items() if match and match["name"] == name}
    other = [
        key for key, match in keys.items() if not match or (match["name"] == name and match["leaf"][:-1] != "lora_")
    ]
    if other:
        raise ValueError(f"from_format: {names_of(other)} is no factor of a LoRA; leave it out")
    leaves: dict[str, dict[str, Tensor]] = {}
    for key, match in own.items():
        leaves.setdefault(match["path"], {})[match["leaf"]] = tensors[key]
    found = {}
    for path, one in leaves.items():
        a, b = one.get("lora_A"), one.get("lora_B")
        if a is None or b is None or not len(a) == b.shape[1] == config.get("r", len(a)):
            raise ValueError(
                f"from_format: {path} has no lora_A and lora_B of the config's rank (a fused layer such as GPT-2's "
                "c_attn has several in one, which is not read here)"
            )
        found[path] = Factors(a, b, float(config["alpha"]))
    return found
