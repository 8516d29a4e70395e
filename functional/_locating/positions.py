"""Positions: the axes of a site's input that may have the tokens of each row, and what changes along them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .finder import Declared
from .layout import Place, Record, finite, numbers
from .marks import Codes
from .observed import Seen


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


class Uneven(Exception):
    """Sites that are not called as they were when rows were looked for.

    Args:
        path: The first of them.
    """

    def __init__(self, path: str):
        super().__init__(path)
        self.path = path


def said_of(path: str, place: Place, declared: Declared) -> Place | None:
    """Return a place with the tokens that the user says it has; `None` where that is not said."""
    axis = declared.tokens(path, place.ndim)
    if axis is None or place.layout.axis is None:
        return None
    return dataclasses.replace(place, layout=place.layout.with_tokens(axis))


def candidates_at(
    sites: Sequence[Seen], record: Record, declared: Declared, tokens: int, count: int
) -> list[tuple[str, list[tuple[Candidate, Tensor | None]]]]:
    """Return the axes that may have tokens at each call of a site, each with its input `"copies tokens numbers"`.

    Raises:
        Uneven: The sites are not called as they were when rows were looked for.
    """
    indices: dict[str, int] = {}
    calls = []
    for seen in sites:
        index = indices[seen.path] = indices.get(seen.path, -1) + 1
        places = record.places.get(seen.path, ())
        if index >= len(places):
            raise Uneven(seen.path)
        calls.append((seen.path, list(_views(seen, places[index], declared, tokens, count))))
    if indices != {path: calls - 1 for path, calls in record.counts.items() if calls}:
        raise Uneven(next(iter(record.places), ""))
    return calls


def _views(
    seen: Seen, place: Place, declared: Declared, tokens: int, count: int
) -> Iterator[tuple[Candidate, Tensor | None]]:
    said, rows = said_of(seen.path, place, declared), dataclasses.replace(place.layout, tokens=None)
    if said is not None:
        yield Candidate(said), None
        return
    if rows.axis is None:
        return
    x = rows.to_rows(numbers(seen.x), count)
    x = x if seen.axes < seen.ndim else x.unsqueeze(-1)
    folded = [0] if len(x) == count * tokens else []
    for axis in folded or (range(1, seen.axes) if len(x) == count else ()):
        if axis == 0 or x.shape[axis] == tokens:
            layout = dataclasses.replace(rows, tokens=axis)
            apart = x.movedim(axis, 1) if axis else x.unflatten(0, (count, tokens))
            yield Candidate(dataclasses.replace(place, layout=layout)), apart.flatten(2)


def keeps(record: Record, calls: Calls) -> bool:
    """Return whether tokens are still where a record has them."""
    indices: dict[str, int] = {}
    kept = []
    for path, candidates in calls:
        index = indices[path] = indices.get(path, -1) + 1
        kept.append(any(one.follows and one.causal and one.place == record.places[path][index] for one in candidates))
    return all(kept)


def judge(candidate: Candidate, changed: Tensor, codes: Codes, own: bool) -> None:
    """Hold what changed, `"copies tokens"`, against what was changed."""
    sets, cuts, borders = (t.to(changed.device) for t in (codes.sets, codes.cuts, codes.borders))
    missing = own and bool((sets & ~changed).any())
    leaked = (changed & ~sets).any(1)
    candidate.follows &= not (missing or bool(leaked[borders].any()))
    candidate.causal &= not bool(leaked[cuts].any())


def changed_in(x: Tensor) -> Tensor:
    """Return whether each position of the copies differs from the first one, by more than the last one does.

    A token is one of many that attention adds up, so the least difference counts; the first and the last copy are the
    same, and tell what is rounding.
    """
    broken = x.isfinite() != x[:1].isfinite()
    x = finite(x)
    first, last = x[:1], x[-1:]
    noise = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps * first.abs() + (last - first).abs()
    return (((x - first).abs() > 8 * noise.amax(1, keepdim=True)) | broken)[1:-1].any(-1)
