"""Numbers that a layer shows for each adapter, as PEFT's layers do: `layer.scaling["default"]`."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

from .weights import MergingLayer


class Values(MutableMapping[str, Any]):
    """One kind of number of a layer, by adapter name. Writing to it changes what the layer computes.

    Raises:
        KeyError: No adapter of this name has such a number on the layer.
        TypeError: A number that is fixed, such as the rank.
    """

    def __init__(self, layer: MergingLayer, name: str):
        self._layer, self._name = layer, name

    def __getitem__(self, adapter: str) -> Any:
        if adapter not in list(self):
            raise KeyError(f"no adapter {adapter!r} with a {self._name} here; there are {list(self)}")
        entry: Any = self._layer.entries[adapter]
        return entry.config.form.values[self._name].get(entry.config, entry.site)

    def __setitem__(self, adapter: str, value: Any) -> None:
        self[adapter]
        entry: Any = self._layer.entries[adapter]
        change = entry.config.form.values[self._name].set
        if change is None:
            raise TypeError(f"{entry.site.path}: {self._name} of adapter {adapter!r} is fixed; inject another adapter")
        self._layer.set_constants(adapter, change(entry.config, entry.site, value))

    def __delitem__(self, adapter: str) -> None:
        raise TypeError(f"{self._name} goes with its adapter; use delete_adapter")

    def __iter__(self) -> Iterator[str]:
        entries: Any = self._layer.entries
        return (name for name, entry in entries.items() if self._name in entry.config.form.values)

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __repr__(self) -> str:
        return repr(dict(self))
