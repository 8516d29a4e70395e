"""What is attached to the parts of adapters in a model, which a call by rows would run past."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from torchgraft.functional import UnsupportedCall
from torchgraft.functional.extending import Tree, is_unit, modules_of

from ..layer.holders import Holders, Watch
from ..layer.parameters import ParameterLayer
from ..walk import layers, placed_modules

_FORWARD = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
_BACKWARD = ("_backward_hooks", "_backward_pre_hooks")


def carry_hooks(model: nn.Module, base: nn.Module) -> None:
    """Have the modules of a bare copy run the forward hooks of the layers around the model's.

    Args:
        model: A model with injected adapters.
        base: Its bare copy.
    """
    modules = modules_of(base)
    for path, part in _alone(placed_modules(model)):
        if any(vars(part)[name] for name in _FORWARD):
            vars(modules[path]).update({name: copy.copy(vars(part)[name]) for name in _FORWARD})


def _alone(placed: Sequence[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Return the parts that are the only ones around a module, with no sharding of their own."""
    around = Counter(id(part.user_module) for _, part in placed)
    return [
        (path, part)
        for path, part in placed
        if around[id(part.user_module)] == 1 and not isinstance(part, ParameterLayer) and not is_unit(part)
    ]


def check_unattached(model: nn.Module) -> None:
    """Refuse hooks and the like on parts of adapters: a call by rows computes with their tensors, and calls no part.

    Forward hooks on a layer itself are for `carry_hooks`, where it is the only one around its module.

    Raises:
        UnsupportedCall: Something is attached; names the layer.
    """
    placed = placed_modules(model)
    carried = {id(part) for _, part in _alone(placed)}
    for path, part in placed:
        own = [*part.own_modules()]
        for module in (*own, part.user_module):
            names = _BACKWARD if id(module) in carried else (*_FORWARD, *_BACKWARD)
            hooked = any(vars(module)[name] for name in names)
            if hooked or (module in own and "forward" in vars(module)):
                raise UnsupportedCall(
                    f"{path}: a {'hook' if hooked else 'forward of its own'} is attached to the "
                    f"{type(module).__name__} of its adapters, which rows with adapters of their own would run past; "
                    "remove it, attach it to a module without adapters, or call set_adapter(model, name) and the "
                    "model, one adapter at a time"
                )
    for path, layer in layers(model).items():
        for name, entry in layer.entries.items():
            holders = Holders(layer._modules, layer.made, name, entry)
            if Watch([holders]).attached(layer.get_base_layer().training):
                raise UnsupportedCall(
                    f"{path}: what holds the parameters of adapter {name!r} computes something else than was injected "
                    "(another module, a parametrization, another dropout or mode), which rows with adapters of their "
                    "own would run past; put it back, or call set_adapter(model, name) and the model"
                )


def check_held(adapter: str, tree: Tree, held: Iterable[Tensor]) -> None:
    """Refuse leaves that are no tensors of the model, but made anew whenever they are read, or without values.

    Raises:
        UnsupportedCall: Such a leaf; names its path.
    """
    known = {id(tensor) for tensor in held}
    for path, leaves in tree.items():
        for leaf, tensor in leaves.items():
            if id(tensor) not in known or tensor.is_meta:
                raise UnsupportedCall(
                    f"{path}: {leaf} of adapter {adapter!r} is sharded, offloaded, computed or without values, and "
                    "rows with adapters of their own take parameters that rest in the model; gather it, or call "
                    "set_adapter(model, name) and the model"
                )


def check_buffers(path: str, copies: Any, original: nn.Module, names: Iterable[str]) -> None:
    """Refuse copies of `modules_to_save` whose buffers are not the original's, which all rows use.

    Raises:
        UnsupportedCall: Such a buffer; names it.
    """
    buffers = dict(original.named_buffers())
    for name in names:
        for key, buffer in copies[name].named_buffers() if name in copies else ():
            if not buffer.equal(buffers[key]):
                raise UnsupportedCall(
                    f"{path}.{key}: this buffer of adapter {name!r} is not the base's, and rows with adapters of "
                    "their own share buffers; call set_adapter(model, name) and the model"
                )
