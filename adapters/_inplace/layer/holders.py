"""The modules that hold a layer's leaves, and whether something is attached to one of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.module import _has_any_global_hook as has_global_hooks

from torchgraft.functional.extending import SiteAdapter, computed

from ..._methods.shared.called import DROPOUT, Called, Holder, read
from .containers import Parameters

_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Identity, nn.Dropout)
_TRAITS = ("stride", "padding", "dilation", "groups", "padding_mode", "inplace")

Traits = tuple[Any, ...]


def traits(module: Any) -> Traits | None:
    """Return the class and the settings by which a module computes; `None` for one of another kind than holders have.

    >>> traits(nn.Linear(2, 2)) == traits(nn.Linear(3, 2)), traits(nn.Bilinear(2, 2, 2)) is None
    (True, True)
    """
    cls = type(module)
    return (cls, *map(vars(module).get, _TRAITS)) if cls in _PLAIN or Holder in cls.__bases__ else None


class Part(NamedTuple):
    """A module that holds leaves of an adapter, or its dropout, as it was when it was collected.

    Attributes:
        leaf: The leaf that is its weight, or `DROPOUT`.
        module: The module.
        own: Its attributes.
        cls: Its class; `None` where its tensors alone do not say what it computes.
        bias: Its bias.
    """

    leaf: str
    module: Any
    own: dict[str, Any]
    cls: type | None
    bias: Any


class Holders:
    """The modules that hold one adapter's leaves on a layer.

    Args:
        modules: What hangs in the layer, by attribute.
        made: What the modules computed that were made to hold leaves, by attribute and adapter.
        name: The adapter's name.
        entry: Its config and site.
        casts: Whether modules that are called get their input in the dtype of their weight.

    Attributes:
        parts: Each of them.
        containers: The containers of bare parameters.
        moved: Whether one of these has something else than a parameter, as FSDP exchanges it for parts of a flat one.
        p: The probability of dropout.
    """

    def __init__(
        self,
        modules: Mapping[str, Any],
        made: Mapping[tuple[str, str], Traits | None],
        name: str,
        entry: SiteAdapter,
        casts: bool = True,
    ):
        self._casts = casts
        config: Any = entry.config
        self._entry, form = entry, config.form
        self._called = not (entry.site.is_parameter or entry.site.kind == "attention")
        self._biases = {form.place(leaf)[0]: leaf for leaf in form.biases if getattr(config, form.biased, False)}
        holders = {leaf: leaf for leaf in (*form.modules, *form.bare_modules)}
        if not (entry.site.is_parameter or entry.site.kind == "embedding"):  # those ignore it, as in PEFT
            holders[form.dropout] = DROPOUT
        self.parts = [
            self._part(leaf, modules[attribute]._modules[name], made.get((attribute, name)))
            for attribute, leaf in holders.items()
            if name in modules.get(attribute, ())
        ]
        self._bare = [(leaf, modules[leaf], name) for leaf in form.parameters if name in modules.get(leaf, ())]
        together = form.together(entry.site)
        apart = form.grouped or form.numbered or together
        for leaf, (attribute, key) in form.places(entry.site).items() if apart else ():
            if leaf in together:
                box = modules[attribute]
                self._bare.append((leaf, box, name) if key is None else (leaf, box[name], key))
            elif form.is_grouped(leaf) and name in modules.get(attribute, ()) and key in modules[attribute][name]:
                self._bare.append((leaf, modules[attribute][name], str(key)))
        self.containers = [box for _, box, _ in self._bare]
        self.moved = any(key not in box._parameters and key not in box._buffers for _, box, key in self._bare)
        self.p = form.dropout_of(config)

    def _part(self, leaf: str, module: Any, made: Traits | None) -> Part:
        own = vars(module)
        bias = own["_parameters"].get("bias")
        same = made is not None and traits(module) == made and (bias is not None) == (leaf in self._biases)
        return Part(leaf, module, own, type(module) if same else None, bias)

    def maps(self, called: bool = True) -> dict[str, Any]:
        """The adapter's leaves as `apply` is to have them where something is attached: modules, if it calls these.

        An attention and bare parameters are multiplied with tensors, as in PEFT: there hooks see nothing, and weights
        that rest elsewhere are read.

        Args:
            called: Whether modules will do; else all are tensors, and dropout is left out.
        """
        path = self._entry.site.path
        found = {leaf: computed(box, key) for leaf, box, key in self._bare}
        for leaf, module, *_ in self.parts:
            if called and (self._called or leaf == DROPOUT):
                found[leaf] = Called(module, path, leaf, self._casts)
            elif leaf != DROPOUT:
                found[leaf] = read(module, "weight", path, leaf)
                if leaf in self._biases:
                    found[self._biases[leaf]] = read(module, "bias", path, leaf)
        return found


class Watch:
    """Notices, in about a microsecond, that something is attached to a holder of some adapters.

    Args:
        holders: Those of each adapter.
    """

    def __init__(self, holders: Iterable[Holders]):
        holders = list(holders)
        self._parts = [part[1:] for one in holders for part in one.parts]
        self.modules = [module for module, *_ in self._parts]
        self._containers = [container for one in holders for container in one.containers]
        self._moved = any(one.moved for one in holders)
        self._dropouts = [
            (part.own, one.p) for one in holders for part in one.parts if part.leaf == DROPOUT and one.p and part.cls
        ]

    def attached(self, training: bool) -> bool:
        """Return whether a module computes more than its tensors say: it has to be called.

        Args:
            training: The mode of the base.
        """
        for module, own, cls, bias in self._parts:
            if (
                own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
                or type(module) is not cls
                or "forward" in own
                or own["_parameters"].get("bias") is not bias
            ):
                return True
        for own, p in self._dropouts:
            if own["p"] != p or own["training"] is not training:
                return True
        return self._moved or has_global_hooks() or bool(self._containers and self.overridden())

    def amid(self, compute: Callable[[], Any]) -> Any:
        """`compute()`, in the calls of the containers that need one."""
        for container in self.overridden():
            compute = functools.partial(container, compute)
        return compute()

    def overridden(self) -> list[Any]:
        """Return the containers of bare parameters whose call was replaced, as offloading and sharding do."""
        return [box for box in self._containers if type(box) is not Parameters or "forward" in vars(box)]
