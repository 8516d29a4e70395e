"""What conversion lost: the error of each module, measured on what is returned."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType


@dataclasses.dataclass(frozen=True)
class ModuleError:
    """The error at one module.

    Attributes:
        rank: Rank of the LoRA there; 0 where there is none.
        norm: Frobenius norm of the change of the weight.
        error: Frobenius norm of the difference between that and the LoRA's, rounding to its dtype included.
    """

    rank: int
    norm: float
    error: float

    @property
    def relative(self) -> float:
        """`error / norm`; 0 where both are."""
        return self.error / self.norm if self.norm else (math.inf if self.error else 0.0)


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """The errors of a conversion; `print` shows them.

    Attributes:
        modules: The error at each module, by path.
        left_out: Tensors that changed and are in no part of the result, by name, with the norm of their change.

    >>> report = ConversionReport({"q": ModuleError(4, 2.0, 0.1), "v": ModuleError(4, 1.0, 0.0)})
    >>> report.worst, round(report.relative, 3)
    ('q', 0.045)
    """

    modules: Mapping[str, ModuleError]
    left_out: Mapping[str, float] = dataclasses.field(default_factory=lambda: MappingProxyType({}))

    @property
    def relative(self) -> float:
        """The error of all modules together, relative to the norm of all changes."""
        norm = math.hypot(*(one.norm for one in self.modules.values()))
        error = math.hypot(*(one.error for one in self.modules.values()))
        return ModuleError(0, norm, error).relative

    @property
    def worst(self) -> str:
        """The module with the largest relative error."""
        return max(self.modules, key=lambda path: self.modules[path].relative)

    def __str__(self) -> str:
        width = max(len("module"), *(len(path) for path in self.modules), *(len(name) for name in self.left_out))
        lines = [f"{'module':<{width}}  rank      norm  relative error"]
        lines += [
            f"{path:<{width}}  {one.rank:>4}  {one.norm:>8.3g}  {one.relative:>14.2e}"
            for path, one in self.modules.items()
        ]
        lines.append(f"{'together':<{width}}  {'':>4}  {'':>8}  {self.relative:>14.2e}")
        lines += [f"{name:<{width}}  left out, its change has norm {norm:.3g}" for name, norm in self.left_out.items()]
        return "\n".join(lines)
