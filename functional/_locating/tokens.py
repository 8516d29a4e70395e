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

from collections.abc import Sequence

import torch
from torch import Tensor

from .finder import Declared
from .inputs import Inputs, Reading, Sample, choose_rows, every_tensor, readings, unwrapped, varied
from .layout import Place, Record
from .look import Trial, Unproved
from .marks import Codes, codes_of, differs, others, pool_of, spread
from .positions import Calls, Uneven, candidates_at, changed_in, judge, keeps, said_of

_BORDERS = 8
"""Cuts of a look where a row changes its adapter, of all that it has."""


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
    said = {path: [said_of(path, place, declared) for place in places] for path, places in record}
    if all(None not in places for places in said.values()):
        return Record({path: [p for p in places if p is not None] for path, places in said.items()}, record.equal)
    failures: list[Unproved] = []
    for reading in readings(inputs, size):
        picked = [row for row in range(size) if full and borders[row]] or [_fullest(inputs, reading, size, borders)]
        for filled in (False, True):
            marks = Marks(trial, inputs, reading, size, tokens, declared, filled)
            for content in marks.tensors() if marks.masks() or not filled else ():
                try:
                    found = _agreed([marks.prove(content, row, record, borders[row], full) for row in picked])
                    if found.lasting and marks.is_all(content, picked[0], found):
                        return found
                    if filled:
                        raise Unproved(_decided())
                    # Masks or another input decide about tokens, and each row has its own.
                    rest = [row for row in range(size) if borders[row] and row not in picked]
                    each = [marks.prove(content, row, record, borders[row], full) for row in rest]
                    return _agreed([found, *each], lasting=False)
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
        filled: Whether masks are taken as all ones, for padding neither sees nor is seen as tokens are.
    """

    def __init__(
        self,
        trial: Trial,
        inputs: Inputs,
        reading: Reading,
        size: int,
        tokens: int,
        declared: Declared,
        filled: bool = False,
    ):
        self._trial, self._inputs, self._reading = trial, inputs, reading
        self._size, self._tokens, self._declared, self._filled = size, tokens, declared, filled

    def tensors(self) -> list[int]:
        """Return the inputs that have tokens which differ, the likeliest to be what the model reads first."""
        kinds: dict[int, int] = {}
        for i, x in enumerate(every_tensor(self._inputs)):
            if self._has_tokens(x) and differs(pool := pool_of(x)):
                kinds[i] = len(pool.unique()) if x.ndim == 2 else len(pool)
        return sorted(kinds, key=lambda i: -kinds[i])

    def masks(self) -> list[int]:
        """Return the inputs that say of each token yes or no, and not yes of all."""
        given = enumerate(every_tensor(self._inputs))
        masks = [(i, x) for i, x in given if self._has_tokens(x) and x.ndim == 2]
        return [i for i, x in masks if bool(((x == 0) | (x == 1)).all()) and bool((x == 0).any())]

    def _has_rows(self, x: Tensor) -> bool:
        return self._reading.axis(x) == 0 and len(x) == self._size

    def _has_tokens(self, x: Tensor) -> bool:
        return self._has_rows(x) and x.ndim > 1 and x.shape[1] == self._tokens

    def prove(self, content: int, row: int, record: Record, borders: Sequence[int], full: bool) -> Record:
        """Return where the tokens are, from what changes with those of one of the inputs.

        Raises:
            Unproved: A site that does not follow them.
            _Failed: The base cannot be run like this.
        """
        codes = codes_of(self._tokens, borders if full else spread(borders, _BORDERS))
        calls = self._run(content, row, record, codes)
        places: dict[str, list[Place]] = {}
        for i, (path, candidates) in enumerate(calls):
            proved = [one for one in candidates if one.follows and (one.causal or borders)]
            if not proved:
                raise Unproved(_astray(path, record.places[path][len(places.get(path, ()))], self._tokens), i)
            places.setdefault(path, []).append(max(proved, key=lambda one: one.causal).place)
        lasting = all(any(one.follows and one.causal for one in candidates) for _, candidates in calls)
        return Record(places, record.equal, lasting)

    def is_all(self, content: int, row: int, record: Record) -> bool:
        """Return whether no other input decides where tokens are.

        Those that have tokens are changed from a cut on, which may change nothing before it; those that have a number
        or a few for each row (lengths) are changed everywhere, after which all has to be as it was.
        """
        codes = codes_of(self._tokens, ())
        for i, x in enumerate(every_tensor(self._inputs)):
            if i == content or not self._has_rows(x) or not x.numel():
                continue
            try:
                if self._has_tokens(x):
                    calls = self._run(i, row, record, codes.only_cuts(), own=False)
                elif x.ndim <= 2:
                    calls = self._run(content, row, record, codes, altered=i)
                else:
                    continue
            except (Unproved, _Failed):
                return False
            if not keeps(record, calls):
                return False
        return True

    def _run(
        self, which: int, row: int, record: Record, codes: Codes, own: bool = True, altered: int | None = None
    ) -> Calls:
        """Run the base on copies of a row, a few at a time, and see what changes.

        Args:
            which: The input whose tokens are changed.
            row: The row.
            record: Where the rows are.
            codes: Which tokens.
            own: Whether each position has to change with its own token.
            altered: An input that is changed in all copies alike.
        """
        found: Calls = []
        for part in codes.split(max(self._size, 4)):
            try:
                observed = self._trial.base(self._marked(which, row, part, altered), seed=1)
            except Exception as error:
                raise _Failed(f"{type(error).__name__}: {str(error)[:500]}") from error
            try:
                calls = candidates_at(observed.sites, record, self._declared, self._tokens, len(part.sets) + 2)
            except Uneven as error:
                raise Unproved(_uneven(error.path)) from None
            found = found or [(path, [one for one, _ in views]) for path, views in calls]
            for (_, candidates), (_, views) in zip(found, calls, strict=True):
                for candidate, (_, x) in zip(candidates, views, strict=True):
                    if x is not None:
                        judge(candidate, changed_in(x), part, own)
        return found

    def _marked(self, which: int, row: int, codes: Codes, altered: int | None) -> Inputs:
        """Make arguments with copies of a row: as it is, with other tokens where a code says so, and as it is."""
        sample = Sample(self._inputs, self._reading, self._size, [(row, 0)] * (len(codes.sets) + 2))
        given = list(every_tensor(self._inputs))[which]
        inputs = sample.first()
        copies = list(every_tensor(inputs))
        for i in self.masks() if self._filled else ():
            copies[i].fill_(1)
        if altered is not None:
            copies[altered].copy_(varied(copies[altered], copies[altered].shape[-1]))
        x = copies[which]
        other = others(unwrapped(given), x[0])
        for i, changed in enumerate(codes.sets.to(x.device), start=1):
            x[i, changed] = other[changed]
        return inputs


def _fullest(inputs: Inputs, reading: Reading, size: int, borders: Sequence[Sequence[int]]) -> int:
    """Return the row with the most borders, among those that are finite if there are any."""
    good = torch.ones(size, dtype=torch.bool)
    for x in every_tensor(inputs):
        if x.is_floating_point() and reading.axis(x) == 0 and len(x) == size:
            good &= unwrapped(x).flatten(1).isfinite().all(1).cpu() if x.ndim > 1 else unwrapped(x).isfinite().cpu()
    rows = good.nonzero().flatten().tolist() or [row for row, _ in choose_rows(inputs, reading.axis, size)]
    fullest: int = max(rows, key=lambda row: len(borders[row]))
    return fullest


def _agreed(records: Sequence[Record], lasting: bool = True) -> Record:
    """Return what the looks at several rows agree on, which lasts if all of them do.

    Raises:
        Unproved: They do not.
    """
    first = records[0]
    for record in records[1:]:
        for path, places in record:
            if places != first.places.get(path):
                raise Unproved(_uneven(path))
    return Record(first.places, first.equal, lasting and all(record.lasting for record in records))


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


def _decided() -> str:
    return (
        "route: tokens are where they are expected if nothing is masked, and the inputs of this call mask some: the "
        f"model rearranges its tokens by a mask, or another input. {_ADVICE}"
    )


def _uneven(path: str) -> str:
    return (
        f"{path or 'the model'}: is not called alike with some tokens changed, so it is not known which of its "
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
