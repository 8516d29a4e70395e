"""The file of a config: its fields as a dict, read from a directory and written to one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .folder import MOST_CONFIG, WEIGHTS, Folder, as_directory, read_config, write_config
from .hub import local_folder
from .strict_json import parse_object


def read_fields(
    path: str | os.PathLike[str],
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    needs_type: bool = True,
) -> tuple[Path, dict[str, Any]]:
    """Read the fields of `adapter_config.json` in a directory.

    Args:
        path: The directory, or the name of a repository in the Hub's local cache.
        subfolder: A directory within it.
        revision: The repository's branch or commit.
        cache_dir: The Hub's cache.
        needs_type: Whether the file has to say of which method it is.

    Returns:
        The file, and its fields.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A file that is no config, or that leads out of the directory; names the file.
    """
    as_directory(path)
    root = local_folder(path, None, revision, cache_dir)
    folder = Folder(root, root / subfolder if subfolder else root)
    if not folder.path.is_dir():
        raise FileNotFoundError(f"{folder.path}: no such directory; nothing is downloaded here, fetch it first")
    with contextlib.ExitStack() as stack:
        weights = None
        with contextlib.suppress(FileNotFoundError):
            weights = stack.enter_context(folder.open(WEIGHTS))
        file, data = read_config(folder, weights)
    return file, parse_fields(file, data, needs_type)


def read_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the fields of a config from its file, by whatever name, without those that no file should have.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A file that is no config; names the file.
    """
    file = Path(path)
    with Folder(file.parent, file.parent).open(file.name) as handle:
        data = handle.read(MOST_CONFIG)
    fields = parse_fields(file, data, needs_type=False)
    if fields.pop("runtime_config", None) is not None:
        warnings.warn(f"{file}: runtime_config is of a process and not of files; left out", UserWarning, stacklevel=3)
    return fields


def parse_fields(file: Path, data: bytes, needs_type: bool = True) -> dict[str, Any]:
    """Parse the bytes of a config.

    Args:
        file: Where they are from.
        data: The bytes.
        needs_type: Whether they have to say of which method it is.

    Raises:
        ValueError: Bytes that are no config; names the file.

    >>> parse_fields(Path("adapter_config.json"), b'{"peft_type": "LORA", "r": 4}')
    {'peft_type': 'LORA', 'r': 4}
    """
    fields = parse_object(data, file)
    if needs_type and "peft_type" not in fields:
        raise ValueError(f"{file}: has no peft_type, expected the config of an adapter, such as LORA")
    return fields


def write_fields(path: str | os.PathLike[str], fields: Mapping[str, Any]) -> None:
    """Write `adapter_config.json` into a directory; the file is replaced as a whole or not at all.

    Raises:
        OSError: A file that cannot be written.
    """
    write_config(make_folder(path), to_json(fields))


def to_json(fields: Mapping[str, Any]) -> bytes:
    """Return the bytes of a config with these fields.

    >>> to_json({"r": 4})
    b'{\\n  "r": 4\\n}'
    """
    return json.dumps(fields, indent=2, sort_keys=True).encode()


def make_folder(path: str | os.PathLike[str], adapter_name: str = "default") -> Path:
    """Return the directory for an adapter, made if it is not there.

    Raises:
        NotADirectoryError: A file in its place.
        ValueError: A directory that leads out of `path`.
    """
    root = as_directory(path)
    folder = root if adapter_name == "default" else root / adapter_name
    as_directory(folder)
    os.makedirs(root, exist_ok=True)
    Folder(root, folder)
    os.makedirs(folder, exist_ok=True)
    return folder


@contextlib.contextmanager
def about(file: Path) -> Iterator[None]:
    """Have errors name the file."""
    try:
        yield
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError, re.error) as error:
        text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        if text.startswith((str(file), str(file.parent / WEIGHTS))):
            raise
        kind = next((one for one in (KeyError, RuntimeError, TypeError) if isinstance(error, one)), ValueError)
        raise kind(f"{file}: {text}") from error
