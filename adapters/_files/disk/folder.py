"""The directory of an adapter: two files that are read together and replaced together."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import secrets
import stat
import threading
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from torchgraft.functional.extending import given_type

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"

MOST_CONFIG = 64 * 2**20
"""Bytes that a config may have."""

_PENDING = re.compile(r"\.adapter_config\.([0-9a-f]{64})\.json")
"""A config whose weights have this digest; see `write_pair`."""

_COMMIT = threading.Lock()
_TRIES = 20


def check_name(name: Any) -> str:
    """Return an adapter's name, which may be the name of a directory.

    Raises:
        ValueError: A name that would lead elsewhere.

    >>> check_name("style")
    'style'
    >>> check_name("../style")
    Traceback (most recent call last):
    ValueError: adapter_name is '../style', expected a name without slashes, colons and control characters, not '..'
    """
    if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\:\x00-\x1f]", name):
        raise ValueError(
            f"adapter_name is {name!r:.60}, expected a name without slashes, colons and control characters, not '..'"
            + (f"; it takes one name, a string, and this is {given_type(name)}" if not isinstance(name, str) else "")
        )
    return name


def as_directory(path: Any) -> Path:
    """Return a path that is to be a directory, there or not.

    Raises:
        TypeError: No path.
        NotADirectoryError: A file.

    >>> as_directory(["a", "b"])
    Traceback (most recent call last):
    TypeError: path is of type list, expected one directory, a string or a pathlib.Path
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path is {given_type(path)}, expected one directory, a string or a pathlib.Path")
    root = Path(path)
    if root.exists() and not root.is_dir():
        raise NotADirectoryError(f"{root}: is a file, expected a directory: give its own, {str(root.parent)!r}")
    return root


@dataclasses.dataclass(frozen=True)
class Folder:
    """A directory, and the one that none of its files may lead out of.

    Attributes:
        root: The directory that the user named.
        path: That, or one within.
    """

    root: Path
    path: Path

    def __post_init__(self) -> None:
        self._inside(self.path)

    def has(self, name: str) -> bool:
        """Return whether something of that name is there."""
        return os.path.lexists(self.path / name)

    def open(self, name: str) -> BufferedReader:
        """Open a file for reading.

        Raises:
            FileNotFoundError: No such file.
            ValueError: A link that leads out of the directory; something that is no file.
        """
        file = self.path / name
        real = self._inside(file)
        # A pipe would wait for a writer, and a link put there since would be followed.
        flags = sum(getattr(os, flag, 0) for flag in ("O_NONBLOCK", "O_NOFOLLOW", "O_CLOEXEC", "O_BINARY"))
        descriptor = os.open(real, os.O_RDONLY | flags)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise ValueError(f"{file}: is no regular file")
        return os.fdopen(descriptor, "rb")

    def _inside(self, file: Path) -> Path:
        """Where a path leads, if that is inside of the root, or in the store that Hugging Face's cache links to."""
        root, real = Path(os.path.realpath(self.root)), Path(os.path.realpath(file))
        allowed = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
        if not any(real.is_relative_to(one) for one in allowed):
            raise ValueError(
                f"{file}: leads out of the directory {self.root}, to {real}; put the file itself there, or give the "
                "directory that it leads to"
            )
        return real


def find_folder(path: str | os.PathLike[str], adapter_name: str) -> Folder:
    """Return the directory that holds an adapter: the one of its name in `path`, else `path` itself.

    Raises:
        TypeError, NotADirectoryError: No path, or a file.
        FileNotFoundError: No such directory, or one without an adapter; says what is there.
        ValueError: A name or a link that leads elsewhere.
    """
    root = as_directory(path)
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root}: no such directory; nothing is downloaded here, fetch it first, for example with "
            "huggingface_hub.snapshot_download"
        )
    own = check_name(adapter_name) != "default" and (root / adapter_name).is_dir()
    for folder in (Folder(root, root / adapter_name) if own else None, Folder(root, root)):
        if folder is not None and any(map(folder.has, (CONFIG, WEIGHTS, PICKLE))):
            return folder
    inside = sorted(one.parent.name for one in root.glob(f"*/{CONFIG}"))
    hint = f"; there are adapters in its subdirectories {inside}, give one of these as adapter_name" if inside else ""
    raise FileNotFoundError(f"{root}: holds no adapter, expected {CONFIG} and {WEIGHTS}{hint}")


@contextlib.contextmanager
def open_pair(folder: Folder) -> Iterator[tuple[Path, bytes, BufferedReader]]:
    """The config and the weights that belong together, also while another process replaces both.

    Yields:
        The config's file, its bytes, and the opened weights.

    Raises:
        FileNotFoundError: One of the two is missing.
        ValueError: A link that leads out of the directory; a config of an absurd size.
        RuntimeError: Files that are replaced all the time.
    """
    for _ in range(_TRIES):
        try:
            weights = folder.open(WEIGHTS)
        except FileNotFoundError:
            raise FileNotFoundError(_no_weights(folder)) from None
        with weights:
            file, data = read_config(folder, weights)
            if _is(folder.path / WEIGHTS, weights):
                yield file, data, weights
                return
    raise RuntimeError(f"{folder.path / WEIGHTS}: is replaced again and again; load it when nothing writes to it")


