"""Marks: which tokens of a row are changed to see where they go inside a model, and what they are changed to."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .inputs import unwrapped, varied

_CUTS = 12
"""Cuts of a look in all, some of them at borders."""


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

    def only_cuts(self) -> Codes:
        """Return those that are cuts."""
        return Codes(self.sets[self.cuts], self.cuts[self.cuts], self.borders[self.cuts])

    def split(self, size: int) -> Iterator[Codes]:
        """Yield them in parts of a size."""
        for part in zip(self.sets.split(size), self.cuts.split(size), self.borders.split(size), strict=True):
            yield Codes(*part)


def codes_of(tokens: int, borders: Sequence[int]) -> Codes:
    """Return the sets of tokens to change: cuts at borders and elsewhere, and sets that tell each token from others.

    >>> codes = codes_of(4, [2])
    >>> codes.sets.int().tolist()[0], codes.borders.tolist()[0]
    ([0, 0, 1, 1], True)
    """
    index = torch.arange(tokens)
    taken = set(borders)
    rest = [cut for cut in range(1, tokens) if cut not in taken]
    cuts = [*borders, *spread(rest, max(_CUTS - len(borders), 4))]
    width = (tokens - 1).bit_length()
    bits = index[:, None].bitwise_right_shift(torch.arange(width)) & 1
    zeros = (width - bits.sum(1))[:, None].bitwise_right_shift(torch.arange(width.bit_length())) & 1
    words = torch.cat([bits, zeros], 1).T.bool()  # Berger's code: no word of a token contains that of another
    sets = torch.cat([index >= torch.tensor(cuts, dtype=torch.long)[:, None], words[words.any(1)]])
    of_cuts = torch.arange(len(sets)) < len(cuts)
    return Codes(sets, of_cuts, torch.arange(len(sets)) < len(borders))


def spread(cuts: Sequence[int], count: int) -> list[int]:
    """Return a few of the cuts, in even steps with the first and the last.

    >>> spread([1, 2, 3, 4, 5], 3), spread([7], 3)
    ([1, 3, 5], [7])
    """
    if len(cuts) <= count:
        return list(cuts)
    return [cuts[i * (len(cuts) - 1) // (count - 1)] for i in range(count)]


def pool_of(x: Tensor) -> Tensor:
    """Return the tokens of all rows that are finite, flattened: `"many numbers"`."""
    flat = unwrapped(x).flatten(0, 1).reshape(x.shape[0] * x.shape[1], -1)
    return flat[flat.isfinite().all(1)]


def differs(pool: Tensor) -> bool:
    """Return whether there are two different tokens."""
    return len(pool) > 0 and bool((pool != pool[0]).any())


def others(x: Tensor, row: Tensor) -> Tensor:
    """Return for each token of a row another one that `x` has, or a bit less where all are alike: `"tokens ..."`.

    >>> others(torch.tensor([[3, 3, 5]]), torch.tensor([3, 5, 3]))
    tensor([5, 3, 5])
    """
    own, pool = row.reshape(len(row), -1), pool_of(x)
    if not differs(pool):
        return varied(row, row.shape[-1])
    first, second = pool[0], pool[(pool != pool[0]).any(1)][0]
    drawn = torch.randint(len(pool), (len(own),), generator=torch.Generator().manual_seed(0))
    picked = pool[drawn.to(x.device)]
    for spare in (first, second):
        equal = (picked == own).all(1, keepdim=True)
        picked = torch.where(equal, spare, picked)
    return picked.view(row.shape)
