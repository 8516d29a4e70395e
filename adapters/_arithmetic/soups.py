"""Soups: averages of adapters, of all or of those that help.

Wortsman et al., *Model soups*, 2022, arXiv:2203.05482.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torchgraft.functional.extending import Tree

from .._config.base import AdapterConfig
from .combine import combine
from .given import check_adapters
from .products import Adapter


def soup(adapters: Sequence[Adapter], how: str = "cat", rank: int | None = None) -> Adapter:
    """Average adapters: `combine` with equal weights.

    Args:
        adapters: Pairs `(config, params)`.
        how: `"cat"` averages the changes of the weights, exact, and ranks add up; `"svd"` cuts that to a rank.
        rank: The rank for `"svd"`.

    Raises:
        TypeError, UnsupportedConfig, ValueError: As `combine`.

    >>> import torch
    >>> from torchgraft.adapters import LoraConfig
    >>> config = LoraConfig(r=1, lora_alpha=1, target_modules=["0"])
    >>> some = [(config, {"0": {"lora_A": torch.ones(1, 1), "lora_B": torch.full((1, 1), x)}}) for x in (1.0, 3.0)]
    >>> leaves = soup(some)[1]["0"]
    >>> leaves["lora_B"] @ leaves["lora_A"]
    tensor([[2.]])
    """
    given = check_adapters(adapters, "soup")
    return combine(given, [1 / len(given)] * len(given), how, rank=rank)


class GreedySoup(NamedTuple):
    """A soup, and what is in it.

    Attributes:
        config: Its config.
        params: Its tree.
        members: Places of the adapters in it, in the order in which they were added.
        score: Its score.
    """

    config: AdapterConfig
    params: Tree
    members: tuple[int, ...]
    score: float


def greedy_soup(
    adapters: Sequence[Adapter],
    score: Callable[[AdapterConfig, Tree], float],
    how: str = "cat",
    rank: int | None = None,
) -> GreedySoup:
    """Average those adapters that help: from the best on, each stays if the average with it scores no less.

    Args:
        adapters: Pairs `(config, params)`, `n` of them.
        score: `(config, params) -> number`, on data held out; more is better. Called `2 n - 1` times.
        how: As for `soup`.
        rank: As for `soup`.

    Returns:
        `(config, params, members, score)`.

    Raises:
        TypeError, UnsupportedConfig, ValueError: As `combine`; a score that is not a number.

    >>> import torch
    >>> from torchgraft.adapters import LoraConfig
    >>> config = LoraConfig(r=1, lora_alpha=1, target_modules=["0"])
    >>> some = [(config, {"0": {"lora_A": torch.ones(1, 1), "lora_B": torch.full((1, 1), x)}}) for x in (1.0, 4.0, 9.0)]
    >>> def near_two(config, params):
    ...     return -abs((params["0"]["lora_B"] @ params["0"]["lora_A"]).item() * config.lora_alpha / config.r - 2)
    >>> greedy_soup(some, near_two).members
    (0, 1)
    """
    given = check_adapters(adapters, "greedy_soup")
    alone = [_number(score(*adapter), f"of adapters[{i}]") for i, adapter in enumerate(given)]
    best, *rest = sorted(range(len(given)), key=lambda i: -alone[i])
    members, reached, result = [best], alone[best], given[best]
    for index in rest:
        tried = soup([given[i] for i in [*members, index]], how, rank)
        value = _number(score(*tried), f"of the average with adapters[{index}]")
        if value >= reached:
            members, reached, result = [*members, index], value, tried
    return GreedySoup(*result, tuple(members), reached)


def _number(value: float, what: str) -> float:
    number = float(value)
    if number != number:
        raise ValueError(f"greedy_soup: the score {what} is not a number; give a score that is finite")
    return number
