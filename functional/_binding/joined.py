"""Bindings of several stacks: adapters of several methods meet a model, of which each row of a batch has one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Self

from torch import nn

from .._method import Config, SiteAdapter
from .binding import Binding


@dataclasses.dataclass(frozen=True, eq=False)
class JoinedBinding(Binding):
    """Several stacks bound to one model, by name, for calls in which no row has adapters of two of them.

    Attributes:
        members: The configs of all stacks.
        stacks: The binding of each.
    """

    members: Sequence[Config] = ()  # type: ignore[misc]
    stacks: Mapping[str, Binding] = dataclasses.field(default_factory=dict)

    conflicts = ()  # type: ignore[assignment]  # no row has two adapters that could replace the same tensor

    @classmethod
    def of_stacks(cls, model: nn.Module, stacks: Mapping[str, Binding]) -> Self:
        """Join stacks that are each bound to a model.

        >>> from torchgraft.adapters import IA3Config, LoraConfig
        >>> model, methods = nn.Linear(4, 3), {"a": LoraConfig, "b": IA3Config}
        >>> stacks = {k: Binding.plan(model, {"": c(target_modules=[""])}, False) for k, c in methods.items()}
        >>> sorted(JoinedBinding.of_stacks(model, stacks).shapes)
        ['a', 'b']
        """
        return cls(
            model,
            {name: stack.configs[""] for name, stack in stacks.items()},
            named=True,
            sites={name: stack.sites[""] for name, stack in stacks.items()},
            replaced={name: stack.replaced[""] for name, stack in stacks.items()},
            tied={name: stack.tied[""] for name, stack in stacks.items()},
            shapes={name: stack.shapes[""] for name, stack in stacks.items()},
            members=[config for stack in stacks.values() for config in stack.members or stack.configs.values()],
            stacks=stacks,
        )

    def adapters(self, name: str, modules: Mapping[str, nn.Module] | None = None) -> dict[str, SiteAdapter]:
        return self.stacks[name].adapters("", modules)
