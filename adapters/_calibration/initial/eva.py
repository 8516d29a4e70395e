"""EVA: the directions in which a module's inputs vary most, and ranks that go to where these explain most.

Paischer et al., *Parameter Efficient Fine-tuning via Explained Variance Adaptation*, 2024, arXiv:2410.07170; PEFT's
`tuners/lora/eva.py` and `utils/incremental_pca.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .spectral import randomised_svd

SEED = 42
"""Seed of the decompositions, as in PEFT."""
STEPS = 4
"""Steps of subspace iteration, as in PEFT."""


class Directions:
    """The first principal components of rows that come batch by batch, in memory that does not grow.

    A batch is decomposed together with what is known: the components times their singular values, and the shift of
    the mean. Ross et al., *Incremental Learning for Robust Visual Tracking*, 2008, section 3.1. Batches of fewer rows
    than there are components wait until there are enough.

    Attributes:
        count: Number of components.
        components: `"count in"`, orthonormal, the first one the largest; `None` before there are any.
        values: Their singular values.
        ratio: The share of the variance that each explains.
        found: Whether each is, up to `tau`, what it was a step ago.
        dtype: That of the rows; from the second step on, decompositions are in float64, as PEFT's.

    >>> rows = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> directions = Directions(1, 0.99)
    >>> directions.update(rows)
    >>> directions.components.abs().tolist(), round(float(directions.ratio), 3)
    ([[1.0, 0.0]], 0.9)
    """

    def __init__(self, count: int, tau: float):
        self.count, self.tau = count, tau
        self.components: Tensor | None = None
        self.values: Tensor
        self.ratio: Tensor
        self.dtype: torch.dtype
        self.found = torch.zeros(count, dtype=torch.bool)
        self._seen = 0
        self._waiting: list[Tensor] = []
        self._mean: Tensor
        self._spread: Tensor

    def update(self, rows: Tensor) -> None:
        """Take in more rows, `"rows in"`."""
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) < self.count:
            return
        rows, self._waiting = torch.cat(self._waiting), []
        self.dtype = rows.dtype
        before = self.components
        self._decompose(self._centred(rows))
        assert self.components is not None
        if before is not None:
            self.found = torch.cosine_similarity(self.components, before).cpu() >= self.tau

    def _centred(self, rows: Tensor) -> Tensor:
        """Return the rows around their mean, below a summary of all rows before; also updates the running moments."""
        new, mean = len(rows), rows.mean(0, dtype=torch.float64)
        spread = (rows - mean).square().sum(0)
        centred = rows - mean.to(rows.dtype)
        if self.components is not None:
            weight, shift = self._seen * new / (self._seen + new), self._mean - mean
            spread = self._spread + spread + weight * shift.square()
            past = self.values[:, None] * self.components
            centred = torch.cat([past, centred, weight**0.5 * shift[None]])
            mean = mean + shift * (self._seen / (self._seen + new))
        self._seen, self._mean, self._spread = self._seen + new, mean, spread
        return centred

    def _decompose(self, centred: Tensor) -> None:
        _, values, vh = randomised_svd(centred, 2 * self.count, STEPS, torch.Generator().manual_seed(SEED))
        largest = vh.gather(1, vh.abs().argmax(1, keepdim=True))
        self.components = (vh * largest.sign())[: self.count]
        self.values = values[: self.count]
        self.ratio = self.values.square() / self._spread.sum().to(values.dtype)


def shares(ratios: Mapping[str, Tensor], budget: int, leaders: Mapping[str, str]) -> dict[str, int]:
    """Return ranks of modules: each of the `budget` largest shares of variance that a component explains is one.

    Args:
        ratios: The share of each component, by module.
        budget: Sum of the ranks.
        leaders: For modules of one input, which of them is fitted for all; it gets the largest rank of them.

    >>> shares({"a": torch.tensor([0.5, 0.4]), "b": torch.tensor([0.45, 0.1])}, 3, {})
    {'a': 2, 'b': 1}
    """
    names = [name for name, ratio in ratios.items() for _ in range(len(ratio))]
    flat = torch.cat([ratio.double().cpu() for ratio in ratios.values()])
    ranks = dict.fromkeys(ratios, 0)
    for index in flat.argsort(descending=True, stable=True)[:budget].tolist():
        ranks[names[index]] += 1
    for name, leader in leaders.items():
        if ranks[leader] < ranks[name]:
            ranks[leader], ranks[name] = ranks[name], ranks[leader]
    return ranks
