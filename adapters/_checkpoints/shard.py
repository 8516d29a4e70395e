"""A shard written again with some tensors changed: the same header, one tensor after the other, to go on after a crash.

Dtypes and shapes stay, so each tensor stays where it is in the file. What is on the disk for certain is noted in a file
beside it, from where a later run goes on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .._files.disk.folder import sync, temporary
from .._files.disk.headers import Spec

Specs = Mapping[str, Spec]
Merged = Callable[[str], Iterator[Tensor]]
Report = Callable[[int], None]

_BLOCK = 16 * 2**20
"""Bytes that are copied at once."""
_NOTED = 256 * 2**20
"""Bytes after which a place to go on from is noted."""


def write_shard(source: Path, specs: Specs, file: Path, changed: Iterable[str], merged: Merged, report: Report) -> None:
    """Write a shard with some tensors changed; where the file is there in part, the rest of it.

    Args:
        source: The shard of the base.
        specs: What it has.
        file: The file to write, under a name of its own while it is not complete.
        changed: Names of tensors that change.
        merged: `name -> parts` of a changed tensor, as the file has them.
        report: Is told of the bytes that are there, as they come.

    Raises:
        OSError: A file that cannot be written.
        ValueError: A base that became shorter.
    """
    size = source.stat().st_size
    if file.exists():
        report(size)
        return
    partial, note = file.with_name(f".{file.name}.part"), file.with_name(f".{file.name}.at")
    changed = set(changed)
    order = sorted(specs, key=lambda name: (specs[name].start, specs[name].end))
    begin = size - max((spec.end for spec in specs.values()), default=0)
    done = min(int(note.read_text()), partial.stat().st_size) if note.exists() and partial.exists() else 0
    with open(source, "rb") as base, open(partial, "r+b" if done else "wb") as target:
        target.truncate(done)
        target.seek(done)
        report(done)
        if not done:
            _copy(base, target, 0, begin, report)
        for name in order:
            spec = specs[name]
            if begin + spec.end <= done or spec.start == spec.end:
                continue
            if name not in changed:
                _copy(base, target, max(begin + spec.start, done), begin + spec.end, report)
            else:
                for part in merged(name):
                    report(target.write(_bytes(part)))
            if target.tell() != begin + spec.end:
                raise ValueError(f"{source}: {name!r} was merged to another size; start again")
            if target.tell() - done >= _NOTED:
                done = target.tell()
                _note(target, note, done)
        target.flush()
        os.fsync(target.fileno())
    os.replace(partial, file)
    note.unlink(missing_ok=True)
    sync(file.parent)


def _copy(source: BinaryIO, target: BinaryIO, start: int, stop: int, report: Report) -> None:
    """Copy a span of a file to where another one is."""
    source.seek(start)
    while start < stop:
        data = source.read(min(_BLOCK, stop - start))
        if not data:
            raise ValueError(f"{source.name}: became shorter while it was read; try again when nothing writes to it")
        start += len(data)
        report(target.write(data))


def _bytes(tensor: Tensor) -> memoryview:
    data: memoryview = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data
    return data


def _note(target: BinaryIO, note: Path, done: int) -> None:
    """Note how much of a file is on the disk, once it is."""
    target.flush()
    os.fsync(target.fileno())
    with temporary(note.parent, note.name, str(done).encode()) as made:
        os.replace(made, note)
