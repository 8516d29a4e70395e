"""Adapters that have no slot: their numbers rest in host memory or on disk."""

from __future__ import annotations

import os
import urllib.parse
from pathlib import Path

from .._files.disk.folder import as_directory
from .record import read_record, to_bytes, write_file
from .resident import Resident
from .slots import Numbers


class Resting:
    """Where adapters rest, with their optimizer's state.

    A file is replaced as a whole or not at all, and stays when its adapter comes back into a slot: after a crash there
    is each adapter as it rested last.

    Args:
        where: `"memory"`, or a directory, which is made if it is not there.
    """

    def __init__(self, where: str | os.PathLike[str]):
        self._folder = None if where == "memory" else as_directory(where)
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        self._numbers: dict[str, Numbers] = {}

    def write(self, resident: Resident, numbers: Numbers) -> None:
        """Keep the numbers of an adapter that leaves its slot.

        Raises:
            OSError: A file that cannot be written; then the adapter is where it was.
        """
        if self._folder is None:
            self._numbers[resident.name] = numbers
        else:
            write_file(self._file(resident), to_bytes(resident, numbers))

    def read(self, resident: Resident) -> Numbers:
        """Return the numbers of an adapter that goes into a slot.

        Raises:
            FileNotFoundError, ValueError: A file that is gone, or damaged.
        """
        if self._folder is None:
            return self._numbers.pop(resident.name)
        return read_record(self._file(resident))[1]

    def drop(self, resident: Resident) -> None:
        """Forget an adapter that is removed."""
        self._numbers.pop(resident.name, None)
        if self._folder is not None:
            self._file(resident).unlink(missing_ok=True)

    def _file(self, resident: Resident) -> Path:
        assert self._folder is not None
        return self._folder / f"{urllib.parse.quote(resident.name, safe='')}.safetensors"
