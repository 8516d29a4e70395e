"""What else PEFT's layers are asked for: names, sizes, the base's weight."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchgraft.functional import UnsupportedCall
from torchgraft.functional.extending import resting, whole

from ..tensors.gathering import fill
from .scaled import ScaledLayer

_SIZES = {
    "embedding": ("num_embeddings", "embedding_dim"),
    "conv1d": ("in_channels", "out_channels"),
    "conv2d": ("in_channels", "out_channels"),
    "conv3d": ("in_channels", "out_channels"),
}
"""Where modules of a kind have the sizes that linear ones have as `in_features` and `out_features`."""


class NamedLayer(ScaledLayer):
    """A module of the user's model with adapters, under the names that PEFT's layers have."""

    _casts = True

    @property
    def cast_input_dtype_enabled(self) -> bool:
        """Whether a module that is called for a leaf gets its input in the leaf's dtype; hooks may change that."""
        return self._casts

    @cast_input_dtype_enabled.setter
    def cast_input_dtype_enabled(self, enabled: bool) -> None:
        self._casts = bool(enabled)
        self.refresh()

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the base stores its weight as `"in out"`, as transformers' `Conv1D` does."""
        return any(entry.site.kind == "linear" and entry.site.transposed for entry in self._entries.values())

    @property
    def other_param_names(self) -> tuple[str, ...]:
        """Names of the attributes that hold other things by adapter: numbers, dropout modules, fixed tensors."""
        configs: list[Any] = [entry.config for entry in self._entries.values()]
        names = [name for config in configs for name in (*config.form.values, config.form.dropout) if name]
        return tuple(dict.fromkeys([*names, *self._fixed_attributes]))

    def update_layer(self, *_: Any, **__: Any) -> None:
        """Refuse: an adapter's parameters are made by an injection."""
        raise UnsupportedCall(
            "update_layer: torchgraft's layers get their adapters whole; call inject_adapter_in_model(config, model, "
            "name), or for a layer by itself Linear(layer, name, config=config) of peft.tuners.lora"
        )

    @property
    def in_features(self) -> int:
        """Size of the input: features, channels, or rows of an embedding."""
        return self._size(0)

    @property
    def out_features(self) -> int:
        """Size of the output; of an attention's queries, keys and values together."""
        return self._size(1)

    def _size(self, side: int) -> int:
        base, site = self.get_base_layer(), next((entry.site for entry in self._entries.values()), None)
        own = _SIZES.get(site.kind if site is not None else "", ("in_features", "out_features"))[side]
        found = getattr(base, own, None)
        if isinstance(found, int):
            return found
        if site is None:
            raise AttributeError(f"{type(base).__name__} has no {own}, and no adapter on it says its size")
        return (site.in_features, site.out_features)[side]

    def get_base_weight(self) -> Tensor:
        """Return the base's weight as it is now, merged adapters in it, whole and without autograd."""
        weight: Tensor = whole(resting(self.get_base_layer(), self._weight_name))
        return weight.detach()

    def set_base_weight(self, weight_data: Tensor) -> None:
        """Write to the base's weight, in place.

        Raises:
            RuntimeError: Adapters are merged into it.
            ValueError: Another shape.
        """
        base, name = self.get_base_layer(), self._weight_name
        path = next((entry.site.path for entry in self._entries.values()), type(base).__name__)
        if self.merged:
            raise RuntimeError(f"{path}: {self.merged_adapters} are merged into the weight; call unmerge() first")
        shape = tuple(getattr(base, name).shape)
        if tuple(weight_data.shape) != shape:
            raise ValueError(f"{path}: weight_data has shape {tuple(weight_data.shape)}, expected {shape}")
        fill(base, name, weight_data.detach())

    @property
    def _weight_name(self) -> str:
        return self.parameter_name or "weight"

    def _get_available_adapters(self) -> set[str]:
        return set(self._entries)

    @property
    def _available_adapters(self) -> set[str]:
        return set(self._entries)

    def _all_available_adapter_names(self) -> list[str]:
        return sorted(self._entries)

    def _get_name(self) -> str:
        entries: list[Any] = list(self._entries.values())
        methods = sorted({entry.config.method.name.lower() for entry in entries})
        kind = entries[0].config.form.layer_name(entries[0].site) if entries else type(self.base_layer).__name__
        return ".".join([*methods, kind])

    def extra_repr(self) -> str:
        """Return the name of the parameter that adapters are on."""
        return f"parameter_name={self.parameter_name!r}," if self.parameter_name else ""
