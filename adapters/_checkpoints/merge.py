"""An adapter merged into the files of its model in bounded memory: no model is built, large weights come in parts."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from torchgraft.functional import __version__

from .._files.disk.folder import CONFIG, alone, find_folder, sync, temporary
from .._files.disk.folder import WEIGHTS as ADAPTER
from .changes import changes_of
from .folder import ModelFolder, model_folder
from .shard import write_shard

_JOB = ".merge.json"
_MOST = 32 * 2**20
"""Bytes of a weight that are merged at once."""


def merge_files(
    base: str | os.PathLike[str],
    adapter: str | os.PathLike[str],
    out: str | os.PathLike[str],
    adapter_name: str = "default",
    *,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Merge an adapter into a model on disk, tensor by tensor: what `merge` does, for models of any size.

        W' = merge(W)    for each adapted W, in float32 or wider, rounded to the base's dtype once

    The result has the base's files, with the adapted tensors changed: the same shards, names, dtypes, config and
    tokenizer. It is written into a directory beside `out`, which gets its name when all of it is there. A merge that
    was stopped, or killed, goes on where it was when it is called again. Any method that has a dense meaning can be
    merged; weights larger than 32 MB are merged in parts where they have a LoRA. Nothing is unpickled.

    Args:
        base: The directory of the model: safetensors, in one file or in shards.
        adapter: The directory of the adapter, as for `load_adapter`.
        out: The directory to write, which is not there yet.
        adapter_name: Name of a subdirectory with the adapter.
        report: `(done, total) -> None`, told of the bytes that are written.

    Returns:
        The directory.

    Raises:
        FileExistsError: `out` is there; what is left of another merge is beside it.
        FileNotFoundError: No such directory, or files that are missing.
        KeyError, ValueError: Files that are damaged, an adapter that does not fit the model, quantised weights, or an
            adapter that no dense weight expresses; names the tensor. Nothing was written then.
        OSError: A file that cannot be written; another process that writes the same.

    >>> import tempfile
    >>> from safetensors.torch import load_file, save_file
    >>> from torchgraft.adapters import LoraConfig, save_adapter
    >>> from torchgraft.functional import bind, merge
    >>> model = torch.nn.ModuleDict({"q": torch.nn.Linear(4, 3)})
    >>> graft = bind(model, LoraConfig(r=2, target_modules=["q"]), allow_unreached=True)
    >>> params = graft.init()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     os.mkdir(f"{folder}/base")
    ...     save_file(model.state_dict(), f"{folder}/base/model.safetensors")
    ...     _ = save_adapter(graft, f"{folder}/adapter", params=params)
    ...     out = merge_files(f"{folder}/base", f"{folder}/adapter", f"{folder}/out")
    ...     merged = load_file(out / "model.safetensors")
    >>> torch.equal(merged["q.weight"], merge(graft, params)["q.weight"])
    True
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: is there already; give another directory, or delete it first")
    folder = model_folder(base)
    with torch.no_grad():
        changes = changes_of(folder, adapter, adapter_name)
        for name in changes.names:
            folder.spec(name)  # raises where the base has no such tensor
        working = out.with_name(f".{out.name}.merging")
        _begin(working, out, _job(folder, find_folder(adapter, adapter_name).path))
        shards = folder.shards()
        total, done = sum(file.stat().st_size for file in shards), 0

        def tell(count: int) -> None:
            nonlocal done
            done += count
            report(done, total)

        with alone(working, wait=False):
            for file, specs in shards.items():
                changed = changes.names & specs.keys()
                write_shard(file, specs, working / file.name, changed, lambda name: changes.merged(name, _MOST), tell)
            for file in folder.others():
                shutil.copyfile(file, working / file.name)
    (working / _JOB).unlink()
    sync(working)
    if out.exists():
        out.rmdir()
    os.replace(working, out)
    sync(out.absolute().parent)
    return out


def _job(folder: ModelFolder, adapter: Path) -> str:
    """Return what tells one merge from another: the base's files, and the adapter's bytes."""
    files = [(file.name, file.stat()) for file in folder.shards()]
    digests = [hashlib.sha256((adapter / name).read_bytes()).hexdigest() for name in (CONFIG, ADAPTER)]
    named = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in files]
    return json.dumps({"base": named, "adapter": digests, "version": __version__})


def _begin(working: Path, out: Path, job: str) -> None:
    """Make the directory to write in, or go on with one that is there.

    Raises:
        FileExistsError: One of another merge.
    """
    if working.exists():
        if not (working / _JOB).exists() or (working / _JOB).read_text() != job:
            raise FileExistsError(f"{working}: is left of another merge into {out}; delete it, or finish that one")
        return
    working.mkdir(parents=True)
    with temporary(working, _JOB, job.encode()) as made:
        os.replace(made, working / _JOB)
