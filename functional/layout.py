"""Layouts: where the rows of a batch are in the input of a site."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import optree
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .site import Site


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a site's input has the rows.

    Attributes:
        axis: The axis of the batch; `None` for an input that all rows share, with a leading axis of 1.
        minor: Whether the rows are repeated one after the other (`torch.cat([x, x])`) instead of each in succession
            (`x.repeat_interleave(2, 0)`), where the axis is a multiple of them.
    """

    axis: int | None = 0
    minor: bool = False

    def to_rows(self, x: Tensor, size: int) -> Tensor:
        """`x` with the rows leading, each one's parts in succession.

        >>> Layout(1).to_rows(torch.zeros(5, 2, 3), 2).shape
        torch.Size([2, 5, 3])
        """
        if self.axis is None:
            return x.expand(size, *x.shape[1:])
        x = x.movedim(self.axis, 0) if self.axis else x
        return x.unflatten(0, (-1, size)).transpose(0, 1).flatten(0, 1) if self.minor else x

    def from_rows(self, y: Tensor, size: int) -> Tensor:
        """The inverse of `to_rows`, for what a module made of it."""
        if self.axis is None:
            return y
        y = y.unflatten(0, (size, -1)).transpose(0, 1).flatten(0, 1) if self.minor else y
        return y.movedim(0, self.axis) if self.axis else y


LEADING = Layout()

Found = dict[tuple[Any, str, int], Layout | None]
"""Layouts by kind of call, path and number of axes."""


class Finder:
    """Finds layouts in one call; what it has seen once is kept for all calls of a graft.

    Args:
        found: What is known, shared by the calls.
        args: The call's positional arguments.
        kwargs: The call's keyword arguments.
        run: Runs the base on other arguments and returns each site's inputs, in the order of their calls.
    """

    __slots__ = ("args", "found", "kwargs", "run")

    def __init__(self, found: Found, args: tuple, kwargs: Mapping[str, Any], run: Callable[..., list]):
        self.found, self.args, self.kwargs, self.run = found, args, kwargs, run

    def find(self, path: str, ndim: int, size: int) -> Layout | None:
        """The layout of a site's input of `ndim` axes, or `None` where it cannot be told."""
        kind = _kind_of(self.args, self.kwargs)
        key = (kind, path, ndim)
        if key not in self.found and _may_probe():
            seen = probe(self.run, self.args, self.kwargs, size)
            self.found.update({(kind, *where): layout for where, layout in seen.items()})
            self.found.setdefault(key, None)
        return self.found.get(key)


def locate(site: Site, x: Tensor, size: int, declared: int | None, finder: Finder | None) -> Layout:
    """Where the input of a site has `size` rows.

    Args:
        site: The site.
        x: Its input.
        size: Number of rows.
        declared: The axis that the user named.
        finder: Tells what sizes alone leave open.

    Raises:
        ValueError: The rows are nowhere, or could be in several places.
    """
    spatial = len(site.kernel_size)
    axes = x.shape[: x.ndim - (0 if site.kind == "embedding" else 1 + spatial)]
    if declared is not None:
        axis = declared + x.ndim if declared < 0 else declared
        if axis < len(axes) and axes[axis] % size == 0:
            return Layout(axis)
        raise ValueError(
            f"{site.path}: its input has shape {tuple(x.shape)}, and route(..., batch_dim={declared}) asks for "
            f"{size} rows, or a multiple, along axis {declared}"
        )
    if axes and (size == 1 or (axes[0] == size and all(other % size for other in axes[1:]))):
        return LEADING
    layout = finder.find(site.path, x.ndim, size) if finder else None
    if layout is not None and _fits(layout, axes, size):
        return layout
    raise ValueError(_doubt(site.path, x, axes, size))


def _fits(layout: Layout, axes: tuple[int, ...], size: int) -> bool:
    if layout.axis is None:
        return bool(axes) and axes[0] == 1
    return layout.axis < len(axes) and axes[layout.axis] % size == 0


def _doubt(path: str, x: Tensor, axes: tuple[int, ...], size: int) -> str:
    possible = [axis for axis, length in enumerate(axes) if length and length % size == 0]
    start = f"{path}: its input has shape {tuple(x.shape)} in a call that routes {size} rows"
    if not possible:
        return (
            f"{start}, and no axis has {size} of them or a whole multiple. Its rows were mixed or regrouped inside the "
            "model (experts, packed sequences), or the model's inputs do not have them along axis 0. Give rows one "
            "index for each row of the inputs, or leave this module out of target_modules"
        )
    axes_named = " or ".join(f"axis {axis}" for axis in possible)
    return (
        f"{start}, which could be along {axes_named}, and it is not known where. Outside of torch.compile and "
        "torch.vmap a call finds out by running the base on a few rows of its inputs, those whose leading axis has "
        f"{size} or a multiple, so call the graft once like that first; or declare the axis, as in "
        f"route(stacked, rows, batch_dim={possible[0]}), where each row's parts are in succession"
    )