def _no_weights(folder: Folder) -> str:
    if folder.has(PICKLE):
        return (
            f"{folder.path / WEIGHTS}: is missing; there is only {PICKLE}, a pickle, which is never read here for it "
            f"can run code. This converts it:\n{_conversion(folder.path)}"
        )
    return f"{folder.path / WEIGHTS}: is missing"


def _conversion(path: Path) -> str:
    """Return the line that makes weights of a pickle, which torch reads as tensors alone."""
    tensors = "{k: v.clone(memory_format=torch.contiguous_format) for k, v in t.items()}"
    return (
        f'python -c "import torch, safetensors.torch as s; t = torch.load({str(path / PICKLE)!r}, weights_only=True); '
        f"s.save_file({tensors}, {str(path / WEIGHTS)!r}, {{'format': 'pt'}})\""
    )


def _is(path: Path, handle: BufferedReader) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle.fileno()))
    except FileNotFoundError:
        return False


def read_config(folder: Folder, weights: BufferedReader | None) -> tuple[Path, bytes]:
    """Return the bytes of the config that belongs to these weights, and its file.

    Raises:
        FileNotFoundError: No config.
        ValueError: A link that leads out of the directory; a config of an absurd size.
    """
    names = _pending(folder.path)
    if names and weights is not None:
        weights.seek(0)
        digest = hashlib.file_digest(weights, "sha256").hexdigest()
        for name in names:
            if digest in name:
                with contextlib.suppress(FileNotFoundError):
                    return folder.path / name, _read(folder, name)
    try:
        return folder.path / CONFIG, _read(folder, CONFIG)
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder.path / CONFIG}: is missing") from None


def _read(folder: Folder, name: str) -> bytes:
    with folder.open(name) as handle:
        data = handle.read(MOST_CONFIG + 1)
    if len(data) > MOST_CONFIG:
        raise ValueError(f"{folder.path / name}: has more than {MOST_CONFIG} bytes, which no config has")
    return data


def _pending(path: Path) -> list[str]:
    return sorted(name for name in os.listdir(path) if _PENDING.fullmatch(name))


def write_pair(path: Path, config: bytes, weights: bytes) -> None:
    """Replace an adapter's two files: whatever happens, readers find the old pair or the new one.

    Two files cannot be replaced in one step. So the new config first gets a name with the digest of its weights, by
    which a reader knows that it belongs to weights that are already there while `adapter_config.json` is still the old.
    Several threads, and several processes of one machine, take turns.

    Args:
        path: The directory, which exists.
        config: Bytes of the config.
        weights: Bytes of the weights.

    Raises:
        OSError: A file that cannot be written or replaced.
    """
    for name in (CONFIG, WEIGHTS):
        if (path / name).is_dir():
            raise IsADirectoryError(f"{path / name}: is a directory, expected a file or nothing")
    pending = path / f".adapter_config.{hashlib.sha256(weights).hexdigest()}.json"
    with (
        temporary(path, WEIGHTS, weights) as new_weights,
        temporary(path, CONFIG, config) as new_config,
        _COMMIT,
        alone(path),
    ):
        try:
            os.replace(new_config, pending)
            sync(path)
            os.replace(new_weights, path / WEIGHTS)
        except BaseException:
            if new_weights.exists():
                pending.unlink(missing_ok=True)
            raise
        try:
            sync(path)
        finally:
            os.replace(pending, path / CONFIG)
        sync(path)
        _forget_pending(path)


def write_config(path: Path, config: bytes) -> None:
    """Replace the config alone.

    Raises:
        OSError: A file that cannot be written or replaced.
    """
    with temporary(path, CONFIG, config) as new_config, _COMMIT, alone(path):
        os.replace(new_config, path / CONFIG)
        sync(path)
        _forget_pending(path)


@contextlib.contextmanager
def alone(path: Path, wait: bool = True) -> Iterator[None]:
    """Keep other processes from replacing files of a directory, where the system can do that.

    Args:
        path: The directory.
        wait: Whether to wait for one that does so.

    Raises:
        BlockingIOError: Another process does so, and there is no waiting.
    """
    lock: Any = getattr(fcntl, "flock", None)
    if lock is None:
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            lock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"{path}: another process is writing there; wait for it, or stop it") from None
        except OSError:  # some file systems have no locks
            pass
        yield
    finally:
        os.close(descriptor)


def _forget_pending(path: Path) -> None:
    for name in _pending(path):
        (path / name).unlink(missing_ok=True)


@contextlib.contextmanager
def temporary(path: Path, name: str, data: bytes) -> Iterator[Path]:
    """A new file beside the one that it will replace, complete and on the disk; removed if it is still there."""
    temporary = path / f".{name}.{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "xb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have the names in a directory written to the disk, where the system can do that."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
