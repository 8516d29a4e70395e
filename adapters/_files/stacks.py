"""Stacks of adapters in files: each adapter a directory of its own, as `save_adapter` and PEFT write it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchgraft.functional import Graft, StackedGraft, bind
from torchgraft.functional.extending import Tree

from .configs import load_config
from .disk.folder import check_name
from .load import load_adapter
from .save import save_adapter

_Paths = Sequence[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]]


def load_stack(
    model: nn.Module,
    folders: _Paths,
    *,
    allow_unreached: bool = False,
    check_finite: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> tuple[StackedGraft, Tree]:
    """Read adapters of one method, of any ranks, into a stack: the graft of their configs, and their parameters.

    The model stays as it is. Every file is checked as `load_adapter` does, and its adapter is computed as if alone.

    Args:
        model: The model.
        folders: A directory for each adapter, by name, or a list, whose last parts are the names.
        allow_unreached: As for `bind`.
        check_finite: Refuse NaN and infinite values.
        dtype: Dtype of the parameters, as for `load_adapter` of a graft.
        device: Device of the parameters.

    Returns:
        `(graft, stack)`: `graft(route(stack, graft.rows(["poems", "code"])), x)`.

    Raises:
        FileNotFoundError, KeyError: As `load_adapter` does.
        TypeError: Adapters of several methods; one directory instead of several.
        ValueError: As `load_adapter` does; configs that differ in what the adapters of a stack share; two directories
            of one name.

    >>> import tempfile
    >>> from torchgraft.adapters import LoraConfig
    >>> model = nn.Sequential(nn.Linear(4, 3))
    >>> configs = [LoraConfig(r=r, target_modules=["0"]) for r in (1, 4)]
    >>> graft = bind(model, configs, names=["poems", "code"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     saved = save_stack(graft, folder, graft.init())
    ...     again, many = load_stack(model, saved)
    >>> again.names, many["0"]["lora_A"].shape
    (('poems', 'code'), torch.Size([2, 4, 4]))
    """
    paths = _named(folders)
    graft = bind(model, [*map(load_config, paths.values())], allow_unreached=allow_unreached, names=[*paths])
    options: dict[str, Any] = {"check_finite": check_finite, "dtype": dtype, "device": device}
    return graft, graft.stack([load_adapter(graft.member(name), path, **options) for name, path in paths.items()])


def save_stack(graft: Graft, path: str | os.PathLike[str], params: Tree) -> dict[str, Path]:
    """Write each adapter of a stack into a directory of its name, without padding, as `save_adapter` does.

    Other directories that are in `path` already stay there.

    Args:
        graft: A graft of several configs or of one.
        path: The directory that the adapters' are in; made if it is not there.
        params: The stack.

    Returns:
        The directory of each adapter, by name or by place (`"0"`), in order: what `load_stack` takes.

    Raises:
        KeyError, TypeError, ValueError: A stack that does not fit the graft; named adapters that add up, which are
            saved one by one; names that lead out of the directory.
        OSError: Files that cannot be written.
    """
    if graft.binding.named:
        raise ValueError(
            f"save_stack: the graft has adapters by name, {sorted(graft.configs)}, which add up; of each member of the "
            "stack, save_adapter(graft, path, name, params=tree)"
        )
    trees = graft.unstack(params)
    names = [*map(check_name, getattr(graft, "names", None) or map(str, range(len(trees))))]
    grafts = [graft.member(i) if isinstance(graft, StackedGraft) else graft for i in range(len(trees))]
    return {
        name: save_adapter(own, Path(path) / name, params=tree)
        for name, own, tree in zip(names, grafts, trees, strict=True)
    }


def _named(folders: _Paths) -> dict[str, str | os.PathLike[str]]:
    """Return directories by the name of each adapter."""
    if isinstance(folders, (str, os.PathLike)):
        raise TypeError(
            f"load_stack: folders is {str(folders)!r}, expected a list of directories, or {{name: directory}}"
        )
    if not folders:
        raise ValueError("load_stack: got no directories; give one for each adapter")
    if isinstance(folders, Mapping):
        return dict(folders)
    named: dict[str, str | os.PathLike[str]] = {}
    for folder in folders:
        name = Path(folder).name
        if name in named:
            raise ValueError(
                f"load_stack: {named[name]} and {folder} would both have the name {name!r}; give {{name: directory}}"
            )
        named[name] = folder
    return named
