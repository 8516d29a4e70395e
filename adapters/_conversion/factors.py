"""A LoRA's factors as files of other programs have them: two tensors and a number for each module."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from torchgraft.functional import UnsupportedConfig
from torchgraft.functional.extending import Tree, sort

from .._arithmetic.given import check_adapter
from .._arithmetic.products import Adapter, config_of_ranks, products
from .._config.targets import exact
from .._methods.lora.forward import BIAS
from .._methods.lora.lora import LoraConfig


@dataclasses.dataclass(frozen=True)
class Factors:
    """The factors of one module.

    Attributes:
        a: `A`, `"r in *kernel"`.
        b: `B`, `"out r *ones"`.
        alpha: The numerator of the scaling factor `alpha / r`.
    """

    a: Tensor
    b: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """The rank."""
        return len(self.a)

    @property
    def folded(self) -> Factors:
        """The same with a scaling factor of one."""
        return dataclasses.replace(self, b=self.b * (self.alpha / self.rank), alpha=self.rank)


def factors_of(config: LoraConfig, params: Tree, what: str) -> dict[str, Factors]:
    """Return the factors of each module.

    Raises:
        TypeError, ValueError: No LoRA's config and tree.
        UnsupportedConfig: An embedding, a parameter, a convolution in groups, or a tensor that is no factor; names it.
    """
    config, params = check_adapter((config, params), f"{what}: (config, params)")  # type: ignore[assignment]
    found = {}
    for path, product in products(config, params, f"{what}: the adapter").items():
        layout = product.layout
        if layout.kind != "matrix" or layout.names[0] != "lora_A":
            kind = "embedding" if layout.kind == "matrix" else layout.kind
            raise UnsupportedConfig(
                f"{what}: {path} is adapted as {kind}, for which this has no form; leave it out of the tree"
                + (
                    ""
                    if layout.kind != "experts"
                    else ", or take its experts apart first: split_experts(config, params)"
                )
            )
        a, b = (params[path][name] for name in layout.names)
        found[path] = Factors(a, b, product.scaling * len(a))
    for path, leaves in params.items():
        if other := sorted(set(leaves) - {"lora_A", "lora_B"}):
            why = ", a bias of B" if other[0] == BIAS else ", which is trained as a whole"
            raise UnsupportedConfig(f"{what}: {path} has {other[0]}{why}, for which this has no form; leave it out")
    return found


def adapter_of(found: Mapping[str, Factors], names: Collection[str] = (), **fields: Any) -> Adapter:
    """Return the config and the tree of factors.

    Args:
        found: Factors by module.
        names: Names of all modules of the model, where they are known.
        fields: More fields of the config.
    """
    ranks = {path: one.rank for path, one in found.items()}
    alphas = {path: one.alpha for path, one in found.items()}
    config = LoraConfig(**{**fields, **config_of_ranks(ranks), **_alphas(alphas)})
    tree = {path: {"lora_A": one.a.contiguous(), "lora_B": one.b.contiguous()} for path, one in found.items()}
    return exact(config, list(found), names or set(found)), sort(tree)


def _alphas(alphas: Mapping[str, float]) -> dict[str, Any]:
    values = [int(one) if float(one).is_integer() else float(one) for one in alphas.values()]
    common = max(values, key=values.count)
    other = {f"^{re.escape(path)}": one for path, one in zip(alphas, values, strict=True) if one != common}
    return {"lora_alpha": common, "alpha_pattern": other}
