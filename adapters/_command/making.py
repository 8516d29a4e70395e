"""`torchgraft merge`, `combine`, `convert` and `extract`: new models and adapters from others, on disk."""

from __future__ import annotations

import sys
from typing import Any

import torch

from .._arithmetic.combine import combine as combined
from .._checkpoints.merge import merge_files
from .._conversion.extract import extract_lora
from .._conversion.formats import to_format
from .._conversion.shrink import shrink
from .._files.servers.engines import server_of
from .._files.servers.form import as_served_files
from .files import module_names, new_folder, read_adapter, read_any, write_adapter, write_form
from .output import bar, on_terminal


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


def convert(
    path: str,
    out: str,
    server: str | None = None,
    form: str | None = None,
    prefix: str | None = None,
    model: str | None = None,
    rank: int | None = None,
) -> int:
    """Write an adapter in another form: an engine's, another program's, or of another rank."""
    if server is None and form is None and rank is None:
        raise ValueError("nothing to convert to; give --for ENGINE, --to FORM or --rank R")
    new_folder(out)
    config: Any
    config, tree = read_any(path, prefix if form in (None, "peft") else None, model)
    if rank is not None:
        config, tree, report = shrink(config, tree, rank)
        print(report, file=sys.stderr)
    if server is not None:
        config, tree = as_served_files(server_of(server), config, tree)
    if form in (None, "peft"):
        print(write_adapter(out, config, tree))
    else:
        print(write_form(out, to_format(config, tree, form, prefix=prefix, modules=module_names(model))))
    return 0


def extract(
    base: str,
    tuned: str,
    out: str,
    rank: int | None = None,
    energy: float | None = None,
    rest: str = "refuse",
    quiet: bool = False,
) -> int:
    """Write the LoRA of what fine-tuning changed, and print its errors."""
    new_folder(out)
    config, tree, report = extract_lora(base, tuned, rank, energy=energy, rest=rest, progress=on_terminal(quiet))
    print(report, file=sys.stderr)
    print(write_adapter(out, config, tree))
    return 0
