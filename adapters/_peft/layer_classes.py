"""PEFT's classes of layers: for `isinstance`, and to make one layer around a module."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from torch import nn

from .._config.base import AdapterConfig
from .._inplace import BaseTunerLayer, inject_adapter_in_model

_WHOLE: dict[str, Any] = {
    "modules_to_save": None,
    "bias": "none",
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}
"""Fields about other modules of a model, and what they are for a layer alone."""
_EXTENDED = {"LORA": ("LORA", "ADALORA")}
"""Methods whose layers are instances of another's class too, as in PEFT."""
_CLASSES = {
    "ADALORA": ("SVDLinear SVDConv2d", ""),
    "ADAMSS": ("Linear", ""),
    "BOFT": ("", "Linear Conv2d"),
    "BEFT": ("Linear", ""),
    "C3A": ("C3ALinear", ""),
    "DEFT": ("DeftLinear", ""),
    "DELORA": ("DeloraLinear", ""),
    "FOURIERFT": ("FourierFTLinear", ""),
    "FROD": ("Linear", ""),
    "GLORA": ("GloraLinear", ""),
    "GRALORA": ("", "Linear"),
    "HIRA": ("Linear Embedding Conv1d Conv2d Conv3d", ""),
    "HRA": ("HRALinear HRAConv2d", ""),
    "IA3": ("Linear Conv2d Conv3d", ""),
    "LILY": ("Linear", ""),
    "LN_TUNING": ("", "LNTuningLayer"),
    "LOHA": ("Linear Conv2d", "Conv1d"),
    "LOKR": ("Linear Conv2d", "Conv1d"),
    "LORA": ("Linear Embedding Conv2d Conv3d ParamWrapper", "Conv1d MultiheadAttention"),
    "MISS": ("MissLinear", ""),
    "OFT": ("Linear Conv2d Embedding", ""),
    "OSF": ("Linear", ""),
    "PVERA": ("Linear", ""),
    "RANDLORA": ("Linear", ""),
    "ROAD": ("Linear", ""),
    "PEANUT": ("Linear", ""),
    "POLY": ("Linear", ""),
    "PSOFT": ("Linear", ""),
    "SHIRA": ("Linear", ""),
    "SUPERTUNING": ("Linear", ""),
    "TINYLORA": ("Linear Embedding", ""),
    "UNILORA": ("Linear", ""),
    "VBLORA": ("Linear", ""),
    "VERA": ("Linear", ""),
    "WAVEFT": ("WaveFTLinear", ""),
}
"""PEFT's classes of a method's layers: those beside its config, and those in its `layer` module alone."""


class LayerClass(type):
    """Layers that carry an adapter of one method, on one kind of module or on any, under PEFT's name.

    Attributes:
        config: The config of the method.
        kind: The kind's part of the name; `""` for the class of all of the method's layers.
    """

    config: type[AdapterConfig]
    kind: str

    def __instancecheck__(cls, instance: Any) -> bool:
        """Return whether something is such a layer."""
        if not isinstance(instance, BaseTunerLayer):
            return False
        methods = _EXTENDED.get(cls.config.method.name, (cls.config.method.name,)) if not cls.kind else ()
        return any(
            entry.config.method.name in methods
            or (isinstance(entry.config, cls.config) and entry.config.form.layer_name(entry.site) == cls.kind)
            for entry in cast(Any, instance).entries.values()
        )

    def __call__(
        cls, base_layer: nn.Module, adapter_name: str = "default", config: Any = None, **fields: Any
    ) -> BaseTunerLayer:
        """Put an adapter on a module, as PEFT's constructors do: the layer around it, active and trainable.

        Args:
            base_layer: The module; it stays as it is.
            adapter_name: The adapter's name.
            config: The method's config; it is copied, and what it says of other modules has no effect.
            fields: Fields of the config that are to be others: `r=8, lora_alpha=16`. `is_feedforward` for (IA)^3, and
                `parameter_name` for LoRA on a parameter of the module.

        Raises:
            TypeError: A class of all kinds, another config or module than the class is for, unknown fields, or `r`
                without the numerator of the scaling factor, which PEFT sets to another value then.
        """
        if not cls.kind:
            raise TypeError(f"{cls.__name__} is the class of several layers; make one of {_kinds(cls.config)}")
        if not isinstance(config, cls.config):
            raise TypeError(
                f"{cls.__name__}: config is of type {type(config).__name__}, expected a {cls.config.__name__}; call "
                f"{cls.__name__}(base_layer, adapter_name, config={cls.config.__name__}(...))"
            )
        holder = nn.Module()
        holder.layer = base_layer
        trained = [(parameter, parameter.requires_grad) for parameter in base_layer.parameters()]
        inject_adapter_in_model(_for_layer(cls, config, fields), holder, adapter_name)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        made: Any = holder.layer
        if not cls.__instancecheck__(made):
            raise TypeError(
                f"{cls.__name__}: base_layer is a {type(base_layer).__name__}, for which PEFT's class is "
                f"{made.entries[adapter_name].config.form.layer_name(made.entries[adapter_name].site)}"
            )
        return cast(BaseTunerLayer, made)


