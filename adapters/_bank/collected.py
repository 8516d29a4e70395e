"""What the ranks of a group have collected for one adapter since its last step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .resident import Resident
from .state import State


class Collected(NamedTuple):
    """What one rank has collected for one adapter.

    Attributes:
        pending: Whether it has gradients.
        by_tokens: Whether these are sums over tokens that are counted.
        tokens: How many tokens.
    """

    pending: bool
    by_tokens: bool
    tokens: float


def collected_of(residents: Sequence[Resident], state: State) -> list[Collected]:
    """Return what this rank has collected; the tokens of adapters that have no slot now are not told."""
    tokens = state.tokens.tolist()
    return [Collected(one.pending, one.by_tokens, 0.0 if one.slot is None else tokens[one.slot]) for one in residents]


def totals_of(residents: Sequence[Resident], ranks: Sequence[Sequence[Collected]], what: str) -> list[Collected]:
    """Return what all ranks together have collected for each adapter.

    Raises:
        ValueError: Some ranks count an adapter's tokens, and others do not.
    """
    return [total(one, own, what) for one, own in zip(residents, zip(*ranks, strict=True), strict=True)]


def total(resident: Resident, ranks: Sequence[Collected], what: str) -> Collected:
    """Return what all ranks have collected for an adapter.

    Raises:
        ValueError: Some ranks count tokens, and others do not.

    >>> total(None, [Collected(True, True, 2.0), Collected(False, False, 0.0), Collected(True, True, 3.0)], "step")
    Collected(pending=True, by_tokens=True, tokens=5.0)
    """
    pending = [own for own in ranks if own.pending]
    if len({own.by_tokens for own in pending}) > 1:
        counting = [rank for rank, own in enumerate(ranks) if own.pending and own.by_tokens]
        others = [rank for rank, own in enumerate(ranks) if own.pending and not own.by_tokens]
        raise ValueError(
            f"{what}: tokens of {resident.name!r} are given on ranks {counting}, and not on ranks {others}; give them "
            "on all ranks, or on none"
        )
    return Collected(bool(pending), any(own.by_tokens for own in pending), sum(own.tokens for own in pending))


def check_pending_anywhere(residents: Sequence[Resident], totals: Sequence[Collected]) -> None:
    """Refuse to step an adapter that no rank has gradients of."""
    for resident, collected in zip(residents, totals, strict=True):
        if not collected.pending:
            raise RuntimeError(
                f"step: {resident.name!r} has no gradients on any rank since its last step; call backward in a block "
                "of bank.rows, and leave it"
            )
