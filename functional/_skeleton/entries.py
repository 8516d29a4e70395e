"""Which row of a batch each entry of a tensor belongs to, followed through a module's forward.

Experts sort the tokens of all rows, so that a product's input does not tell which row a token is of. What happens
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

_PARTS = frozenset(("chunk", "split", "tensor_split"))

_FOLDS = frozenset(("reshape", "view", "flatten"))

_IN_PLACE = frozenset((
    "__set__", "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__ipow__",
    "__imod__", "__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__",
))  # fmt: skip


class Entries(TorchFunctionMode):
    """A context in which entries along the first axis of tensors are followed.

    A tensor that is written to is not followed any further, nor is any that shares its memory.

    Args:
        known: Tensors, each with the row of each of its entries.

    Attributes:
        lost: Whether something was multiplied of which that is not known.

    >>> x, rows = torch.ones(3, 2), torch.tensor([0, 1, 2])
    >>> with Entries([(x, rows)]) as entries:
    ...     y, unknown = x[torch.tensor([2, 0])].relu() * 2, x.flip(0)
    >>> entries.rows_of(y), entries.rows_of(unknown)
    (tensor([2, 0]), None)
    """

    def __init__(self, known: Iterable[tuple[Tensor, Tensor]]):
        super().__init__()
        self.lost = False
        self._rows: Any = WeakIdKeyDictionary()
        for x, rows in known:
            self.note(x, rows)

    def rows_of(self, x: Any) -> Tensor | None:
        """Return the row of each entry of a tensor, `None` where that is not known."""
        rows: Tensor | None = self._rows.get(x) if isinstance(x, Tensor) else None
        return rows

    def note(self, x: Tensor, rows: Tensor) -> None:
        """Say whose the entries of a tensor are."""
        self._rows[x] = rows

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        y = func(*args, **kwargs)
        name = getattr(func, "__name__", "").partition(".")[0]  # behind the point, an operator's overload
        written = kwargs.get("out", args[0] if args and _writes(name) else None)
        if written is not None:
            self._forget(written)
        elif (rows := self._after(name, y, args, kwargs)) is not None:
            for part in y if isinstance(y, (tuple, list)) else (y,):
                if isinstance(part, Tensor) and part.ndim and len(part) == len(rows):
                    self.note(part, rows)
        return y

    def _after(self, name: str, y: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """Return the rows of the result's entries, or of each tensor's where there are several."""
        if name in _BY_NUMBER:
            return self._by_number(y, (*args, *kwargs.values()))
        rows = self.rows_of(args[0]) if args else None
        if rows is None:
            return None
        x, rest = args[0], args[1:]
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
            return rows.repeat_interleave(rest[0]) if dim == 0 and rest and isinstance(rest[0], int) else None
        if name in _FOLDS and not any(isinstance(one, torch.dtype) for one in (*rest, *kwargs.values())):
            whole = y.ndim > 0 and x.numel() > 0 and len(y) % len(rows) == 0
            return rows.repeat_interleave(len(y) // len(rows)) if whole else None
        return None

    def _by_number(self, y: Any, operands: Iterable[Any]) -> Tensor | None:
        """Return the rows of the one operand that is followed, where all others are the same for each of its entries.

        Operands that are followed too have to be of the very same entries.
        """
        tensors = [x for x in operands if isinstance(x, Tensor)]
        known = [(x, rows) for x in tensors if (rows := self.rows_of(x)) is not None]
        if not known or not isinstance(y, Tensor):
            return None
        rows = known[0][1]
        followed = {id(x) for x, own in known if own is rows and x.ndim == y.ndim}
        alike = all(id(x) in followed or x.ndim < y.ndim or len(x) == 1 for x in tensors)
        return rows if followed and alike else None

    def _forget(self, written: Any) -> None:
        changed = {_memory(x) for x in (written if isinstance(written, (tuple, list)) else (written,))}
        for x in [x for x in self._rows if _memory(x) in changed]:
            del self._rows[x]


def _writes(name: str) -> bool:
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def _memory(x: Any) -> int:
    return x.untyped_storage()._cdata if isinstance(x, Tensor) and x.layout == torch.strided else 0


def _picked(x: Tensor, rows: Tensor, key: Any) -> Tensor | None:
    """Return the rows of what an index picks: entries by a vector, or parts of each entry."""
    if isinstance(key, Tensor):
        whole = key.ndim == 1 and key.dtype in (torch.int64, torch.int32, torch.bool)
        return rows[key] if whole else None
    if isinstance(key, tuple) and 1 < len(key) <= x.ndim:
        first, *others = key
        every = (first is Ellipsis and len(others) < x.ndim) or (isinstance(first, slice) and first == slice(None))
        return rows if every and all(isinstance(part, (int, slice)) for part in others) else None
    return None