def _kind_of(args: tuple, kwargs: Mapping[str, Any]) -> tuple:
    """What may decide which way a model arranges its rows: the arguments given, and their numbers of axes."""
    named: list[tuple[Any, Any]] = [*enumerate(args), *((name, kwargs[name]) for name in sorted(kwargs))]
    return tuple(
        (name, value.ndim if isinstance(value, Tensor) else value if isinstance(value, bool) else type(value))
        for name, value in named
        if value is not None
    )


def _may_probe() -> bool:
    if torch.compiler.is_compiling():
        return False
    level = torch._C._functorch.peek_interpreter_stack() if torch._C._functorch.maybe_current_level() else None
    return level is None or level.key() == torch._C._functorch.TransformType.Grad


# -- looking ------------------------------------------------------------------------------------------------------


def probe(
    run: Callable[..., list], args: tuple, kwargs: Mapping[str, Any], size: int
) -> dict[tuple[str, int], Layout | None]:
    """Run the base on two and on three of the rows and see where they go in each site's input.

    Args:
        run: `(args, kwargs) -> [(path, input)]`, the inputs of all sites in the order of their calls.
        args: Positional arguments of a call.
        kwargs: Keyword arguments.
        size: Number of rows in these.

    Returns:
        Layouts by path and number of axes; `None` where what is seen is contradictory.
    """
    batch = _batch(args, kwargs, size)
    if batch is None:
        return {}
    length, other, twist = batch
    try:
        two, three = (
            run(*_select((args, dict(kwargs)), length, length // size, picks, twist))
            for picks in ([0, other], [0, other, other])
        )
    except Exception:
        return {}  # a model that refuses other batch sizes: the caller says what to do
    found: dict[tuple[str, int], Layout | None] = {}
    conflicts: set[tuple[str, int]] = set()
    for (path, x2), (path3, x3) in zip(two, three, strict=False):
        key = (path, x2.ndim)
        layout = _compare(x2, x3) if path == path3 and x2.ndim == x3.ndim else None
        if found.setdefault(key, layout) != layout:
            conflicts.add(key)
    return {key: None if key in conflicts or len(two) != len(three) else layout for key, layout in found.items()}


def _batch(args: tuple, kwargs: Mapping[str, Any], size: int) -> tuple[int, int, bool] | None:
    """The length of the inputs' batch axis, a row that differs from the first, and whether it must be made to."""
    tensors = [x for x in optree.tree_leaves((args, dict(kwargs))) if isinstance(x, Tensor) and x.ndim]
    lengths = [len(x) for x in tensors if len(x) and len(x) % size == 0]
    if not lengths:
        return None
    length = size if size in lengths else lengths[0]
    step = length // size
    parts = [x.detach().unflatten(0, (size, step)) for x in tensors if len(x) == length]
    for other in range(1, size):
        if any(not torch.equal(part[0], part[other]) for part in parts):
            return length, other, False
    return length, 1, True


class _Rows(TorchFunctionMode):
    """While it is on, `copy.deepcopy` of a tensor with a batch axis takes some of its rows only."""

    def __init__(self, length: int, step: int, picks: list[int], twist: bool):
        super().__init__()
        self.length, self.step, self.picks, self.twist = length, step, picks, twist

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__:
            return func(*args, **(kwargs or {}))
        x, memo = args
        with torch._C.DisableTorchFunction():
            if id(x) not in memo:
                memo[id(x)] = self.select(x.detach())
        return memo[id(x)]

    def select(self, x: Tensor) -> Tensor:
        if x.ndim == 0 or len(x) != self.length:
            return x.clone()
        parts = [x[self.step * pick : self.step * (pick + 1)] for pick in self.picks]
        if self.twist and x.ndim > 1:
            parts[1:] = [part.roll(1, -1) for part in parts[1:]]
        return torch.cat(parts)


def _select(inputs: Any, length: int, step: int, picks: list[int], twist: bool) -> Any:
    with _Rows(length, step, picks, twist):
        return copy.deepcopy(inputs)


def _compare(two: Tensor, three: Tensor) -> Layout | None:
    """Where rows a, b in one input and a, b, b in another are."""
    changed = [axis for axis, (n, m) in enumerate(zip(two.shape, three.shape, strict=True)) if n != m]
    if not changed:
        return Layout(None) if two.ndim and two.shape[0] == 1 and _close(two, three) else None
    axis = changed[0]
    if len(changed) > 1 or 3 * two.shape[axis] != 2 * three.shape[axis]:
        return None
    x2, x3 = two.movedim(axis, 0), three.movedim(axis, 0)
    step = x2.shape[0] // 2
    major = (x2.unflatten(0, (2, step)), x3.unflatten(0, (3, step)))
    minor = (x2.unflatten(0, (step, 2)).transpose(0, 1), x3.unflatten(0, (step, 3)).transpose(0, 1))
    fits = [_close(b[:2], a) and _close(b[2], a[1]) for a, b in (major, minor)]
    if step == 1:
        return Layout(axis) if fits[0] else None
    return None if fits[0] == fits[1] else Layout(axis, minor=fits[1])


def _close(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    scale = 1e-3 if a.dtype.itemsize > 2 else 3e-2
    return bool((a - b).abs().max() <= scale * a.abs().max().clamp(min=1e-12))
