"""A graft and its parameters as a module, for programs that want one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Self

from torch import Tensor, nn

from ._graft import Graft
from ._method import Tree
from ._trainable import checked_leaves
from ._trees import sort


class AdapterModule(nn.Module):
    """A graft and its parameters as a module: for optimizers, Lightning, DDP, FSDP and checkpoints.

    Its parameters are the adapter's, all of them and nothing else, under the tree's names
    (`layers.0.q_proj.lora_A`); so `state_dict()` is small and `load_state_dict` fits. Its forward is the graft's call.
    They share the memory of `params`, where training is seen.

    The base is no part of it, and what is done to the module is not done to the base:

    - `to()`, `half()` and the like move and cast the adapter; move the base by `model.to(device)`, which the next call
      sees. A copy of the module that goes to another device leaves the base where it is.
    - `train()` and `eval()` hold for the adapter and for the base, in this module's calls. The modes that the model
      itself is in count at construction only, and are never changed.
    - `copy.deepcopy` copies the adapter and shares the base.

    Other methods of the model are those of a view, `module.view().generate(...)`: the model's own `generate` would run
    without the adapter.

    Args:
        graft: What `bind` returned.
        params: A tree, or `{name: tree}`, whose tensors are leaves of autograd. Of a stack, make one module for
            each adapter: `AdapterModule(graft.member(i), graft.unstack(many)[i])`.

    Attributes:
        graft: The graft.

    Raises:
        KeyError, TypeError, ValueError: A tree that does not fit the graft, or whose leaves cannot be trained.

    >>> import torch
    >>> from torchgraft.adapters import LoraConfig
    >>> from torchgraft.functional import bind
    >>> graft = bind(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
    >>> module = AdapterModule(graft, graft.init())
    >>> [name for name, _ in module.named_parameters()]
    ['0.lora_A', '0.lora_B']
    >>> module(torch.ones(5, 4)).shape
    torch.Size([5, 3])
    """

    graft: Graft

    def __init__(self, graft: Graft, params: Tree):
        super().__init__()
        if not isinstance(graft, Graft):
            raise TypeError(f"AdapterModule: graft is of type {type(graft).__name__}, expected what bind returned")
        checked_leaves(params, "AdapterModule")
        graft.binding.active(params)
        self.graft = graft
        self._in_mode: dict[bool, Graft] = {}
        self._places: list[tuple[tuple[str, ...], nn.Module, str]] = []
        made: dict[int, nn.Parameter] = {}
        for keys, tensor in _paths(sort(params)):
            path, _, name = ".".join(keys).rpartition(".")
            holder = self._holder(path)
            if name in holder._parameters:
                raise ValueError(f"AdapterModule: two leaves have the name {'.'.join(keys)!r}; rename an adapter")
            holder._parameters[name] = made.setdefault(id(tensor), _as_parameter(tensor))
            self._places.append((keys, holder, name))
        self.train(graft.model.training)

    @property
    def params(self) -> Tree:
        """The tree, of the parameters as they are now: what `save_adapter`, `merge` and `route` take."""
        tree: Tree = {}
        for (*path, leaf), holder, name in self._places:
            node: Any = tree
            for key in path:
                node = node.setdefault(key, {})
            node[leaf] = holder._parameters[name]
        return tree

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model with the adapter, in this module's mode."""
        return self._in_mode[self.training](self.params, *args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """Put the adapter, and the base in this module's calls, into training or evaluation mode."""
        if mode not in self._in_mode:
            self._in_mode[mode] = self.graft.in_mode(mode)
        return super().train(mode)

    def view(self) -> nn.Module:
        """Return a module like the user's with the adapter in, as `Graft.view` does, in this module's mode."""
        return self._in_mode[self.training].view(self.params)

    def extra_repr(self) -> str:
        return repr(self.graft)

    def _holder(self, path: str) -> nn.Module:
        """Return the module that has a site's parameters, made if it is not there.

        Names may be those of a module's methods, which `add_module` refuses.
        """
        holder: nn.Module = self
        for name in path.split(".") if path else ():
            if name not in holder._modules:
                holder._modules[name] = nn.Module()
            holder = holder._modules[name]  # type: ignore[assignment]
        return holder

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if hasattr(getattr(self.__dict__.get("graft"), "model", None), name):
                raise AttributeError(
                    f"AdapterModule has no {name!r}, which the base has; module.view().{name} is with the adapter"
                ) from None
            raise

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo |= {id(graft): graft for graft in (self.graft, *self._in_mode.values())}
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new


def _paths(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _paths(value, (*path, key))
        else:
            yield (*path, key), value


def _as_parameter(tensor: Tensor) -> nn.Parameter:
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach())
