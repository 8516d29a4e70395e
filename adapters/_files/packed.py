"""Files whose tensors are another form of an adapter's leaves."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .._config.base import AdapterConfig
from .._config.peft_format import as_they_are
from .disk.headers import Spec, Weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnpackedWeights(Weights):
    """An opened file, seen as if it held the leaves.

    Attributes:
        config: The config that came with the file.
        packed: The file as it is.
    """

    config: AdapterConfig
    packed: Weights

    def read(self) -> dict[str, Tensor]:
        """Read all tensors, and make those of the leaves."""
        return self.config.form.unpack(self.config, self.packed.read())


def unpacked(config: AdapterConfig, weights: Weights) -> Weights:
    """Return a file's tensors as an adapter's leaves are: the file itself, unless it has them in another form.

    Raises:
        ValueError: Keys or shapes that are none of the form.
    """
    if config.form.unpack is as_they_are:
        return weights
    given = {key: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for key, spec in weights.specs.items()}
    leaves = config.form.unpack(config, given)
    specs = {key: Spec(leaf.dtype, tuple(leaf.shape), 0, 0) for key, leaf in leaves.items()}
    kept = {key: own for key, own in weights.specs.items() if key in specs and specs[key].shape == own.shape}
    made = {key: spec for key, spec in specs.items() if key not in kept}
    return UnpackedWeights(
        weights.file, kept | made, weights.size, weights.handle, frozenset(made), config=config, packed=weights
    )
