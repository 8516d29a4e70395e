"""Configs in files: `adapter_config.json`, as PEFT writes it."""

from __future__ import annotations

import os

from torchgraft.functional.extending import check_config

from .._config.base import AdapterConfig


def save_config(config: AdapterConfig, path: str | os.PathLike[str]) -> None:
    """Write `adapter_config.json` into a directory; the file is replaced as a whole or not at all.

    Raises:
        TypeError: No config of an adapter, or one of PEFT's own.
        OSError: A file that cannot be written.

    >>> import tempfile
    >>> from torchgraft.adapters import IA3Config
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_config(IA3Config(target_modules=["k"]), folder)
    ...     load_config(folder).target_modules
    {'k'}
    """
    check_config(config, "save_config: config", isinstance(config, AdapterConfig))
    config.save_pretrained(path)


def load_config(path: str | os.PathLike[str], subfolder: str | None = None) -> AdapterConfig:
    """Read `adapter_config.json` from a directory.

    Args:
        path: The directory.
        subfolder: A directory within it.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A file that is no config, or that leads out of the directory; names the file and the field.
    """
    return AdapterConfig.from_pretrained(path, subfolder)
