"""Statistics of data for initialisations: tensors by module, kept in memory beside a config."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Statistics:
    """Tensors that data gave for each module, as `fit_eva`, `fit_corda` and `fit_lora_ga` put them into a config.

    Never written to a file. Copies of a config share them.

    Attributes:
        kind: The initialisation that they are for (`"eva"`).
        sites: The tensors by module and name.

    >>> Statistics("eva", {"head": {}})
    Statistics('eva', 1 modules)
    """

    kind: str
    sites: Mapping[str, Mapping[str, Tensor]]

    def __deepcopy__(self, memo: dict[int, Any]) -> Statistics:
        return self

    def __repr__(self) -> str:
        return f"Statistics({self.kind!r}, {len(self.sites)} modules)"
