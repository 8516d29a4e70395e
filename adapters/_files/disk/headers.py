"""The header of a safetensors file, checked before any tensor is read."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from .strict_json import parse_object

MOST_HEADER = 32 * 2**20
"""Bytes that a header may have: enough for 100,000 tensors."""

_LARGEST = 2**62
"""No shape has as many elements, axes of zero counted as one."""

DTYPES = {
    "BF16": torch.bfloat16,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "I8": torch.int8,
    "U8": torch.uint8,
}

_DISGUISES = {
    b"PK\x03\x04": "it looks like a file of torch.save, which is never read here for it can run code; convert it with "
    "PEFT: load it and call save_pretrained(path, safe_serialization=True)",
    b"\x80": "it looks like a pickle, which is never read here for it can run code",
    b"version https://git-lfs": "it is a pointer of Git LFS, not the file itself; run `git lfs pull`",
}


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a header says of one tensor; `start` and `end` count from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Weights:
    """An opened safetensors file whose header is sound.

    Attributes:
        file: Its path.
        specs: What it holds, by key.
        size: Its size in bytes.
        handle: The opened file.
        made: Keys of tensors that are made of those of the file, which have been checked then.
    """

    file: Path
    specs: dict[str, Spec]
    size: int
    handle: BinaryIO
    made: frozenset[str] = frozenset()

    def read(self) -> dict[str, Tensor]:
        """Read all tensors, on the CPU.

        Raises:
            ValueError: The file has changed since its header was read.
        """
        self.handle.seek(0)
        data = self.handle.read(self.size + 1)
        if len(data) != self.size:
            raise ValueError(f"{self.file}: changed while it was read; load it again when it is complete")
        try:
            tensors = safetensors.torch.load(data)
        except (SafetensorError, AssertionError, ValueError) as error:
            raise ValueError(f"{self.file}: is no sound safetensors file: {error}") from error
        if {key: tensor.shape for key, tensor in tensors.items()} != {key: s.shape for key, s in self.specs.items()}:
            raise ValueError(f"{self.file}: changed while it was read; load it again when it is complete")
        return tensors


def open_weights(handle: BinaryIO, file: Path) -> Weights:
    """Read and check the header of a safetensors file; no more is read than the header says, and that has a cap.

    Args:
        handle: The opened file.
        file: What the error messages call it.

    Raises:
        ValueError: A file that is cut off or longer than it says, no safetensors file, or a header that contradicts
            itself; names the key.

    >>> import io
    >>> data = safetensors.torch.save({"a": torch.zeros(2, 3)})
    >>> open_weights(io.BytesIO(data), Path("x.safetensors")).specs["a"].shape
    (2, 3)
    >>> open_weights(io.BytesIO(data[:-1]), Path("x.safetensors"))
    Traceback (most recent call last):
    ValueError: x.safetensors: is cut off: its header speaks of 24 bytes of tensors, and 23 are there
    """
    size = handle.seek(0, os.SEEK_END)
    handle.seek(0)
    first = handle.read(32)
    length = int.from_bytes(first[:8], "little")
    if size < 8 or length > min(size - 8, MOST_HEADER):
        hint = next((f": {hint}" for magic, hint in _DISGUISES.items() if first.startswith(magic)), "")
        cap = f" (the most is {MOST_HEADER})" if length > MOST_HEADER else ""
        said = f", and it would need a header of {length} bytes{cap}" if size >= 8 else ""
        raise ValueError(f"{file}: is no safetensors file, or cut off: it has {size} bytes{said}{hint}")
    handle.seek(8)
    header = parse_object(handle.read(length), f"{file} (header)")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{file}: __metadata__ is {metadata!r}, expected an object of strings")
    specs = {key: _spec(file, key, fields) for key, fields in header.items()}
    _check_layout(file, specs, size - 8 - length)
    return Weights(file, specs, size, handle)


def _spec(file: Path, key: str, fields: Any) -> Spec:
    if not isinstance(fields, dict) or set(fields) != {"data_offsets", "dtype", "shape"}:
        raise ValueError(f"{file}: {key!r} is described by {fields!r:.200}, expected dtype, shape and data_offsets")
    name, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"{file}: {key!r} has dtype {name!r:.200}, expected one of {sorted(DTYPES)}")
    if not _sizes(shape) or math.prod(max(axis, 1) for axis in shape) >= _LARGEST:
        raise ValueError(f"{file}: {key!r} has shape {shape!r:.200}, expected a list of sizes")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{file}: {key!r} has data_offsets {offsets!r:.200}, expected [start, end]")
    dtype = DTYPES[name]
    if (needed := math.prod(shape) * dtype.itemsize) != offsets[1] - offsets[0]:
        raise ValueError(
            f"{file}: {key!r} of shape {tuple(shape)} and dtype {name} needs {needed} bytes, and its data_offsets "
            f"{offsets} hold {offsets[1] - offsets[0]}"
        )
    return Spec(dtype, tuple(shape), *offsets)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, int) and type(one) is int and one >= 0 for one in value)


def _check_layout(file: Path, specs: dict[str, Spec], there: int) -> None:
    """Tensors follow each other without holes, from the end of the header to the end of the file."""
    at = 0
    for key, spec in sorted(specs.items(), key=lambda item: (item[1].start, item[1].end)):
        if spec.start != at:
            raise ValueError(f"{file}: {key!r} starts at {spec.start}, expected {at}, where the tensor before it ends")
        at = spec.end
    if at > there:
        raise ValueError(f"{file}: is cut off: its header speaks of {at} bytes of tensors, and {there} are there")
    if at < there:
        raise ValueError(f"{file}: its header speaks of {at} bytes of tensors, and {there} are there")
