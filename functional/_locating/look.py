"""Looks: finding out where a model has the rows of a batch, and proving it, on a few of them.

A routed call is right if each row's output is that of a call with its own adapter alone. A look runs the base on
rows (a, b, c) and on (b, a, c, c), which tells where rows are in the input of each site. Then it routes random
adapters over (a, b, c), in two orders, and holds every site's input and every output, row by row, against calls with
one adapter for all. What reorders, selects or mixes rows does not pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from .finder import Declared, Finder
from .inputs import GivenSample, Inputs, Reading, Sample, choose_rows, length_of, readings, tensors_in
from .layout import LEADING, SHARED, Layout, Place, Record, compare, finite, numbers
from .observed import Observed, Seen

Outputs = tuple[dict[str, Layout], set[str]]
"""Layouts of outputs by name, and the names of lists that have an entry for each row."""


ADAPTERS = 3
"""Adapters of a proof."""


class Trial(Protocol):
    """A model as a look runs it."""

    floor: float
    """The part of a number that rounding may change."""

    def base(self, inputs: Inputs, seed: int) -> Observed:
        """Run without adapters."""
        ...

    def alone(self, adapter: int, inputs: Inputs) -> Observed:
        """Run with one random adapter for all rows."""
        ...

    def routed(self, rows: Sequence[int], finder: Finder, inputs: Inputs) -> Observed:
        """Run with a random adapter for each row."""
        ...


def look(trial: Trial, inputs: Inputs, size: int, declared: Declared, full: bool = False) -> Record:
    """Find out where a call has its rows, and prove it.

    Args:
        trial: Runs the model.
        inputs: A call's arguments.
        size: Number of rows in them.
        declared: What the user said.
        full: Whether to take all rows, not just three.

    Raises:
        ValueError: Inputs without rows, or that cannot be cut or run; a site or an output that does not follow them.
    """
    failures: list[Exception] = []
    for reading in readings(inputs, size):
        for sample in _samples(inputs, reading, size, full):
            try:
                return _look_twice(trial, sample, declared, _step(inputs, size))
            except Unproved as error:
                failures.insert(0, error)
                break
            except _Failed as failed:
                failures.append(failed.error)
    _give_up(failures, inputs, size)


def look_at(trial: Trial, sample: Sample | GivenSample, declared: Declared, step: int) -> Record:
    """Find out where some rows are, and prove it, as `look` does.

    Args:
        trial: Runs the model.
        sample: The rows.
        declared: What the user said.
        step: How many entries along the batch axis each row has.
    """
    try:
        first = trial.base(sample.first(), seed=1)
        second = trial.base(sample.second(), seed=2)
    except Exception as error:
        raise _Failed(error) from error
    record, outputs = _propose(first, second, sample.order, declared, step)
    _prove(trial, sample, record, outputs, step * sample.count)
    return record


def _look_twice(trial: Trial, sample: Sample, declared: Declared, step: int) -> Record:
    """Look twice, then with what is equal in all rows made to differ: lengths, masks, flags decide a way."""
    record = look_at(trial, sample, declared, step)
    equal = sample.equal()
    if not equal:
        return record
    varied = dataclasses.replace(sample, varied=True)
    try:
        if look_at(trial, varied, declared, step).places == record.places:
            equal = varied.equal()
    except (Unproved, _Failed):
        pass
    return Record(record.places, equal)


class _Failed(Exception):
    """A sample on which the base could not be run."""

    def __init__(self, error: Exception):
        super().__init__(str(error))
        self.error = error


def _give_up(failures: Sequence[Exception], inputs: Inputs, size: int) -> NoReturn:
    advice = (
        "give a sample that can be cut by rows to graft.look(*small_inputs, rows=...), or declare where the rows are: "
        "route(stacked, rows, batch_dim=0)"
    )
    if not failures:
        lengths = sorted({len(x) for x in tensors_in(inputs) if x.ndim and not x.is_nested})
        raise ValueError(
            f"route: rows has {size}, the inputs have {' or '.join(map(str, lengths)) or 'none'}: no tensor of its "
            f"inputs has {size} rows, or a multiple, along axis 0, so it is not known which row is whose. Give rows "
            "one index for each row of the inputs; or " + advice
        )
    if isinstance(failures[0], Unproved):
        raise failures[0] from None
    raise ValueError(
        f"route: a first call of this kind runs the model on a few of its {size} rows to see where they go, and that "
        f"failed with {type(failures[0]).__name__}: {str(failures[0])[:500]}. If the whole batch runs, {advice}"
    ) from failures[0]


class Unproved(ValueError):
    """A site or an output that does not follow the rows of a batch, or their tokens.

    Args:
        message: What it is, and what to do.
        reached: How many calls of sites followed them.
    """

    def __init__(self, message: str, reached: int = 0):
        super().__init__(message)
        self.reached = reached


def _samples(inputs: Inputs, reading: Reading, size: int, full: bool) -> list[Sample]:
    """Return the samples to run: rolled rows first, then rows as they are, for models that refuse these."""
    if full and size > 1:
        return [Sample(inputs, reading, size, [(row, 0) for row in range(size)])]
    picks = choose_rows(inputs, reading.axis, size)
    still = [(row, 0) for row, _ in picks]
    return [Sample(inputs, reading, size, rows) for rows in ([picks] if picks == still else [picks, still])]


def _step(inputs: Inputs, size: int) -> int:
    return (length_of(inputs, size) or size) // size


# -- where the rows are ---------------------------------------------------------------------------------------------


def _propose(
    first: Observed, second: Observed, order: Sequence[int], declared: Declared, step: int
) -> tuple[Record, Outputs]:
    """Return where rows are at each site and in each output."""
    count = len(set(order))
    places: dict[str, list[Place]] = {}
    for i, (seen, other) in enumerate(zip(first.sites, second.sites, strict=False)):
        if seen.path != other.path:
            raise Unproved(_uneven(seen.path, count, len(order)))
        layout = _layout_of(seen, other, order, declared)
        if layout is None or (layout == SHARED and not (seen.ndim and seen.shape[0] == 1)):
            raise Unproved(_astray(seen, "its input does not follow them", i))
        even = layout.axis is not None and seen.shape[layout.axis] == count * step
        places.setdefault(seen.path, []).append(Place(seen.ndim, layout, even))
    longer, shorter = sorted((first.sites, second.sites), key=len, reverse=True)
    if len(longer) > len(shorter):
        raise Unproved(_uneven(longer[len(shorter)].path, count, len(order)))
    return Record(places), _layouts_of_outputs(first, second, order, declared)


def _layouts_of_outputs(first: Observed, second: Observed, order: Sequence[int], declared: Declared) -> Outputs:
    """Return where rows are in each output, and which lists among these have an entry for each row."""
    counts = len(set(order)), len(order)
    few, more = first.lists(), second.lists()
    lists = {name for name in few if (few[name], more.get(name)) == counts}
    given, other = first.joined(lists), second.joined(lists)
    layouts: dict[str, Layout] = {}
    for name in dict.fromkeys((*given, *other)):
        if declared.lets_pass(name):
            continue
        a, b = given.get(name), other.get(name)
        layout = None if a is None or b is None else compare(a, b, order, a.ndim)
        if layout is None:
            raise Unproved(_mixed(name))
        layouts[name] = layout
    return layouts, lists


def _layout_of(a: Seen, b: Seen, order: Sequence[int], declared: Declared) -> Layout | None:
    layout = declared.layout(a.path, a.ndim)
    return layout or (compare(a.x, b.x, order, a.axes) if a.ndim == b.ndim else None)


# -- the proof ------------------------------------------------------------------------------------------------------


def _prove(trial: Trial, sample: Sample | GivenSample, record: Record, outputs: Outputs, length: int) -> None:
    """Compare routed runs with runs with one adapter for all rows."""
    count = sample.count
    alone = [trial.alone(adapter, sample.first()) for adapter in range(ADAPTERS)]
    for shift in (0, 2):
        rows = [(row + shift) % ADAPTERS for row in range(count)]
        finder = Finder(record, length)
        routed = trial.routed(rows, finder, sample.first())
        _prove_sites(trial.floor, record, routed, alone, rows)
        layouts, lists = outputs
        given, others = routed.joined(lists), [run.joined(lists) for run in alone]
        for name, layout in layouts.items():
            parts = [outputs_of_run.get(name) for outputs_of_run in others]
            output = given.get(name)
            if output is None or not _agree(trial.floor, output, parts, layout, rows):
                raise Unproved(_mixed(name))


def _prove_sites(
    floor: float, record: Record, routed: Observed, alone: Sequence[Observed], rows: Sequence[int]
) -> None:
    counts: dict[str, int] = {}
    for i, seen in enumerate(routed.sites):
        index = counts[seen.path] = counts.get(seen.path, -1) + 1
        places = record.places.get(seen.path, ())
        parts = [run.sites[i].x if i < len(run.sites) and run.sites[i].path == seen.path else None for run in alone]
        if index >= len(places) or not _agree(floor, seen.x, parts, places[index].layout, rows):
            raise Unproved(_astray(seen, "with an adapter for each row its input is not what it is with one alone", i))
    for run in alone:
        if len(run.sites) > len(routed.sites):
            raise Unproved(_uneven(run.sites[len(routed.sites)].path, len(rows), len(rows)))


def _agree(floor: float, tensor: Tensor, alone: Sequence[Tensor | None], layout: Layout, rows: Sequence[int]) -> bool:
    """Return whether each row is that of its own adapter, to one per cent of the difference between the adapters."""
    size = len(rows)
    if any(part is None or part.ndim != tensor.ndim for part in alone):
        return False
    grown = (
        layout == SHARED
        and tensor.ndim
        and tensor.shape[0] == size
        and all(len(part) == 1 for part in alone if part is not None)
    )
    try:
        each = [_by_rows(part, layout, size) for part in alone if part is not None]
        given = _by_rows(tensor, LEADING if grown else layout, size)
    except RuntimeError:  # axes that do not split into the rows
        return False
    if any(part.shape != given.shape for part in each):
        return False
    expected = torch.stack([each[adapter][row] for row, adapter in enumerate(rows)])
    if not torch.equal(expected.isfinite(), given.isfinite()):
        return False
    given, expected, *each = map(finite, (given, expected, *each))
    if not given.numel():
        return True
    spread = torch.stack([(a - b).abs().amax(1) for a in each for b in each]).amax(0)
    bound = 0.01 * spread + floor * expected.abs().amax()
    return bool(((given - expected).abs().amax(1) <= bound).all())


def _by_rows(x: Tensor, layout: Layout, size: int) -> Tensor:
    """Return a tensor by rows, flattened: `"size numbers"`."""
    x = numbers(x)
    if layout == SHARED:
        return x.expand(size, *x.shape).reshape(size, -1)
    return layout.each(x, size).flatten(1)


# -- words ----------------------------------------------------------------------------------------------------------

_ADVICE = (
    "Use torch.vmap over the stack, call the graft with one adapter at a time, or leave such modules out of "
    "target_modules; if rows do keep apart, declare where they are: route(stacked, rows, batch_dim=0)"
)


def _astray(seen: Seen, what: str, call: int) -> str:
    return (
        f"{seen.path or 'the model'}: its input has shape {seen.shape} where the rows of a routed call were looked "
        f"for, and {what} (call {call} of an adapted module): before it the model reorders, selects, mixes or shares "
        f"rows, so that it is not known which row is whose. {_ADVICE}"
    )


def _uneven(path: str, few: int, more: int) -> str:
    return (
        f"{path or 'the model'}: is not called alike for {few} and for {more} rows, so it is not known which row is "
        f"whose: the model runs it row by row, or for some of the rows. {_ADVICE}"
    )


def _mixed(name: str) -> str:
    return (
        f"route: rows meet in {name if name == 'the output' else f'the output {name!r}'}: with an adapter for each row "
        "it is not, row by row, what it is with one alone (a loss over the batch, similarities between rows, batch "
        "statistics, rows in another order). If that is meant, say so: route(stacked, rows, mixed="
        f"[{name!r}]); the inputs of the adapted modules are proved all the same. {_ADVICE}"
    )
