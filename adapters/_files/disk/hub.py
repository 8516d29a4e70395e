"""Where the files of an adapter are: a directory, or a name on the Hub that lies in the local cache."""

from __future__ import annotations

import os
import re
from pathlib import Path


class NoSuchFolder(FileNotFoundError, ValueError):
    """No directory of an adapter; a `ValueError` too, for those who catch PEFT's."""


_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def local_folder(
    name: str | os.PathLike[str],
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Return the directory of an adapter; nothing is downloaded.

    Args:
        name: A directory, or `"owner/name"` of a repository on the Hub that was downloaded before.
        subfolder: A directory in it.
        revision: A branch or a commit of the repository; by default `"main"`.
        cache_dir: Where the Hub's cache is; by default `HF_HUB_CACHE`, or `hub` in `HF_HOME`.

    Raises:
        NoSuchFolder: Neither a directory nor a repository in the cache.
        ValueError: A subfolder or a revision that leads out of where it should be.
    """
    for what, part in (("subfolder", subfolder), ("revision", revision)):
        if part and (os.path.isabs(part) or ".." in Path(part).parts):
            raise ValueError(f"{what} is {part!r}, expected a name within {name}")
    folder = Path(name)
    if not folder.is_dir():
        folder = _cached(str(name), revision or "main", cache_dir)
    return folder / subfolder if subfolder else folder


def _cached(name: str, revision: str, cache_dir: str | os.PathLike[str] | None) -> Path:
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    cache = Path(cache_dir or os.environ.get("HF_HUB_CACHE") or Path(home) / "hub")
    if not _NAME.fullmatch(name):
        raise NoSuchFolder(f"{name}: no such directory, and no name of a repository on the Hub, as 'owner/name'")
    repository = cache / f"models--{name.replace('/', '--')}"
    reference = repository / "refs" / revision
    commit = reference.read_text().strip() if reference.is_file() else revision
    folder = repository / "snapshots" / commit
    if re.fullmatch(r"[\w.-]+", commit) and folder.is_dir():
        return folder
    raise NoSuchFolder(
        f"{name}: no such directory, and revision {revision!r} is not in the Hub's cache at {cache}; nothing is "
        f"downloaded here, fetch it first: hf download {name}"
    )
