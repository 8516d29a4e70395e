"""Which modules a config means on a known type of model (`config.model_type`): where it names none, or older names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from .experts import with_new_names

C = TypeVar("C", bound=Any)

TARGETS: dict[str, tuple[str, ...] | str] = {
    **dict.fromkeys(
        [
            "bart",
            "gemma",
            "gemma2",
            "gemma3_text",
            "gpt_neo",
            "gptj",
            "llama",
            "llama4",
            "mistral",
            "mixtral",
            "opt",
            "qwen2",
            "qwen3",
            "stablelm",
        ],
        ("q_proj", "v_proj"),
    ),
    **dict.fromkeys(["RefinedWeb", "RefinedWebModel", "bloom", "chatglm", "falcon", "gpt_neox"], ("query_key_value",)),
    **dict.fromkeys(["bert", "electra", "layoutlm", "roberta", "xlm-roberta"], ("query", "value")),
    **dict.fromkeys(("mt5", "t5"), ("q", "v")),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    "blip-2": ("q", "v", "q_proj", "v_proj"),
    "btlm": ("c_proj", "c_attn"),
    "codegen": ("qkv_proj",),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "mpt": ("Wqkv",),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
}
"""For LoRA and OFT, and for methods without entries of their own."""

_ALL_LINEAR: dict[str, tuple[str, ...]] = {
    "bart": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "deberta-v2": ("query_proj", "key_proj", "value_proj", "dense"),
    "mt5": ("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "t5": ("q", "k", "v", "o", "wi", "wo"),
}

_VALUES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ["bart", "gemma", "gemma2", "gemma3_text", "gpt_neo", "gptj", "llama", "llama4", "mistral", "mixtral"],
        ("v_proj",),
    ),
    **dict.fromkeys(("opt", "phi", "qwen2", "qwen3"), ("v_proj",)),
    **dict.fromkeys(("bert", "roberta"), ("value",)),
    **dict.fromkeys(("mt5", "t5"), ("v",)),
    "deberta-v2": ("value_proj",),
}

OWN: dict[str, dict[str, tuple[str, ...]]] = {
    "ADALORA": {**_ALL_LINEAR, "roberta": ("query", "key", "value", "dense")},
    "ADAMSS": {"vit": ("query", "value")},
    "BEFT": _VALUES,
    "C3A": dict.fromkeys(("gpt2", "gpt_bigcode"), ("mlp.c_proj",)),
    "FOURIERFT": dict.fromkeys(("gpt2", "gpt_bigcode"), ("mlp.c_proj",)),
    "FROD": {"phi": ("q_proj", "v_proj"), "vit": ("query", "value")},
    "PVERA": {"phi": ("q_proj", "v_proj"), "dinov2": ("query", "value")},
    "SHIRA": {"phi": ("q_proj", "v_proj")},
    "VBLORA": _ALL_LINEAR,
    "VERA": {"phi": ("q_proj", "v_proj")},
    "WAVEFT": dict.fromkeys(("gpt2", "gpt_bigcode"), ("mlp.c_proj",)),
}
"""Where a method's targets are not those of `TARGETS`."""

IA3: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **dict.fromkeys(
        ["gemma", "gemma2", "gemma3_text", "llama4", "qwen2", "qwen3"],
        (("q_proj", "v_proj", "down_proj"), ("down_proj",)),
    ),
    **dict.fromkeys(("llama", "mistral"), (("k_proj", "v_proj", "down_proj"), ("down_proj",))),
    **dict.fromkeys(("bert", "roberta"), (("key", "value", "output.dense"), ("output.dense",))),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), (("c_attn", "mlp.c_proj"), ("mlp.c_proj",))),
    **dict.fromkeys(
        ("RefinedWeb", "RefinedWebModel", "falcon", "gpt_neox"),
        (("query_key_value", "dense_4h_to_h"), ("dense_4h_to_h",)),
    ),
    "bart": (("q_proj", "v_proj", "fc2"), ("fc2",)),
    "bloom": (("query_key_value", "mlp.dense_4h_to_h"), ("mlp.dense_4h_to_h",)),
    "deberta": (("in_proj", "output.dense"), ("output.dense",)),
    "deberta-v2": (("key_proj", "value_proj", "output.dense"), ("output.dense",)),
    "gpt_neo": (("q_proj", "v_proj", "c_proj"), ("c_proj",)),
    "gptj": (("q_proj", "v_proj", "fc_out"), ("fc_out",)),
    "mixtral": (("k_proj", "v_proj", "w2"), ("w2",)),
    "mt5": (("k", "v", "wi_1"), ()),
    "opt": (("q_proj", "k_proj", "fc2"), ("fc2",)),
    "phi": (("q_proj", "v_proj", "fc2"), ("fc2",)),
    "t5": (("k", "v", "wo"), ("wo",)),
}
"""IA3's targets and feed-forward modules."""


