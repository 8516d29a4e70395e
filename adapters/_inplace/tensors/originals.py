"""The base's weights as they are without merged adapters, kept so that unmerging restores every bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.functional import Site
from torchgraft.functional.extending import Adapted, BaseWithTensors, own_tensor, quantised_form

from .checksum import Content, content, holds
from .gathering import put


def check_mergeable(site: Site, module: nn.Module) -> None:
    """Refuse a module whose weight no merged one can take the place of.

    Raises:
        ValueError: A weight that is computed, packed or quantised.
    """
    forms = [quantised_form(getattr(module, name)) for name in site.weight_names] or ["packed"]
    if (form := next(filter(None, forms), None)) is not None:
        raise ValueError(
            f"{site.path}: its weight is {form}, so no adapter can be merged into it; leave the adapter unmerged, "
            "merge it into the model as it was before quantisation, or dequantise this module first"
        )
    if any(own_tensor(module, name) is None for name in site.weight_names):
        raise ValueError(
            f"{site.path}: weight is computed (a parametrization or weight norm), so no adapter can be merged into it; "
            "remove it first, or leave the adapter unmerged"
        )


class Originals:
    """Original tensors of one module by name; empty while nothing is merged into it.

    What a merge left in the module is known by its content, which is compared whenever the merged weights change, and
    never in a call.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._merged: dict[str, Content] = {}

    def base(self, module: nn.Module, site: Site) -> BaseWithTensors:
        """Return the module as methods see it, without what is merged."""
        return BaseWithTensors(module, site, self.tensors)

    def replace(self, module: nn.Module, layer: Adapted, names: Iterable[str], safe: bool) -> None:
        """Give the module the weights of `layer`; its parameters stay the same objects.

        Raises:
            ValueError: A weight that is computed, or one that is not finite where `safe`.
            RuntimeError: Something else wrote to the weights while adapters were merged.
        """
        site = layer.entry.site
        check_mergeable(site, module)
        self.check_unwritten(module, site.path)
        self.put(module, site.path, site.stored(*layer.dense()), names, safe)

    def put(self, module: nn.Module, path: str, merged: Mapping[str, Tensor], names: Iterable[str], safe: bool) -> None:
        """Give the module these tensors, by name; its parameters stay the same objects.

        Raises:
            ValueError: One that is not finite where `safe`.
        """
        for leaf, value in merged.items():
            if safe and not torch.isfinite(value).all():
                raise ValueError(f"{path}: {leaf} with {list(names)} merged has values that are not finite")
        for leaf, value in merged.items():
            own = own_tensor(module, leaf)
            if own is None:
                continue
            before = put(module, leaf, value.to(own.dtype).contiguous())
            self.tensors.setdefault(leaf, before)
        self._note(module)

    def restore(self, module: nn.Module, path: str) -> None:
        """Give the module its original tensors back, the very ones.

        Raises:
            RuntimeError: Something else wrote to the weights while adapters were merged.
        """
        self.check_unwritten(module, path)
        for leaf, tensor in self.tensors.items():
            put(module, leaf, tensor)
        self.tensors, self._merged = {}, {}

    def apply(self, module: nn.Module, fn: Callable[[Tensor], Tensor], move: Callable[[], object]) -> None:
        """Follow the module where `to()` and the like take it.

        Args:
            module: The module.
            fn: What happens to each tensor.
            move: Does it to the module's own.
        """
        written = self._written(module)
        move()
        self.tensors = {leaf: fn(tensor) for leaf, tensor in self.tensors.items()}
        self._note(module)
        for leaf in written:  # an error amid `to()` would leave half of a model where it was
            self._merged[leaf] = self._merged[leaf]._replace(checksum=-1)  # no hash is -1

    def _note(self, module: nn.Module) -> None:
        self._merged = {leaf: content(_own(module, leaf)) for leaf in self.tensors}

    def _written(self, module: nn.Module) -> list[str]:
        """Return the tensors that hold something else than what was merged."""
        return [
            leaf
            for leaf, merged in self._merged.items()
            if (own := own_tensor(module, leaf)) is None or not holds(own, merged)
        ]

    def check_unwritten(self, module: nn.Module, path: str) -> None:
        """Make sure that nothing but a merge wrote to the weights since they were merged.

        Raises:
            RuntimeError: Something did.
        """
        written = self._written(module)
        if written:
            raise RuntimeError(
                f"{path}: something wrote to {written[0]} while adapters were merged into it, so the original is not "
                "what it was; unmerge before changing the base's weights. merge_and_unload(model) keeps the weights as "
                "they are now and drops the adapters"
            )


def _own(module: nn.Module, leaf: str) -> Tensor:
    own = own_tensor(module, leaf)
    assert own is not None
    return own


def refuse_while_merged(layer: Any, state_dict: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    """Refuse to load the base's weights into a layer while adapters are merged into them.

    Raises:
        RuntimeError: The base's weights are among what is loaded, or something else wrote to them.
    """
    if layer.merged and any(f"{prefix}{layer.base_prefix}{name}" in state_dict for name in layer.originals.tensors):
        raise RuntimeError(
            f"{prefix.rstrip('.')}: adapters {layer.merged_adapters} are merged, so loading the base's weights would "
            "mix the two; call unmerge_adapter(model) first"
        )
    layer.check_unwritten()


def refresh_after_loading(layer: Any, _: Any) -> None:
    """Have what is merged into a layer be what it just loaded."""
    layer.remerge(layer.merged_adapters)
