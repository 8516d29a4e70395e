"""Which row of a batch each entry of a tensor belongs to, followed through a module's forward.

Experts sort the tokens of all rows, so that nobody can tell from a product's input which token is whose. What happens
to tokens on their way there is little: they are picked by index, repeated, folded, cast, and go through functions of
single numbers. Each of these says whose its result's entries are; behind anything else, that is not known any more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

_BY_NUMBER = frozenset((
    "add", "__add__", "__radd__", "sub", "__sub__", "__rsub__", "mul", "__mul__", "__rmul__", "div", "true_divide",
    "__truediv__", "neg", "__neg__", "pow", "__pow__", "square", "exp", "clamp", "clamp_min", "clamp_max", "minimum",
    "maximum", "relu", "relu6", "silu", "gelu", "sigmoid", "tanh", "softplus", "elu", "leaky_relu", "mish", "hardswish",
    "hardsigmoid", "to", "float", "double", "half", "bfloat16", "type_as", "contiguous", "clone", "detach",
))  # fmt: skip
"""Functions that compute each number of the result from those at the same place."""

_PARTS = frozenset(("chunk", "split", "tensor_split", "unbind"))

_FOLDS = frozenset(("reshape", "view", "flatten"))


class Entries(TorchFunctionMode):
    """A context in which entries along the first axis of tensors are followed.

    Attributes:
        lost: Whether something was multiplied of which that is not known.
        weights: The weights that were read on the way, by their paths.

    A tensor that is written to is not followed any further, nor is any that shares its memory.

    >>> x, rows = torch.ones(3, 2), torch.tensor([0, 1, 2])
    >>> with Entries([(x, rows)]) as entries:
    ...     y = x[torch.tensor([2, 0])].relu() * 2
    >>> entries.rows_of(y), entries.rows_of(torch.ones(3))
    (tensor([2, 0]), None)
    """

    def __init__(self, known: Iterable[tuple[Tensor, Tensor]]):
        super().__init__()
        self.lost = False
        self.weights: dict[str, Any] = {}
        self._rows: Any = WeakIdKeyDictionary()
        self._repeated: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for x, rows in known:
            self._rows[x] = rows

    def rows_of(self, x: Any) -> Tensor | None:
        """Return the row of each entry of a tensor, `None` where that is not known."""
        rows: Tensor | None = self._rows.get(x) if isinstance(x, Tensor) else None
        return rows

    def note(self, y: Tensor, rows: Tensor) -> None:
        """Say whose the entries of a tensor are."""
        self._rows[y] = rows

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        y = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        written = kwargs.get("out", args[0] if args and _writes(name) else None)
        if written is not None:
            self._forget(written)
        elif args and self.rows_of(args[0]) is not None:
            rows = self._after(name, y, args, kwargs)
            for part in y if isinstance(y, (tuple, list)) else (y,):
                if rows is not None and isinstance(part, Tensor) and part.ndim and len(part) == len(rows):
                    self._rows[part] = rows
        elif name in _BY_NUMBER and len(args) > 1 and (rows := self.rows_of(args[1])) is not None:
            self._rows.update([(y, rows)] if self._is_by_number(y, rows, args, kwargs) else ())
        return y

    def _after(self, name: str, y: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """Return the rows of the result's entries, or of each tensor's where there are several."""
        x, rest = args[0], args[1:]
        rows: Tensor = self._rows[x]
        if name in _BY_NUMBER:
            return rows if self._is_by_number(y, rows, args, kwargs) else None
        if name == "__getitem__":
            return _picked(x, rows, rest[0])
        if name == "index_select":
            dim, index = rest if len(rest) == 2 else (None, None)
            return rows[index] if dim == 0 and isinstance(index, Tensor) and index.ndim == 1 else None
        if name in _PARTS:
            dim = kwargs.get("dim", rest[1] if len(rest) > 1 else 0)
            return rows if isinstance(dim, int) and dim % x.ndim else None
        if name == "repeat_interleave":
            dim = kwargs.get("dim", rest[1] if len(rest) > 1 else None)
            return self._repeat(rows, rest[0]) if dim == 0 and rest and isinstance(rest[0], int) else None
        if name in _FOLDS and not any(isinstance(one, torch.dtype) for one in (*rest, *kwargs.values())):
            whole = y.ndim > 0 and x.numel() > 0 and len(y) % len(rows) == 0
            return self._repeat(rows, len(y) // len(rows)) if whole else None
        if name in ("unsqueeze", "squeeze"):
            dim = kwargs.get("dim", rest[0] if rest else 0)
            return rows if isinstance(dim, int) and dim % max(x.ndim, y.ndim) else None
        if name == "expand":
            return rows if y.ndim == x.ndim else None
        return None

    def _is_by_number(self, y: Any, rows: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Return whether all operands are of the same entries, or the same for each of them."""
        if not isinstance(y, Tensor) or not y.ndim or len(y) != len(rows):
            return False
        for x in (*args, *kwargs.values()):
            if isinstance(x, Tensor) and self.rows_of(x) is rows and x.ndim == y.ndim:
                continue
            if isinstance(x, Tensor) and not (x.ndim < y.ndim or len(x) == 1):
                return False
        return True

    def _repeat(self, rows: Tensor, times: int) -> Tensor:
        """Return rows that are repeated one by one, the same tensor each time."""
        if times == 1:
            return rows
        key = id(rows), times
        if key not in self._repeated:
            self._repeated[key] = rows, rows.repeat_interleave(times)
        return self._repeated[key][1]

    def _forget(self, written: Any) -> None:
        changed = {_memory(x) for x in (written if isinstance(written, (tuple, list)) else (written,))}
        for x in [x for x in self._rows if _memory(x) in changed]:
            del self._rows[x]


def _writes(name: str) -> bool:
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE


_IN_PLACE = frozenset((
    "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__ipow__", "__imod__", "__iand__", "__ior__",
    "__ixor__", "__ilshift__", "__irshift__",
))  # fmt: skip


def _memory(x: Any) -> int | None:
    return x.untyped_storage()._cdata if isinstance(x, Tensor) else None


def _picked(x: Tensor, rows: Tensor, key: Any) -> Tensor | None:
    """Return the rows of what an index picks: entries by a vector, or parts of each entry."""
    if isinstance(key, Tensor):
        whole = key.ndim == 1 and key.dtype in (torch.int64, torch.int32, torch.bool)
        return rows[key] if whole else None
    if isinstance(key, tuple) and len(key) > 1 and len(key) <= x.ndim:
        first, *others = key
        inside = all(isinstance(part, (int, slice)) for part in others)
        every = first is Ellipsis or (isinstance(first, slice) and first == slice(None))
        behind = len(others) < x.ndim if first is Ellipsis else True
        return rows if inside and every and behind else None
    return None
