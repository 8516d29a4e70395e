"""Finders: where the rows of one call are, checked against every tensor that reaches a site."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .._sites.site import Site
from .layout import LEADING, SHARED, Layout, Place, Record

BatchDim = int | Mapping[str, int] | None
"""The axis that has the batch, or the tokens, at every site or by path, where the user says so."""


@dataclasses.dataclass(frozen=True)
class Declared:
    """The user's statements about a call beside its rows.

    Attributes:
        batch_dim: The axis that has the batch, everywhere or by path.
        tokens_dim: The axis that has the tokens of each row, everywhere or by path.
        mixed: Names of outputs in which rows meet by design.
    """

    batch_dim: BatchDim = None
    tokens_dim: BatchDim = None
    mixed: tuple[str, ...] = ()

    def layout(self, path: str, ndim: int, by_token: bool = False) -> Layout | None:
        """Return where the rows of a site's input are, and their tokens if asked for; `None` where that is not said.

        >>> Declared(batch_dim=1, tokens_dim=0).layout("head", 3, by_token=True)
        Layout(axis=1, minor=False, tokens=1)
        """
        axis, tokens = axis_said(self.batch_dim, path, ndim), self.tokens(path, ndim)
        if axis is None or (by_token and tokens is None):
            return None
        return Layout(axis).with_tokens(tokens) if by_token and tokens is not None else Layout(axis)

    def tokens(self, path: str, ndim: int) -> int | None:
        """Return the axis of a site's input that is said to have the tokens."""
        return axis_said(self.tokens_dim, path, ndim)

    def lets_pass(self, output: str) -> bool:
        """Return whether an output, or what it is a part of, is declared as mixed."""
        return any(output == name or output.startswith((f"{name}.", f"{name}[")) for name in self.mixed)


class Finder:
    """The rows at each site of one call, from the record of a look at calls of its kind.

    Args:
        record: What is known of the kind; `None` where nothing is.
        length: The length of the batch of the call's inputs.
        again: Looks at the kind once more, with this call's inputs; `None` where that cannot be done.
        paths: The sites whose calls are to be counted.
    """

    __slots__ = ("again", "counts", "length", "over", "paths", "record")

    def __init__(
        self,
        record: Record | None,
        length: int | None = None,
        again: Callable[[], Record] | None = None,
        paths: Iterable[str] = (),
    ):
        self.record, self.length, self.again, self.paths = record, length, again, paths
        self.counts: dict[tuple[int, str], int] = {}
        self.over = False

    def find(self, path: str, x: Tensor, size: int, owner: Any, tokens: int = 1) -> Layout | None:
        """Return where a site's input has `size` rows.

        Args:
            path: The site's.
            x: Its input.
            size: Number of rows.
            owner: The stack that asks; each one asks at each call of a site.
            tokens: How many tokens each row has, 1 where these are not routed.

        Returns:
            The layout; `None` where nothing is known of such an input.
        """
        if self.record is None:
            return None
        if self.over or torch.compiler.is_compiling():
            if self.paths and not self.over:  # parts of a call are compiled, whose calls of sites nobody counts
                self.over = True
            return self._fit(self.record.anywhere(path, x.ndim), x, size, tokens)
        key = id(owner), path
        index = self.counts.get(key, 0)
        self.counts[key] = index + 1
        layout = self._fit(self._place(path, index), x, size, tokens)
        if layout is None and self.again is not None:
            again, self.again = self.again, None
            self.record = again()
            layout = self._fit(self._place(path, index), x, size, tokens)
        return layout

    def expect(self, path: str, ndim: int, owner: Any) -> Place | None:
        """Return where a tensor that is still to be put together will have the rows; `None` where that is not known.

        Args:
            path: The name under which such tensors were seen.
            ndim: Its number of axes.
            owner: The one that asks; each asks at each such tensor.
        """
        if self.record is None:
            return None
        if self.over or torch.compiler.is_compiling():
            place = self.record.anywhere(path, ndim)
        else:
            key = id(owner), path
            index = self.counts.get(key, 0)
            self.counts[key] = index + 1
            place = self._place(path, index)
        return place if place is not None and place.ndim == ndim else None

    def _place(self, path: str, index: int) -> Place | None:
        assert self.record is not None
        places = self.record.places.get(path, ())
        return places[index] if index < len(places) else None

    def _fit(self, place: Place | None, x: Tensor, size: int, tokens: int) -> Layout | None:
        if place is None:
            return None
        if place.holds(x.shape, size, None if torch.compiler.is_compiling() else self.length, tokens):
            return place.layout
        if tokens > 1:
            return None
        # What all rows share has rows of its own behind a site that gave it some.
        grown = place.layout == SHARED and len(x.shape) == place.ndim and x.shape[0] == size
        return LEADING if grown else None

    def finish(self) -> None:
        """End the call: check that each site was called as often as in the look.

        Raises:
            ValueError: It was not, and looking again does not explain it.
        """
        if self.record is None or self.over:
            return
        if (path := self._miscounted()) is not None and self.again is not None:
            again, self.again = self.again, None
            before, self.record = self.record, again()
            if any(
                before.places.get(other, ())[:calls] != self.record.places.get(other, ())[:calls]
                for (_, other), calls in self.counts.items()
            ):
                self.record = before
            path = self._miscounted()
        self.over = True
        if path is not None:
            seen, calls = self.record.counts.get(path, 0), self._calls(path)
            raise ValueError(
                f"{path}: was called {calls} times in a call that routes rows, and {seen} times when it was looked at "
                "on a few of them, so it is not known which rows it got; the model calls it depending on its inputs. "
                "Use torch.vmap over the stack, one adapter at a time, or leave this module out of target_modules"
            )

    def _miscounted(self) -> str | None:
        assert self.record is not None
        counted = {path for _, path in self.counts}
        for (_, path), calls in self.counts.items():
            if calls != self.record.counts.get(path, 0):
                return path
        return next((path for path in self.paths if path not in counted and self.record.counts.get(path)), None)

    def _calls(self, path: str) -> int:
        return max((calls for (_, other), calls in self.counts.items() if other == path), default=0)


