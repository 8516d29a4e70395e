"""Wrapped modules as bases of adapters: called as modules, and with adapters merged into their weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook as has_global_hooks

from torchgraft.functional.extending import (
    Base,
    Site,
    check_base,
    held_tensors,
    is_sharded,
    is_unit,
    whole,
)

from ..._methods.shared.called import in_memory
from ..tensors.originals import Originals


class CalledBase(Base):
    """The wrapped module, called as a module, so that its own hooks run."""

    __slots__ = ()

    def run(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and self.as_linear is not None:
            check_base(self.site.path, held_tensors(self.module)[0], x)
        result: Tensor = self.module(x, *self.args, **self.kwargs)
        return result

    def dense(self) -> tuple[Tensor, Tensor | None]:
        """Canonical weight and bias, whole and in memory."""
        if "_hf_hook" not in vars(self.module):
            weight, bias = super().dense()
        else:
            with in_memory(self.module):
                weight, bias = super().dense()
        return whole(weight), None if bias is None else whole(bias)

    def linear_tensors(self) -> tuple[Tensor, Tensor | None] | None:
        """As in `Base`, unless a hook or a forward of the module's own wants to see the call."""
        return super().linear_tensors() if is_bare(self.module) else None


def is_bare(module: Any) -> bool:
    """Return whether no hook and no forward of a module's own wants to see its call."""
    own = vars(module)
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
        or has_global_hooks()
    )


class BaseOverMerged(Base):
    """A base that adapters are merged into: its own weights are kept elsewhere."""

    __slots__ = ("originals",)

    originals: Originals

    @property
    def original(self) -> Base:
        return self.originals.base(self.module, self.site)


class CalledOverMerged(CalledBase, BaseOverMerged):
    """The same, called as a module."""

    __slots__ = ()


def is_parallel(base: Any, site: Site) -> bool:
    """Return whether hooks of a module, as `parallelize_module` puts them, have it compute with sharded tensors."""
    sharded = base._forward_pre_hooks and not is_unit(base)
    return bool(sharded) and any(is_sharded(getattr(base, name)) for name in site.weight_names)
