"""Adapters that are merged into the weights of the module that they are on."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from torchgraft.functional import AddsProduct
from torchgraft.functional.extending import Adapted, Base, Dense, beside

from ..placed import Owners, refuse_tied
from ..tensors.originals import Originals, refresh_after_loading, refuse_while_merged
from .leaves import LayerLeaves


class MergingLayer(LayerLeaves):
    """A module of the user's model, whose weights adapters can be part of until they are unmerged.

    The original weights are kept, so that unmerging restores every bit.

    Attributes:
        merged_adapters: Names of the adapters that are part of the base's weights now, the innermost first.
        originals: The base's weights without them.
    """

    is_layer = True

    def __init__(self, base_layer: nn.Module):
        super().__init__(base_layer)
        self.merged_adapters: list[str] = []
        self.originals = Originals()
        self._active: list[str] = []
        self.register_load_state_dict_pre_hook(refuse_while_merged)  # type: ignore[no-untyped-call,unused-ignore]
        self.register_load_state_dict_post_hook(refresh_after_loading)  # type: ignore[no-untyped-call,unused-ignore]

    @property
    def merged(self) -> bool:
        """Whether any adapter is part of the base's weights."""
        return bool(self.merged_adapters)

    @property
    def base_prefix(self) -> str:
        """What the names of the wrapped module's tensors start with in this layer."""
        return "base_layer."

    def set_constants(self, name: str, constants: Mapping[str, Any]) -> None:
        """Give an adapter on this layer other constants: a scaling factor, shared tensors.

        Raises:
            RuntimeError: Something else wrote to the weights while adapters were merged.
        """
        self.check_unwritten()
        entry = self._entries[name]
        site = dataclasses.replace(entry.site, constants=entry.site.constants.replace(constants))
        self._entries[name] = dataclasses.replace(entry, site=site)
        self.remerge(self.merged_adapters)

    def set_shared(self, name: str, shared: Mapping[str, Tensor]) -> None:
        """Give an adapter on this layer those of some shared constants that are its own, and what goes with them.

        Args:
            name: The adapter's name.
            shared: The constants, by name in files; those of other sites may be among them.

        Raises:
            RuntimeError: Something else wrote to the weights while adapters were merged.
        """
        config, site = cast(Any, self._entries[name].config), self._entries[name].site
        names = config.form.shared_names(site).items()
        if own := {constant: shared[under] for constant, under in names if under in shared}:
            read = self.originals.base(self.get_base_layer(), site)
            self.set_constants(name, config.form.follow_shared(config, site, lambda: read.weight.detach(), own))

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return what an adapter adds to the base's weight, in the layout of that weight and the adapter's dtype.

        Computed in float64. For a method that does not add, it is the difference that it makes to the original weight.

        Raises:
            KeyError: No such adapter on this layer.
        """
        entry = self._entries[adapter_name]
        (weight, _), (merged, _) = self._with_alone(adapter_name)
        parts = [*entry.site.stored(merged - weight, None).values()]
        leaf = next(iter(self.numbers(adapter_name).values()))
        return (torch.block_diag(*parts) if len(parts) > 1 else parts[0]).to(leaf.dtype)

    @torch.no_grad()
    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return whether `convert_to_lora` is for an adapter on this layer: it can be merged, and leaves the bias.

        What is no plain LoRA is merged, in memory of its own, to find out.
        """
        entry = self._entries.get(adapter_name)
        if entry is None:
            return False
        config: Any = entry.config
        if config.method.ability(AddsProduct) is not None and not config.use_dora:
            return True
        try:
            (_, bias), (_, merged) = self._with_alone(adapter_name)
        except (TypeError, ValueError):  # quantised, or without a merged form
            return False
        return merged is None or (bias is not None and torch.equal(bias.to(merged.dtype), merged))

    def _with_alone(self, adapter_name: str) -> tuple[Dense, Dense]:
        """Return the base's weight and bias, and both with one adapter in, in float64."""
        entry = self._entries[adapter_name]
        leaves = beside(entry.site, self.numbers(adapter_name))
        entry.check(leaves)
        weight, bias = self.originals.base(self.get_base_layer(), entry.site).dense()
        return (weight, bias), entry.merge(leaves, weight.double(), None if bias is None else bias.double())

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Make adapters part of the base's weights; the sum is taken in float32 or wider and rounded once.

        Args:
            safe_merge: Refuse weights that are not finite.
            adapter_names: Names of the adapters; by default the active ones.

        Raises:
            ValueError: Weights that are not finite, that are computed, or that have no merged form.
        """
        new = self.unmerged(adapter_names)
        if new:
            self._bake(self.merged_with(new), safe_merge)

    def unmerged(self, adapter_names: Iterable[str] | None = None) -> list[str]:
        """Return which of these adapters, by default of the active ones, are on this layer and not merged."""
        names = dict.fromkeys(self._active if adapter_names is None else adapter_names)
        return [name for name in names if name in self._entries and name not in self.merged_adapters]

    def merged_with(self, names: Iterable[str] | None) -> list[str]:
        """Return what is merged together with these adapters, by default with the active ones, the innermost first."""
        return [*self.merged_adapters, *self._inside_out(self.unmerged(names))]

    def check_merge(self, names: Iterable[str]) -> None:
        """Do nothing: any adapters can be merged together."""

    def check_tied(self, path: str, names: Iterable[str], owners: Owners, placed: Mapping[int, Any]) -> None:
        """Refuse to change a weight that another module uses too."""
        if set(names) == set(self.merged_adapters):
            return
        site = next(iter(self.entries.values())).site
        for leaf in site.names if site.has_bias else site.weight_names:
            refuse_tied(path, leaf, "adapter", owners.others(self.get_base_layer(), leaf).values())

    def merge_adapters(self, names: Iterable[str] | None, safe: bool) -> None:
        """Merge these adapters too, where they are on this layer."""
        self.merge(safe_merge=safe, adapter_names=None if names is None else list(names))

    def unmerge(self, adapter_names: list[str] | None = None) -> None:
        """Take merged adapters, by default all, out of the base's weights again, bit for bit.

        Raises:
            RuntimeError: Something else wrote to the weights while adapters were merged.
        """
        names = self.merged_adapters if adapter_names is None else adapter_names
        rest = [name for name in self.merged_adapters if name not in names]
        if len(rest) < len(self.merged_adapters):
            self._bake(rest, False)

    def remerge(self, names: Iterable[str]) -> None:
        """Have just these adapters merged, the innermost first, with their parameters as they are now."""
        names = [name for name in names if name in self._entries]
        if names or self.merged:
            self._bake(names, False)
        self.refresh()

    def check_unwritten(self) -> None:
        """Make sure that nothing else wrote to the weights while adapters were merged.

        Raises:
            RuntimeError: Something did.
        """
        if self.merged:
            self.originals.check_unwritten(self.get_base_layer(), self._entries[self.merged_adapters[0]].site.path)

    @torch.no_grad()
    def _bake(self, names: list[str], safe: bool) -> None:
        layer: Base | Adapted | None = None
        module = self.get_base_layer()
        for name in names:
            entry = self._entries[name]
            layer = layer or self.originals.base(module, entry.site)
            layer = Adapted(layer, entry, beside(entry.site, self.numbers(name)))
        if isinstance(layer, Adapted):
            self.originals.replace(module, layer, names, safe)
        else:
            self.originals.restore(module, self._entries[self.merged_adapters[0]].site.path)
        self.merged_adapters = names
        self.refresh()

    def _inside_out(self, names: Iterable[str]) -> list[str]:
        """Return these adapters, the innermost first.

        Methods are around each other as they were added, as PEFT's layers of several are. Of one method the order is
        the given one, or the reverse of it for what acts on the input.
        """
        names, ordered = list(names), list[str]()
        for _, run in itertools.groupby(self._entries, key=lambda name: self._entries[name].config.method.name):
            added = set(run)
            chosen = [name for name in names if name in added]
            entries: list[Any] = [self._entries[name] for name in chosen]
            ordered += chosen[::-1] if any(one.config.form.input_side(one.site) for one in entries) else chosen
        return ordered

    def unmerged_tensors(self, path: str) -> Mapping[str, Tensor]:
        """Return tensors of the module as they are without merged adapters, by name; those that merging changed."""
        owner = path.rpartition(".")[0] if self.parameter_name else path
        return {f"{owner}.{leaf}" if owner else leaf: tensor for leaf, tensor in self.originals.tensors.items()}
