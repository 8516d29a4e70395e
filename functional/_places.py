"""The constants and sites of each place of a stack, as tensors: they can change without binding again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Places:
    """The constants of the adapters of a stack, and which sites each has; made by `StackedGraft.places`.

    Attributes:
        constants: `{path: {name: "N ..."}}`.
        present: `{path: "N"}`, whether an adapter has the site.
        known: The values of `present`, where they can be told without waiting for a device.
    """

    constants: Mapping[str, Mapping[str, Tensor]]
    present: Mapping[str, Tensor]
    known: Mapping[str, tuple[bool, ...]] = dataclasses.field(default_factory=dict)

    def put(self, index: int, other: Places) -> Places:
        """Return the same places with another adapter in one of them.

        Args:
            index: The place.
            other: Places of which the first holds the adapter, as `graft.places([config])`.

        Raises:
            IndexError: There is no such place.
            ValueError: Places of another graft.

        >>> places = Places({"0": {"scaling": torch.ones(3)}}, {"0": torch.ones(3, dtype=torch.bool)})
        >>> places.put(1, Places({"0": {"scaling": torch.tensor([2.0])}}, {"0": torch.tensor([False])})).present["0"]
        tensor([ True, False,  True])
        """
        if not 0 <= index < len(self):
            raise IndexError(f"put: index is {index}, and the stack has places 0 to {len(self) - 1}")
        for path, own in self.constants.items():
            if path not in other.constants or other.constants[path].keys() != own.keys():
                raise ValueError(
                    f"put: the other places have no {', '.join(own) or 'site'} at {path!r}; make them with "
                    "places([...]) of the same graft"
                )
        at = torch.tensor([index])
        constants = {
            path: {
                name: value.index_copy(0, at.to(value.device), other.constants[path][name][:1].to(value))
                for name, value in site_constants.items()
            }
            for path, site_constants in self.constants.items()
        }
        present = {
            path: value.index_copy(0, at.to(value.device), other.present[path][:1].to(value.device))
            for path, value in self.present.items()
        }
        known = {
            path: (*values[:index], other.known[path][0], *values[index + 1 :])
            for path, values in self.known.items()
            if path in other.known
        }
        return Places(constants, present, known)

    def __len__(self) -> int:
        return len(next(iter(self.present.values())))
