"""Scaling factors of a layer's adapters, multiplied and set back."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .weights import MergingLayer


class ScaledLayer(MergingLayer):
    """A module of the user's model with adapters, some of which have a scaling factor that can be changed.

    A factor belongs to the adapter from then on: files, state dicts and grafts that are made of the model have it, and
    merged weights follow it. PEFT changes what the layer computes, and saves the old one.

    Attributes:
        adjustable: Factors that are tensors and are written in place, so that compiled calls stay, by adapter.
    """

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        self.adjustable: dict[str, Tensor] = {}

    def set_scale(self, adapter: str, scale: float) -> None:
        """Make an adapter's factor `scale` times that of its config; nothing happens where it is not on this layer.

        Raises:
            TypeError: No number.
            ValueError: A method whose factor cannot be changed, if `scale` is not 1.
        """
        if adapter in self._entries and self._has_factor(adapter, scale):
            self.write_scaling(adapter, scale * self.planned_scaling(adapter))

    def scale_layer(self, scale: float) -> None:
        """Multiply the factors of the active adapters.

        Raises:
            TypeError, ValueError: As `set_scale`; nothing is changed then.
        """
        self._multiply(scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the factors of the active adapters by `scale`, or set them back to those of the configs.

        Raises:
            TypeError, ValueError: As `set_scale`, or a `scale` of 0; nothing is changed then.
        """
        if scale is None:
            for name in self._scaled(1):
                self.write_scaling(name, self.planned_scaling(name))
        elif _number(scale) == 0:
            raise ValueError("unscale_layer: scale is 0; call unscale_layer() to have the factors of the configs again")
        else:
            self._multiply(scale, divide=True)

    def scaling_of(self, adapter: str) -> Any:
        """Return an adapter's factor: a number, or a tensor of one."""
        entry: Any = self._entries[adapter]
        return entry.config.form.values["scaling"].get(entry.config, entry.site)

    def planned_scaling(self, adapter: str) -> float:
        """Return the factor that an adapter's config says."""
        entry: Any = self._entries[adapter]
        result: float = entry.config.form.values["scaling"].planned(entry.config, entry.site)
        return result

    def write_scaling(self, adapter: str, value: Any) -> None:
        """Give an adapter another factor.

        Raises:
            RuntimeError: Something else wrote to the weights while adapters were merged.
        """
        factor = self.adjustable.get(adapter)
        if factor is not None and factor is self.scaling_of(adapter):
            if factor.device != self._beside(adapter):  # what forwards have is a copy, which would keep the old value
                self._hold_factor(adapter, value)
                return
            self.check_unwritten()
            with torch.no_grad():
                factor.fill_(value)
            if self.merged:
                self.remerge(self.merged_adapters)
            return
        self._replace_factor(adapter, value)

    def _replace_factor(self, adapter: str, value: Any) -> None:
        entry: Any = self._entries[adapter]
        self.set_constants(adapter, entry.config.form.values["scaling"].set(entry.config, entry.site, value))

    def make_adjustable(self, adapter: str) -> None:
        """Keep an adapter's factor in a tensor, beside the base, that is written in place from now on."""
        self._hold_factor(adapter, self.scaling_of(adapter))

    def _hold_factor(self, adapter: str, value: Any) -> None:
        device = self._beside(adapter)
        dtype = torch.float32 if device.type == "mps" else torch.float64  # a tensor of one entry widens nothing
        factor = torch.tensor(float(value), device="cpu" if device.type == "meta" else device, dtype=dtype)
        self._replace_factor(adapter, factor)
        self.adjustable[adapter] = factor

    def _beside(self, adapter: str) -> torch.device:
        """Return the device of the base's weight."""
        return self._entries[adapter].site.like(self.get_base_layer()).device

    def drop(self, name: str) -> None:
        """Take an adapter off this layer, its factor too."""
        super().drop(name)
        self.adjustable.pop(name, None)

    def _multiply(self, scale: Any, divide: bool = False) -> None:
        for name in self._scaled(scale):
            before = self.scaling_of(name)
            self.write_scaling(name, before / scale if divide else before * scale)

    def _scaled(self, scale: Any) -> list[str]:
        """Return the active adapters on this layer whose factor `scale` changes."""
        names = [name for name in self._active if name in self._entries]
        return [name for name in names if self._has_factor(name, scale)]

    def _has_factor(self, adapter: str, scale: Any) -> bool:
        """Return whether an adapter has a factor that can be changed; refuse to change one that cannot."""
        entry: Any = self._entries[adapter]
        value = entry.config.form.values.get("scaling")
        if value is not None and value.set is not None:
            _number(scale)
            return True
        if _number(scale) != 1:
            raise ValueError(
                f"{entry.site.path}: scale is {scale!r} for adapter {adapter!r}, and {entry.config.method.name} has no "
                "scaling factor that can be changed; multiply its parameters, or switch it off"
            )
        return False


def _number(scale: Any) -> float:
    """Return a factor as a number.

    Raises:
        TypeError: Something else.
        ValueError: One that is not finite.
    """
    single = isinstance(scale, Tensor) and scale.numel() == 1
    if isinstance(scale, bool) or not (single or isinstance(scale, (int, float))):
        raise TypeError(f"scale is {scale!r:.60}, expected a number")
    if not math.isfinite(number := float(scale)):
        raise ValueError(f"scale is {scale!r:.60}, expected a finite number")
    return number