def _for_layer(cls: LayerClass, config: AdapterConfig, fields: dict[str, Any]) -> AdapterConfig:
    """Return the config of an adapter on `layer` alone, with some fields set to others."""
    known = {field.name for field in dataclasses.fields(config) if field.init}
    fields = {"target_modules": ["layer"], **{name: _WHOLE[name] for name in known & _WHOLE.keys()}, **fields}
    if "feedforward_modules" in known:
        fields["feedforward_modules"] = ["layer"] if fields.pop("is_feedforward", False) else []
    if "target_parameters" in known:
        name = fields.pop("parameter_name", None)
        fields["target_parameters"] = None if name is None else [f"layer.{name}"]
        fields["target_modules"] = fields["target_modules"] if name is None else []
    fields.pop("is_target_conv_1d_layer", None)  # a fact of the module
    if "init_r" in known and "r" in fields:
        fields["init_r"] = fields.pop("r")
    numerator = next((name for name in ("lora_alpha", "alpha") if name in known), None)
    if numerator and {"r", "init_r"} & fields.keys() and numerator not in fields:
        raise TypeError(f"{cls.__name__}: r is given without {numerator}; give both, or none for the config's")
    if unknown := sorted(fields.keys() - known):
        raise TypeError(f"{cls.__name__}: {type(config).__name__} has no {', '.join(unknown)}; it has {sorted(known)}")
    return dataclasses.replace(config, **fields)


def _kinds(config: type[AdapterConfig]) -> list[str]:
    """Return the names of PEFT's classes for the kinds of modules that it has layers of a method for."""
    return " ".join(_CLASSES.get(config.method.name, ("", ""))).split()


def layer_classes(config: type[AdapterConfig]) -> dict[str, type]:
    """Return PEFT's classes for layers with a method's adapters, by name: `LoraLayer`, `Linear`, ...

    >>> from torchgraft.adapters import LoraConfig
    >>> lora = layer_classes(LoraConfig)
    >>> layer = lora["Linear"](nn.Linear(4, 3), "default", config=LoraConfig(r=2))
    >>> isinstance(layer, lora["LoraLayer"]), isinstance(layer, lora["Conv2d"])
    (True, False)
    """
    form: Any = cast(Any, config).form
    leaves = (*form.leaves, *form.shared_leaves)
    names = {
        "adapter_layer_names": tuple(dict.fromkeys((*(form.place(leaf)[0] for leaf in leaves), *form.numbered))),
        "other_param_names": tuple(name for name in (*form.values, form.dropout) if name),
    }
    of_all = config.__name__.replace("Config", "Layer")
    every = _make(of_all, (), config, "", f"Layers with an adapter of type {config.method.name}.", names)
    found = {of_all: every}
    for kind in _kinds(config):
        found[kind] = _make(kind, (every,), config, kind, f"{kind} layers with an adapter of {config.method.name}.", {})
    return found


def _make(
    name: str, bases: tuple[type, ...], config: type[AdapterConfig], kind: str, doc: str, names: dict[str, Any]
) -> type:
    return LayerClass(name, bases, {"config": config, "kind": kind, "__doc__": doc, **names})


def classes_in_package(config: type[AdapterConfig], classes: dict[str, type]) -> dict[str, type]:
    """Return those of a method's classes that PEFT offers beside its config."""
    alone = _CLASSES.get(config.method.name, ("", ""))[1].split()
    return {name: cls for name, cls in classes.items() if name not in alone}
