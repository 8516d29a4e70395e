"""`torchgraft merge`, `combine`, `convert` and `extract`: new models and adapters from others, on disk."""

from __future__ import annotations

import torch

from .._arithmetic.combine import combine as combined
from .._checkpoints.merge import merge_files
from .._files.servers.engines import server_of
from .._files.servers.form import as_served_files
from .files import new_folder, read_adapter, write_adapter
from .output import bar


def merge(base: str, adapter: str, out: str, quiet: bool = False) -> int:
    """Merge an adapter into a model's files."""
    with bar("merging", quiet) as report:
        print(merge_files(base, adapter, out, report=report))
    return 0


def combine(
    adapters: list[str],
    out: str,
    weights: list[float] | None = None,
    how: str = "cat",
    rank: int | None = None,
    density: float | None = None,
    seed: int | None = None,
) -> int:
    """Add adapters with weights, as one."""
    new_folder(out)
    given = [read_adapter(path) for path in adapters]
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    numbers = [1 / len(given)] * len(given) if weights is None else weights
    made = combined(given, numbers, how, rank=rank, density=density, generator=generator)
    print(write_adapter(out, *made))
    return 0


def convert(path: str, out: str, server: str) -> int:
    """Write an adapter in the form that an engine serves."""
    new_folder(out)
    config, tree = read_adapter(path)
    print(write_adapter(out, *as_served_files(server_of(server), config, tree)))
    return 0
