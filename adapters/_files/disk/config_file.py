"""The file of a config: its fields as a dict, read from a directory and written to one."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .folder import WEIGHTS, Folder, as_directory, read_config, write_config
from .strict_json import parse_object


def read_fields(path: str | os.PathLike[str], subfolder: str | None = None) -> tuple[Path, dict[str, Any]]:
    """Read the fields of `adapter_config.json` in a directory.

    Args:
        path: The directory.
        subfolder: A directory within it.

    Returns:
        The file, and its fields.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A file that is no config, or that leads out of the directory; names the file.
    """
    root = as_directory(path)
    folder = Folder(root, root / subfolder if subfolder else root)
    if not folder.path.is_dir():
        raise FileNotFoundError(f"{folder.path}: no such directory; nothing is downloaded here, fetch it first")
    with contextlib.ExitStack() as stack:
        weights = None
        with contextlib.suppress(FileNotFoundError):
            weights = stack.enter_context(folder.open(WEIGHTS))
        file, data = read_config(folder, weights)
    return file, parse_fields(file, data)


def parse_fields(file: Path, data: bytes) -> dict[str, Any]:
    """Parse the bytes of a config.

    Raises:
        ValueError: Bytes that are no config; names the file.

    >>> parse_fields(Path("adapter_config.json"), b'{"peft_type": "LORA", "r": 4}')
    {'peft_type': 'LORA', 'r': 4}
    """
    fields = parse_object(data, file)
    if "peft_type" not in fields:
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
