"""Calls that route by tokens: what they refuse, and where their rows change adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .._locating.inputs import Inputs, tensors_in
from .._routing.route import Routed
from .._unsupported import UnsupportedCall
from .bound_model import BoundModel


def check_tokens(bound: BoundModel, active: Mapping[str, Any]) -> None:
    """Refuse stacks that are routed by tokens beside others, or on layers that do not work token by token."""
    stacks = {name: tree for name, tree in active.items() if isinstance(tree, Routed)}
    first, *others = stacks.values()
    for other in others:
        if other.tokens != first.tokens:
            raise ValueError(
                f"route: adapters are routed over rows of {first.tokens} and of {other.tokens} tokens in one call; "
                "give each of them rows of the same shape, (batch, tokens)"
            )
    for name in stacks if first.tokens > 1 else ():
        for path, site in bound.binding.sites[name].items():
            if not site.routing.by_token:
                raise UnsupportedCall(
                    f"{path}: it is a site of kind {site.kind!r}, which does not work token by token, in a call that "
                    "routes by tokens; use one adapter for each row, rows of shape (batch,), or target linear layers "
                    "and embeddings only"
                )


def check_sizes(inputs: Inputs, size: int, tokens: int) -> None:
    """Refuse rows of tokens that the inputs do not have."""
    shapes = [tuple(x.shape[:2]) for x in tensors_in(inputs) if x.ndim > 1 and not x.is_nested]
    if (size, tokens) not in shapes:
        have = f"have {shapes[0][0]} x {shapes[0][1]}" if shapes else "have no tensor with two axes"
        raise ValueError(
            f"route: rows has {size} x {tokens}, the inputs {have}; give an index for each token of the inputs of this "
            "call, shape (batch, tokens), or one for each row, shape (batch,)"
        )


def borders_of(stacks: Sequence[Routed]) -> list[list[int]]:
    """Return the tokens of each row that have another adapter than the one before, where that can be read."""
    tokens, size = stacks[0].tokens, stacks[0].batch
    borders: list[set[int]] = [set() for _ in range(size)]
    for stack in stacks:
        values = stack.rows.values
        for place in range(size * tokens) if values is not None else ():
            if place % tokens and values[place] != values[place - 1]:  # type: ignore[index]
                borders[place // tokens].add(place % tokens)
    return [sorted(cuts) for cuts in borders]