_AROUND = ("input_layernorm", "post_attention_layernorm")

_ALONE: dict[str, dict[str, tuple[str, ...]]] = {
    "LN_TUNING": {
        "bart": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
        "blip-2": ("layernorm", "LayerNorm", "final_layer_norm", "self_attn_layer_norm"),
        **dict.fromkeys(("bloom", "falcon"), (*_AROUND, "ln_f")),
        **dict.fromkeys(("gemma", "llama", "mistral"), (*_AROUND, "norm")),
        **dict.fromkeys(
            ("gemma2", "gemma3_text"),
            (*_AROUND, "pre_feedforward_layernorm", "post_feedforward_layernorm", "norm"),
        ),
        "gpt2": ("ln_1", "ln_2", "ln_f"),
        "gptj": ("ln_1", "ln_f"),
        "llava": ("multi_modal_projector", *_AROUND, "norm", "embed_tokens", "lm_head"),
        **dict.fromkeys(("mt5", "t5"), ("layer_norm", "final_layer_norm")),
        "phi": ("input_layernorm", "final_layernorm"),
        **dict.fromkeys(("qwen2", "qwen3"), ("post_attention_layernorm",)),
    },
    "TRAINABLE_TOKENS": {},
    "OSF": {
        **dict.fromkeys(
            ("gemma", "gemma2", "gemma3_text", "llama", "llama4", "mistral", "mixtral", "phi", "qwen2", "qwen3"),
            ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"),
        ),
        **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn", "c_proj")),
        "bloom": ("query_key_value", "dense_4h_to_h"),
        "falcon": ("query_key_value", "dense_4h_to_h"),
        "gpt_neox": ("query_key_value", "dense_4h_to_h"),
        "gptj": ("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"),
        "opt": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    },
}
"""Targets of methods for which LoRA's cannot stand."""


def targets_by_type(method: str) -> dict[str, list[str] | str]:
    """Return the targets that configs of a method have by default, by type of model: PEFT's tables, or else LoRA's.

    >>> targets_by_type("LORA")["gpt2"], targets_by_type("IA3")["llama"]
    (['c_attn'], ['k_proj', 'v_proj', 'down_proj'])
    """
    found: dict[str, Any] = {kind: one[0] for kind, one in IA3.items()} if method == "IA3" else dict(TARGETS)
    found = dict(_ALONE.get(method, found))
    found.update(OWN.get(method, {}))
    return {kind: one if isinstance(one, str) else list(one) for kind, one in found.items()}


def with_targets(config: C, model: nn.Module, modules: Mapping[str, nn.Module] | None = None) -> C:
    """Return a copy of the config that names its targets as the model has them.

    Where it names none and the model's type is in PEFT's table, these are the table's. Names that layers of experts had
    before they were fused mean the fused parameters.

    Args:
        config: An adapter's config.
        model: The model.
        modules: Its modules by name; by default those of `named_modules`.

    >>> import types
    >>> from torchgraft.adapters import LoraConfig
    >>> model = nn.Linear(2, 2)
    >>> model.config = types.SimpleNamespace(model_type="llama")
    >>> sorted(with_targets(LoraConfig(), model).target_modules)
    ['q_proj', 'v_proj']
    """
    about: Any = getattr(model, "config", None)
    kind = about.get("model_type") if isinstance(about, dict) else getattr(about, "model_type", None)
    if kind is None:
        return config
    modules = dict(model.named_modules(remove_duplicate=False)) if modules is None else modules
    config = with_new_names(config, kind, modules, model)
    return config if config.target_modules is not None else _with_defaults(config, kind)


def _with_defaults(config: C, kind: str) -> C:
    method = config.method.name
    if method == "IA3":
        if kind not in IA3:
            return config
        fields: dict[str, Any] = {"target_modules": list(IA3[kind][0]), "feedforward_modules": list(IA3[kind][1])}
        return dataclasses.replace(config, **fields)
    targets = _ALONE[method].get(kind) if method in _ALONE else OWN.get(method, {}).get(kind, TARGETS.get(kind))
    return dataclasses.replace(config, target_modules=list(targets) if isinstance(targets, tuple) else targets)
