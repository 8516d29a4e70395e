"""Runs of a model that are watched: what reached each site and what came out, in few numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._tensors.placement import whole

_MANY = 2**15
"""Numbers from which a tensor is kept as a few random projections of its features."""


_DIRECTIONS = 8


_DROPOUTS = frozenset(
    {
        F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
        torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout,
        torch.dropout_, torch.alpha_dropout_, torch.feature_dropout_, torch.feature_alpha_dropout_,
    }
)  # fmt: skip


_DRAWN: dict[Any, Any] = {
    torch.rand: Tensor.uniform_,
    torch.rand_like: Tensor.uniform_,
    torch.randn: Tensor.normal_,
    torch.randn_like: Tensor.normal_,
    torch.bernoulli: None,
    **dict.fromkeys((Tensor.bernoulli_, Tensor.uniform_, Tensor.normal_, Tensor.exponential_)),
}
"""Functions that draw, and what fills a row of theirs; `None` for those that do so themselves."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """A tensor at a site.

    Attributes:
        path: The site's.
        x: The tensor, or projections of it, `"*axes directions"`.
        axes: How many axes, from the first, may have rows.
        ndim: Number of axes of the tensor itself.
        shape: Its shape.
    """

    path: str
    x: Tensor
    axes: int
    ndim: int
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Observed:
    """The results of one run: the tensors at the sites, in the order of their calls, and the outputs, by name."""

    sites: Sequence[Seen]
    outputs: Mapping[str, Tensor]

    def lists(self) -> dict[str, int]:
        """Return the lists of tensors of one shape among the outputs, by name, and how many they have."""
        by_name: dict[str, list[Tensor]] = {}
        for name, x in self.outputs.items():
            if name.endswith("]") and name[name.rindex("[") + 1 : -1].isdigit():
                by_name.setdefault(name[: name.rindex("[")], []).append(x)
        return {name: len(parts) for name, parts in by_name.items() if len({part.shape for part in parts}) == 1}

    def joined(self, lists: Collection[str]) -> dict[str, Tensor]:
        """Return the outputs, with each of these lists as one tensor: they have an entry for each row."""
        parts: dict[str, list[Tensor]] = {}
        for name, x in self.outputs.items():
            owner = name.rpartition("[")[0]
            parts.setdefault(owner if name.endswith("]") and owner in lists else name, []).append(x)
        return {name: torch.stack(tensors) if name in lists else tensors[0] for name, tensors in parts.items()}


class Recorder:
    """A recorder of what reaches the sites in runs of one model, each begun by `start`.

    Args:
        spatial: How many axes behind the features the input of a site has, by path; -1 for indices, without features.
    """

    def __init__(self, spatial: Mapping[str, int]):
        self.spatial = spatial
        self.seen: list[Seen] = []
        self._few: list[bool] = []
        self._directions: dict[Any, Tensor] = {}

    def start(self) -> None:
        """Begin another run."""
        self.seen = []

    def __call__(self, path: str, x: Any) -> None:
        if not isinstance(x, Tensor) or torch._C._functorch.maybe_current_level() is not None:
            return
        x = whole(x)
        axes = x.ndim - 1 - self.spatial.get(path, 0)
        if len(self._few) == len(self.seen):  # as the first run has it, so that runs can be compared
            self._few.append(x.numel() < _MANY or x.is_nested or x.ndim < 2 or not x.is_floating_point())
        if not self._few[len(self.seen)]:
            axes = min(axes, x.ndim - 1)  # what may have rows along all of its axes has none along its last
        kept = x.detach().clone() if self._few[len(self.seen)] else self._project(x.detach(), axes)
        self.seen.append(Seen(path, kept, axes, x.ndim, tuple(x.shape)))

    def _project(self, x: Tensor, features: int) -> Tensor:
        size, dtype = x.shape[features], torch.promote_types(x.dtype, torch.float32)
        key = size, dtype, x.device
        if key not in self._directions:
            drawn = torch.randn(size, _DIRECTIONS, generator=torch.Generator().manual_seed(size), dtype=dtype)
            self._directions[key] = drawn.to(x.device) / size**0.5
        result: Tensor = torch.tensordot(x.to(dtype), self._directions[key], dims=([features], [0]))
        return result


def outputs_of(*results: Any) -> dict[str, Tensor]:
    """Return the tensors in a run's outputs (containers, dataclasses, objects) by names such as `logits` or `[0]`.

    >>> list(outputs_of({"a": [torch.ones(1)]}))
    ['a[0]']
    """
    tensors: dict[str, Tensor] = {}
    for result in results:
        _walk(result, "", tensors, set(), 8)
    return tensors


def _walk(x: Any, name: str, tensors: dict[str, Tensor], seen: set[int], depth: int) -> None:
    if isinstance(x, Tensor):
        if not x.is_nested:
            tensors[name or "the output"] = x.detach()
        return
    opaque = (str, bytes, int, float, complex, type, nn.Module, torch.Generator)
    if x is None or id(x) in seen or depth == 0 or isinstance(x, opaque) or callable(x):
        return
    seen.add(id(x))
    if dataclasses.is_dataclass(x):
        parts = [(f".{field.name}", getattr(x, field.name, None)) for field in dataclasses.fields(x)]
    elif isinstance(x, tuple) and hasattr(x, "_fields"):
        parts = [(f".{field}", value) for field, value in zip(x._fields, x, strict=False)]
    elif isinstance(x, Mapping):
        parts = [(f".{key}" if str(key).isidentifier() else f"[{key!r}]", value) for key, value in x.items()]
    elif isinstance(x, (list, tuple)):
        parts = [(f"[{i}]", value) for i, value in enumerate(x)]
    else:
        parts = [(f".{key}", value) for key, value in getattr(x, "__dict__", {}).items()]
    for part, value in parts:
        _walk(value, f"{name}{part}".removeprefix("."), tensors, seen, depth - 1)


class _Calm(TorchFunctionMode):
    """A mode without dropout, in which what is drawn for a batch with more than one axis is the same in each row.

    So stochastic depth and noise do not hide where the rows are. Vectors stay random: they shuffle rows.
    """

    def __init__(self) -> None:
        super().__init__()
        self._drawn = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            args, kwargs = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args, {**kwargs, "dropout_p": 0.0}
            kwargs = {key: value for key, value in kwargs.items() if key != "dropout_p" or len(args) < 5}
        if func is F.multi_head_attention_forward and len(args) > 10:
            args = (*args[:10], 0.0, *args[11:])
        if func not in _DRAWN or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        return self._alike(func, func(*args, **kwargs), args, kwargs)

    def _alike(self, func: Any, y: Tensor, args: tuple[Any, ...], kwargs: Any) -> Tensor:
        """Return the drawn numbers with one row for all: the same in each run, however many rows it has."""
        if y.ndim < 2 or not len(y):
            return y
        row = torch.empty_like(y[:1])
        self._drawn += 1
        with torch.random.fork_rng([y.device] if y.is_cuda else []):
            torch.manual_seed(self._drawn)
            if func is torch.bernoulli:
                row = torch.bernoulli(args[0][:1])
            elif _DRAWN[func] is None:
                func(row, *args[1:], **kwargs)
            else:
                _DRAWN[func](row)
        return y.copy_(row.expand_as(y))


@contextlib.contextmanager
def calm(seed: int, devices: Sequence[torch.device]) -> Iterator[None]:
    """Repeat randomness from a seed within the block, and leave it as it was: torch's, Python's and NumPy's."""
    kind = devices[0].type if devices else "cuda"
    numpy: Any = sys.modules.get("numpy")
    python, other = random.getstate(), numpy.random.get_state() if numpy else None
    with torch.random.fork_rng(list(devices), device_type=kind):
        torch.manual_seed(seed)
        random.seed(seed)
        if numpy:
            numpy.random.seed(seed)
        try:
            with _Calm():
                yield
        finally:
            random.setstate(python)
            if numpy:
                numpy.random.set_state(other)
