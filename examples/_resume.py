"""Files that an interrupt leaves as they were or as they are to be, and a base model that is trained once."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import optree
import torch
from _writer import Writer, train_base
from safetensors.torch import load_file, save_file
from torch import Tensor

from torchgraft.functional import Tree


def _names(tree: Tree) -> list[str]:
    return ["/".join(path) for path in optree.tree_paths(tree)]


def save(tree: Tree, file: Path) -> None:
    """Write a tree of tensors under another name first."""
    fresh = file.with_suffix(".new")
    leaves = [leaf.contiguous() for leaf in optree.tree_leaves(tree)]
    save_file(dict(zip(_names(tree), leaves, strict=True)), fresh)
    os.replace(fresh, file)


def load(like: Tree, file: Path) -> Tree:
    """Read a tree that was saved; one like it says where its tensors belong."""
    stored = load_file(file)
    return optree.tree_unflatten(optree.tree_structure(like), [stored[name] for name in _names(like)])


def note(facts: Any, file: Path) -> None:
    """Write what JSON can hold, under another name first."""
    fresh = file.with_suffix(".new")
    fresh.write_text(json.dumps(facts, indent=2 if isinstance(facts, dict) else None))
    os.replace(fresh, file)


def digest(parts: Iterable[Tensor]) -> str:
    """A few characters that differ if the tensors do."""
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()[:16]


def claim(folder: Path, what: str, facts: dict[str, Any]) -> None:
    """Note in the folder what its run depends on, or refuse to go on with another one.

    Raises:
        SystemExit: The folder has a run that depends on something else; names what.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "settings.json"
    if not file.exists():
        note(facts, file)
    old = json.loads(file.read_text())
    changes = [f"{key} was {old.get(key)!r} and is {facts[key]!r}" for key in facts if old.get(key) != facts[key]]
    if changes:
        raise SystemExit(f"{folder} has {what} with other settings: {'; '.join(changes)}. Give another --out.")


def trained_base(file: Path, text: Tensor, dim: int, depth: int, steps: int) -> Writer:
    """A small language model that has learnt a text, frozen; trained if the file is not there yet."""
    torch.manual_seed(0)
    model = Writer(dim, depth)
    if not file.exists():
        train_base(model, text, steps)
        save(model.state_dict(), file)
    model.load_state_dict(load_file(file))
    return model.requires_grad_(False).eval()


def until_interrupted(run: Callable[[argparse.Namespace], dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """Run an example that goes on where it was; an interrupt says so."""
    try:
        return run(args)
    except KeyboardInterrupt:
        raise SystemExit(f"\nInterrupted. The same command goes on from what is in {args.out}.") from None
