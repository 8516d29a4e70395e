"""Random matrices that all modules of an adapter share, as VeRA has them: drawn from a seed, the first rows and columns
of which each module takes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchgraft.functional import Site

from ..._config.messages import require


def draw_pair(seed: int, sites: list[Site], rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return `A`, `"rows max_in"`, and `B`, `"max_out columns"`, over all sites.

    >>> a, b = draw_pair(0, [Site("0", "linear", 5, 2), Site("1", "linear", 3, 4)], rows=2, columns=1)
    >>> a.shape, b.shape
    (torch.Size([2, 5]), torch.Size([4, 1]))
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    a = _draw((rows, max(site.in_features for site in sites)), generator)
    return a, _draw((max(site.out_features for site in sites), columns), generator)


def _draw(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Kaiming's uniform distribution, as `nn.init.kaiming_uniform_` has it for a rectifier."""
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
    return torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)


def check_rank(config: Any, found: Mapping[str, Mapping[str, Tensor]], leaf: str, size: int, what: str) -> None:
    """Hold the rank, by which `plan` makes the shared matrices, against the tensors.

    Args:
        config: An adapter's config.
        found: Tensors by path and leaf.
        leaf: A leaf whose size tells the rank.
        size: Its size, by the config.
        what: The size in words.
    """
    given = {path: tuple(leaves[leaf].shape) for path, leaves in found.items() if leaf in leaves}
    require(bool(given), config, f"there is no {leaf} to hold r={config.r} against")
    for path, shape in given.items():
        require(
            shape == (size,), config, f"r is {config.r}, and {leaf} of {path} has shape {shape}, expected ({what},)"
        )
