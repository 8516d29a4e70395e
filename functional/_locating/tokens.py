"""Tokens: finding out where each row of a batch has its tokens inside a model, and proving it.

Tokens cannot be exchanged as rows are, for attention tells them apart. What can be seen is what reaches a position of
a site's input: the base runs on copies of one row in which some of the tokens are others. Token `t` is at position
`t` of an axis if

- the position changes whenever token `t` does, whichever others change (codes of which none contains another), and
- it does not change when only tokens from a later one on do (cuts).

What works token by token passes at every cut, and so does what is causal. What looks both ways, under a mask that
keeps documents apart, passes where a document ends: that is proved for a call, and not taken for others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .finder import Declared
from .inputs import Inputs, Reading, Sample, choose_rows, every_tensor, readings, unwrapped
from .layout import Place, Record, finite, numbers
from .look import Trial, Unproved
from .observed import Seen

_BORDERS = 8
"""Cuts of a look where a row changes its adapter, of all that it has."""


_CUTS = 12
"""Cuts of a look in all, some of them elsewhere."""


@dataclasses.dataclass(frozen=True)
class Codes:
    """Sets of tokens that are changed, one for each copy of a row: `"copies tokens"`.

    Attributes:
        sets: Whether each token is changed.
        cuts: Whether a set is all tokens from one on, so that earlier positions stay as they are.
        borders: Whether that one is where the row changes its adapter.
    """

    sets: Tensor
    cuts: Tensor
    borders: Tensor

    def split(self, size: int) -> Iterator[Codes]:
        """Yield them in parts of a size."""
        for part in zip(self.sets.split(size), self.cuts.split(size), self.borders.split(size), strict=True):
            yield Codes(*part)


@dataclasses.dataclass
class Candidate:
    """An axis of one call's input that may have the tokens.

    Attributes:
        place: Where that would be.
        follows: Whether each position changes with its own token, and no position before a border.
        causal: Whether no position changes before any cut.
    """

    place: Place
    follows: bool = True
    causal: bool = True


Calls = list[tuple[str, list[Candidate]]]
"""The calls of sites of one run, each with the axes that may have its tokens."""


class _Failed(Exception):
    """A sample on which the base could not be run."""


def look_at_tokens(
    trial: Trial,
    inputs: Inputs,
    size: int,
    tokens: int,
    record: Record,
    borders: Sequence[Sequence[int]],
    declared: Declared,
    full: bool = False,
) -> Record:
    """Find out where the tokens of each row are, and prove it.

    Args:
        trial: Runs the model.
        inputs: A call's arguments.
        size: Number of rows in them.
        tokens: Number of tokens in each.
        record: Where the rows are.
        borders: Of each row, the tokens that have another adapter than the one before.
        declared: What the user said.
        full: Whether to prove all borders of all rows, not just some of one.

    Returns:
        The record with tokens; it lasts where nothing but this call's borders was needed.

    Raises:
        ValueError: Inputs without tokens that differ, or that cannot be run; a site that does not follow the tokens.
    """
    failures: list[Unproved] = []
    for reading in readings(inputs, size):
        picked = [row for row in range(size) if full and borders[row]] or [_fullest(inputs, reading, size, borders)]
        marks = Marks(trial, inputs, reading, size, tokens, declared)
        for content in marks.tensors():
            try:
                found = [marks.prove(content, row, record, borders[row], full) for row in picked]
                return marks.lasting(content, picked[0], _agreed(found))
            except Unproved as error:
                failures.append(error)
            except _Failed as error:
                failures.append(_not_run(error))
    raise max(failures, key=lambda error: error.reached) if failures else Unproved(_no_tokens(size, tokens))


class Marks:
    """Copies of one row of a call's inputs in which some of the tokens are others, and runs of the base on them.

    Args:
        trial: Runs the model.
        inputs: A call's arguments.
        reading: Where these have rows.
        size: Number of rows.
        tokens: Number of tokens in each.
        declared: What the user said.
    """

    def __init__(self, trial: Trial, inputs: Inputs, reading: Reading, size: int, tokens: int, declared: Declared):
        self._trial, self._inputs, self._reading = trial, inputs, reading
        self._size, self._tokens, self._declared = size, tokens, declared

    def tensors(self) -> list[int]:
        """Return the inputs that have tokens which differ, the likeliest to be what the model reads first."""
        kinds: dict[int, int] = {}
        for i, x in enumerate(every_tensor(self._inputs)):
            if self._reading.axis(x) == 0 and len(x) == self._size and x.ndim > 1 and x.shape[1] == self._tokens:
                pool = _pool(x)
                if len(pool) and bool((pool != pool[0]).any()):
                    kinds[i] = len(pool.unique()) if x.ndim == 2 else len(pool)
        return sorted(kinds, key=lambda i: -kinds[i])

    def prove(self, content: int, row: int, record: Record, borders: Sequence[int], full: bool) -> Record:
        """Return where the tokens are, from what changes with those of one of the inputs.

        Raises:
            Unproved: A site that does not follow them.
            _Failed: The base cannot be run like this.
        """
        codes = _codes(self._tokens, borders if full else _spread(borders, _BORDERS))
        calls = self._run(content, row, record, codes)
        places: dict[str, list[Place]] = {}
        for i, (path, candidates) in enumerate(calls):
            proved = [one for one in candidates if one.follows and (one.causal or borders)]
            if not proved:
                raise Unproved(_astray(path, record.places[path][len(places.get(path, ()))], self._tokens), i)
            places.setdefault(path, []).append(max(proved, key=lambda one: one.causal).place)
        lasting = all(any(one.follows and one.causal for one in candidates) for _, candidates in calls)
        return Record(places, record.equal, lasting)

    def lasting(self, content: int, row: int, record: Record) -> Record:
        """Return the record as one of this call alone where some other input decides about tokens."""
        codes = _codes(self._tokens, ())
        cuts = Codes(codes.sets[codes.cuts], codes.cuts[codes.cuts], codes.borders[codes.cuts])
        for other in self.tensors():
            if record.lasting and other != content:
                try:
                    calls = self._run(other, row, record, cuts, own=False)
                except (Unproved, _Failed):
                    calls = []
                record = Record(record.places, record.equal, bool(calls) and _keeps(record, calls))
        return record

    def _run(self, which: int, row: int, record: Record, codes: Codes, own: bool = True) -> Calls:
        """Run the base on copies of a row, a few at a time, and see what changes."""
        found: Calls = []
        for part in codes.split(max(self._size, 4)):
            try:
                observed = self._trial.base(self._marked(which, row, part), seed=1)
            except Exception as error:
                raise _Failed(f"{type(error).__name__}: {str(error)[:500]}") from error
            calls = self._candidates(observed.sites, record, len(part.sets) + 2)
            found = found or [(path, [one for one, _ in views]) for path, views in calls]
            if len(calls) != len(found):
                raise Unproved(_uneven(record))
            for (_, candidates), (_, views) in zip(found, calls, strict=True):
                for candidate, (_, x) in zip(candidates, views, strict=True):
                    if x is not None:
                        _judge(candidate, _changed(x), part, own)
        return found

    def _marked(self, which: int, row: int, codes: Codes) -> Inputs:
        """Make arguments with copies of a row: as it is, with other tokens where a code says so, and as it is."""
        sample = Sample(self._inputs, self._reading, self._size, [(row, 0)] * (len(codes.sets) + 2))
        given = list(every_tensor(self._inputs))[which]
        inputs = sample.first()
        x = list(every_tensor(inputs))[which]
        other = _others(unwrapped(given), row)
        for i, changed in enumerate(codes.sets.to(x.device), start=1):
            x[i, changed] = other[changed]
        return inputs

    def _candidates(
        self, sites: Sequence[Seen], record: Record, count: int
    ) -> list[tuple[str, list[tuple[Candidate, Tensor | None]]]]:
        """Return the axes that may have tokens at each call of a site, each with its input `"copies tokens numbers"`.

        Raises:
            Unproved: The sites are not called as they were when rows were looked for.
        """
        indices: dict[str, int] = {}
        calls = []
        for seen in sites:
            index = indices[seen.path] = indices.get(seen.path, -1) + 1
            places = record.places.get(seen.path, ())
            if index >= len(places):
                raise Unproved(_uneven(record, seen.path))
            calls.append((seen.path, list(self._views(seen, places[index], count))))
        if indices != {path: calls - 1 for path, calls in record.counts.items() if calls}:
            raise Unproved(_uneven(record))
        return calls

    def _views(self, seen: Seen, place: Place, count: int) -> Iterator[tuple[Candidate, Tensor | None]]:
        said = self._declared.layout(seen.path, seen.ndim, by_token=True)
        tokens_axis = None if said is not None else self._declared.tokens(seen.path, seen.ndim)
        rows = dataclasses.replace(place.layout, tokens=None)
        if said is None and tokens_axis is not None and rows.axis is not None:
            said = rows.with_tokens(tokens_axis)
        if said is not None:
            yield Candidate(dataclasses.replace(place, layout=said)), None
            return
        if rows.axis is None:
            return
        x = rows.to_rows(numbers(seen.x), count)
        x = x if seen.axes < seen.ndim else x.unsqueeze(-1)
        folded = [0] if len(x) == count * self._tokens else []
        for axis in folded or (range(1, seen.axes) if len(x) == count else ()):
            if axis == 0 or x.shape[axis] == self._tokens:
                layout = dataclasses.replace(rows, tokens=axis)
                apart = x.movedim(axis, 1) if axis else x.unflatten(0, (count, self._tokens))
                yield Candidate(dataclasses.replace(place, layout=layout)), apart.flatten(2)


def _keeps(record: Record, calls: Calls) -> bool:
    """Return whether no position before a cut has changed, where a record has the tokens."""
    indices: dict[str, int] = {}
    kept = []
    for path, candidates in calls:
        index = indices[path] = indices.get(path, -1) + 1
        kept.append(any(one.causal and one.place == record.places[path][index] for one in candidates))
    return all(kept)


def _judge(candidate: Candidate, changed: Tensor, codes: Codes, own: bool) -> None:
    """Hold what changed, `"copies tokens"`, against what was changed."""
    sets, cuts, borders = (t.to(changed.device) for t in (codes.sets, codes.cuts, codes.borders))
    missing = own and bool((sets & ~changed).any())
    leaked = (changed & ~sets).any(1)
    candidate.follows &= not (missing or bool(leaked[borders].any()))
    candidate.causal &= not bool(leaked[cuts].any())


def _changed(x: Tensor) -> Tensor:
    """Return whether each position of the copies differs from the first one, by more than the last one does.

    A token is one of many that attention adds up, so the least difference counts; the first and the last copy are the
    same, and tell what is rounding.
    """
    broken = x.isfinite() != x[:1].isfinite()
    x = finite(x)
    first, last = x[:1], x[-1:]
    noise = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps * first.abs() + (last - first).abs()
    return (((x - first).abs() > 8 * noise.amax(1, keepdim=True)) | broken)[1:-1].any(-1)


# -- which tokens are changed ---------------------------------------------------------------------------------------


def _codes(tokens: int, borders: Sequence[int]) -> Codes:
    """Return the sets of tokens to change: cuts at borders and elsewhere, and sets that tell each token from others.

    >>> codes = _codes(4, [2])
    >>> codes.sets.int().tolist()[0], codes.borders.tolist()[0]
    ([0, 0, 1, 1], True)
    """
    index = torch.arange(tokens)
    rest = [cut for cut in range(1, tokens) if cut not in set(borders)]
    cuts = [*borders, *_spread(rest, max(_CUTS - len(borders), 4))]
    width = (tokens - 1).bit_length()
    bits = index[:, None].bitwise_right_shift(torch.arange(width)) & 1
    zeros = (width - bits.sum(1))[:, None].bitwise_right_shift(torch.arange(width.bit_length())) & 1
    words = torch.cat([bits, zeros], 1).T.bool()  # Berger's code: no word of a token contains that of another
    sets = torch.cat([index >= torch.tensor(cuts, dtype=torch.long)[:, None], words])
    of_cuts = torch.arange(len(sets)) < len(cuts)
    return Codes(sets, of_cuts, torch.arange(len(sets)) < len(borders))


def _spread(cuts: Sequence[int], count: int) -> list[int]:
    """Return a few of the cuts, in even steps with the first and the last.

    >>> _spread([1, 2, 3, 4, 5], 3), _spread([7], 3)
    ([1, 3, 5], [7])
    """
    if len(cuts) <= count:
        return list(cuts)
    return [cuts[i * (len(cuts) - 1) // (count - 1)] for i in range(count)]


def _fullest(inputs: Inputs, reading: Reading, size: int, borders: Sequence[Sequence[int]]) -> int:
    """Return the row with the most borders among a few that are finite and differ."""
    return max((row for row, _ in choose_rows(inputs, reading.axis, size)), key=lambda row: len(borders[row]))


def _pool(x: Tensor) -> Tensor:
    """Return the tokens of all rows that are finite, flattened: `"many numbers"`."""
    flat = unwrapped(x).flatten(0, 1).reshape(x.shape[0] * x.shape[1], -1)
    return flat[flat.isfinite().all(1)]


def _others(x: Tensor, row: int) -> Tensor:
    """Return for each token of a row another one that some row has, `"tokens ..."`.

    >>> x = torch.tensor([[3, 3, 5]])
    >>> bool((_others(x, 0) != x[0]).all())
    True
    """
    own, pool = x[row].reshape(x.shape[1], -1), _pool(x)
    first, second = pool[0], pool[(pool != pool[0]).any(1)][0]
    drawn = torch.randint(len(pool), (len(own),), generator=torch.Generator().manual_seed(0))
    picked = pool[drawn.to(x.device)]
    for spare in (first, second):
        equal = (picked == own).all(1, keepdim=True)
        picked = torch.where(equal, spare, picked)
    return picked.view(x.shape[1:])


def _agreed(records: Sequence[Record]) -> Record:
    """Return what the looks at several rows agree on.

    Raises:
        Unproved: They do not.
    """
    first = records[0]
    for record in records[1:]:
        for path, places in record:
            if places != first.places.get(path):
                raise Unproved(_uneven(first, path))
    return Record(first.places, first.equal, all(record.lasting for record in records))


# -- words ----------------------------------------------------------------------------------------------------------

_ADVICE = (
    "Use one adapter for each row, rows of shape (batch,), or leave such modules out of target_modules; if it is known "
    "where the tokens are, declare it: route(stacked, rows, batch_dim=0, tokens_dim=1)"
)


def _astray(path: str, place: Place, tokens: int) -> str:
    return (
        f"{path or 'the model'}: its input, of {place.ndim} axes, does not follow the {tokens} tokens of a call that "
        "routes by tokens: before it the model reorders, drops, adds or mixes tokens, so that it is not known which "
        "position is whose. Attention that looks both ways is followed where a mask keeps tokens of different "
        f"adapters apart, causal attention everywhere. {_ADVICE}"
    )


def _uneven(record: Record, path: str | None = None) -> str:
    named = next(iter(record.places), "") if path is None else path
    return (
        f"{named or 'the model'}: is not called alike with some tokens changed, so it is not known which of its "
        f"positions is whose: the model decides by their values. {_ADVICE}"
    )


def _not_run(error: Exception) -> Unproved:
    return Unproved(
        "route: a first call of this kind runs the model on a row of its inputs with some of the tokens changed to "
        f"see where they go, and that failed with {error}. {_ADVICE}"
    )


def _no_tokens(size: int, tokens: int) -> str:
    return (
        f"route: no tensor of the inputs has {size} rows of {tokens} tokens among which two differ, so it cannot be "
        "seen where tokens go; call the graft with such inputs first, or graft.look(*inputs, tokens=...). " + _ADVICE
    )