def axis_said(declared: BatchDim, path: str, ndim: int) -> int | None:
    """Return the axis that the user named for a site, counted from the first."""
    axis = declared.get(path) if isinstance(declared, Mapping) else declared
    return axis + ndim if axis is not None and axis < 0 else axis


def locate(
    site: Site, x: Tensor, size: int, declared: Declared, finder: Finder | None, owner: Any, tokens: int = 1
) -> Layout:
    """Return where the input of a site has `size` rows.

    Args:
        site: The site.
        x: Its input.
        size: Number of rows.
        declared: What the user said of it.
        finder: What is known of the call.
        owner: The stack that asks.
        tokens: How many tokens each row has, 1 where these are not routed.

    Raises:
        ValueError: The rows are not where they are said to be, or it is not known where they are.
    """
    axes = x.shape[: x.ndim - site.features]
    layout = declared.layout(site.path, x.ndim, by_token=tokens > 1)
    if layout is not None:
        _check_declared(site.path, x, axes, layout, size, declared, tokens)
        return layout
    if size == tokens == 1:
        return LEADING
    layout = finder.find(site.path, x, size, owner, tokens) if finder else None
    if layout is None or (layout.tokens or 0) >= max(len(axes), 1):
        doubt = _doubt(site.path, x, axes, size, finder) if tokens == 1 else _doubt_tokens(site.path, x, size, tokens)
        raise ValueError(doubt)
    return layout


def _check_declared(
    path: str, x: Tensor, axes: tuple[int, ...], layout: Layout, size: int, declared: Declared, tokens: int
) -> None:
    axis, ndim = layout.axis, len(axes)
    assert axis is not None
    if tokens > 1:
        within = 0 <= axis < ndim and 0 <= (layout.tokens or 0) < ndim
        if not within or not layout.has_tokens(axes, size, tokens):
            raise ValueError(
                f"{path}: its input has shape {tuple(x.shape)}, and route(..., batch_dim={declared.batch_dim}, "
                f"tokens_dim={declared.tokens_dim}) asks for {size} rows of {tokens} tokens along these axes; one axis "
                f"that has both, named twice, has {size * tokens} entries"
            )
    elif not 0 <= axis < ndim or axes[axis] % size:
        raise ValueError(
            f"{path}: its input has shape {tuple(x.shape)}, and route(..., batch_dim={declared.batch_dim}) asks for "
            f"{size} rows, or a multiple, along axis {axis}"
        )


def _doubt_tokens(path: str, x: Tensor, size: int, tokens: int) -> str:
    return (
        f"{path or 'the model'}: its input has shape {tuple(x.shape)} in a call that routes {size} rows of {tokens} "
        "tokens, and it is not known where these are. A call finds out by running the base on a few of its rows, which "
        "it cannot do under torch.compile, torch.vmap, export or tracing: call the graft once outside of them with "
        "inputs of this kind, or graft.look(*inputs, tokens=...); if the model picks or regroups its tokens depending "
        "on its inputs, use one adapter for each row, or leave this module out of target_modules; or declare the axes: "
        "route(stacked, rows, batch_dim=0, tokens_dim=1)"
    )


def _doubt(path: str, x: Tensor, axes: tuple[int, ...], size: int, finder: Finder | None) -> str:
    start = f"{path or 'the model'}: its input has shape {tuple(x.shape)} in a call that routes {size} rows"
    if axes and axes[0] % size:
        start += f" (rows has {size}, and its leading axis {axes[0]}: is there one index for each row of the inputs?)"
    if finder is not None and finder.record is not None:
        return (
            f"{start}, which is not where the rows were when a call of this kind was looked at on a few of them: the "
            "model picks, regroups or repeats rows depending on its inputs. Use torch.vmap over the stack, one adapter "
            f"at a time, leave this module out of target_modules, or declare it: route(stacked, rows, batch_dim="
            f"{{{path!r}: 0}})"
        )
    possible = [axis for axis, length in enumerate(axes) if length and length % size == 0]
    where = " or ".join(f"axis {axis}" for axis in possible) or "no axis that has a multiple of them"
    return (
        f"{start}, which could be along {where}, and it is not known where. A call finds out by running the base on a "
        "few of its rows, which it cannot do under torch.compile, torch.vmap, export or tracing: call the graft once "
        "outside of them with inputs of this kind whose rows differ, or graft.look(*inputs); or declare the axis, as "
        f"in route(stacked, rows, batch_dim={possible[0] if possible else 0}), where each row's parts are in succession"
    )
