"""Experts that a model stacks in one parameter, and that its files keep apart: read as if they were stacked.

transformers' models have `mlp.experts.gate_up_proj` of `(experts, gate + up, in)` and `mlp.experts.down_proj`, where
their files have `mlp.experts.0.gate_proj.weight` and so on, Mixtral's `block_sparse_moe.experts.0.w1.weight`. Source:
transformers `conversion_mapping.py`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .._files.disk.headers import Spec
from .._files.disk.shards import Shards

_EXPERT = re.compile(r"(?P<owner>(?:.+\.)?experts)\.(?P<expert>\d+)\.(?P<leaf>\w+)\.weight")
_PARTS = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
"""The tensors of an expert that a stacked parameter has one after the other, by the names of files."""

Stack = tuple[tuple[str, ...], ...]
"""The names of the tensors of each expert, in order."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A tensor of the files that is a part of a stacked parameter.

    Attributes:
        parameter: The name of the parameter.
        expert: Which expert.
        rows: Which rows of the expert's matrix.
    """

    parameter: str
    expert: int
    rows: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class StackedShards(Shards):
    """A model's files, with the stacked parameters among their tensors.

    Attributes:
        stacks: What each stacked parameter is made of; these names are in `specs`, and not in `files`.
        pieces: Where each tensor of theirs belongs.
    """

    stacks: Mapping[str, Stack]
    pieces: Mapping[str, Piece]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read one tensor, or some of its rows; of a stacked parameter a row is an expert."""
        if name not in self.stacks:
            return super().read(name, start, stop)
        own = self.stacks[name][start:stop]
        return torch.stack([torch.cat([super(StackedShards, self).read(one) for one in expert]) for expert in own])


def with_stacked(shards: Shards) -> StackedShards:
    """Return a model's files with the parameters that stack what the files keep apart."""
    stacks = {name: stack for name, stack in _stacks(shards).items() if name not in shards.specs}
    specs, pieces = dict(shards.specs), {}
    for name, stack in stacks.items():
        parts = [shards.specs[one] for one in stack[0]]
        shape = (len(stack), sum(part.shape[0] for part in parts), parts[0].shape[1])
        specs[name] = Spec(parts[0].dtype, shape, 0, len(stack) * sum(part.end - part.start for part in parts))
        for expert, names in enumerate(stack):
            start = 0
            for one, part in zip(names, parts, strict=True):
                pieces[one] = Piece(name, expert, (start, start + part.shape[0]))
                start += part.shape[0]
    return StackedShards(shards.path, specs, shards.files, shards.starts, stacks, pieces)


def _stacks(shards: Shards) -> dict[str, Stack]:
    """Return the stacked parameters whose experts are all there, in one dtype and of one size."""
    counts: dict[str, set[int]] = {}
    for match in filter(None, map(_EXPERT.fullmatch, shards.specs)):
        counts.setdefault(match["owner"], set()).add(int(match["expert"]))
    found = {}
    for owner, experts in counts.items():
        for leaf, choices in _PARTS.items():
            for parts in choices:
                stack = tuple(
                    tuple(f"{owner}.{expert}.{part}.weight" for part in parts) for expert in range(len(experts))
                )
                if _fits(shards, stack):
                    found[f"{owner.replace('block_sparse_moe', 'mlp')}.{leaf}"] = stack
    return found


def _fits(shards: Shards, stack: Stack) -> bool:
    if not all(name in shards.specs for names in stack for name in names):
        return False
    sizes = {tuple((shards.specs[name].dtype, shards.specs[name].shape) for name in names) for names in stack}
    shapes = [shape for _, shape in next(iter(sizes))]
    return len(sizes) == 1 and all(len(shape) == 2 and shape[1] == shapes[0][1] for shape in shapes)
