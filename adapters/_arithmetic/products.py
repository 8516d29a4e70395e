"""LoRA adapters as products of matrices, one for each module, told from a config and a tree alone: no model is needed.

    change of the weight = s B A

Convolutions are products of flat matrices; those in groups, and experts, have a product for each block.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchgraft.functional import Site, UnsupportedConfig
from torchgraft.functional.extending import Tree

from .._calibration.initial import REMOVING, kind_of
from .._config.base import AdapterConfig
from .._methods.lora.forward import BIAS
from .._methods.lora.lora import LoraConfig
from .._methods.shared.scalings import alpha_at, rank_at, scaling_of

Adapter = tuple[AdapterConfig, Tree]
"""An adapter as data: its config, which has ranks and scaling factors, and its parameter tree."""

_PAIRS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a module's leaves hold the factors of its product.

    Attributes:
        names: The leaves that hold `A` and `B`.
        kind: `"matrix"`; `"experts"`, whose blocks are in one matrix; `"groups"` of a convolution; `"projections"` of
            an attention with keys or values of another size, where only the blocks on a product's diagonal count.
        blocks: Number of products.
        inputs: Shape of `A` behind its rank.
        ones: Shape of `B` behind its rank.
    """

    names: tuple[str, str]
    kind: str
    blocks: int
    inputs: tuple[int, ...]
    ones: tuple[int, ...]

    def rank(self, a: Tensor) -> int:
        """Return the rank that a config says, of `A`, `"blocks r in"`."""
        rank: int = a.shape[-2] * (self.blocks if self.kind == "groups" else 1)
        return rank

    def leaves(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        """Return leaves with these factors, `"blocks r in"` and `"blocks out r"`."""
        b = b.movedim(0, -1).flatten(1) if self.kind == "experts" else b.flatten(0, 1)
        a = a.flatten(0, 1).unflatten(1, self.inputs)
        return dict(zip(self.names, (a.contiguous(), b.reshape(*b.shape, *self.ones).contiguous()), strict=True))


@dataclasses.dataclass(frozen=True)
class Product:
    """The change `s B A` that an adapter makes at one module.

    Attributes:
        a: `A`, `"blocks r in"`, in float32 or wider.
        b: `B`, `"blocks out r"`.
        scaling: `s`.
        bias: The bias of `B`, `"out"`, if it has one.
        layout: How leaves hold them.
        dtype: Dtype of the leaves.
    """

    a: Tensor
    b: Tensor
    scaling: float
    bias: Tensor | None
    layout: Layout
    dtype: torch.dtype

    @property
    def dense(self) -> Tensor:
        """The change itself, `"blocks out in"`."""
        return self.scaling * (self.b @ self.a)

    def check_whole(self, path: str, what: str) -> None:
        """Refuse a product of which only a part counts.

        Raises:
            UnsupportedConfig: Names the path.
        """
        if self.layout.kind == "projections":
            raise UnsupportedConfig(
                f"{what}: {path} is an attention whose keys or values have a size of their own, of whose product only "
                "blocks count; how='cat' adds it exactly, else leave it out of the trees"
            )


def products(config: AdapterConfig, tree: Tree, what: str) -> dict[str, Product]:
    """Return the products of a LoRA adapter, by path.

    Args:
        config: Its config.
        tree: Its tree.
        what: How errors call the adapter.

    Raises:
        UnsupportedConfig: An adapter whose change is no product that its tree tells; says what to do.
        ValueError: A tree of another rank than the config's.
    """
    _check_plain(config, what)
    assert isinstance(config, LoraConfig)
    return {
        path: _product(config, tree, path, names, what)
        for path, leaves in tree.items()
        for names in _PAIRS
        if names[0] in leaves
    }


def _check_plain(config: AdapterConfig, what: str) -> None:
    """Refuse what is not added to the base as it is."""
    if not isinstance(config, LoraConfig):
        raise UnsupportedConfig(
            f"{what} is {config.method.name}, whose change of a weight is no product of two factors in its tree; make "
            "it a LoRA first: to_lora(graft, params, rank=...)"
        )
    if config.use_dora:
        raise UnsupportedConfig(
            f"{what} has use_dora, whose magnitudes rescale the base's own weight, so that such adapters do not add up "
            "factor by factor; make it a plain LoRA first: to_lora(graft, params, rank=...)"
        )
    if config.use_bdlora is not None:
        raise UnsupportedConfig(
            f"{what} has use_bdlora, so its tree has blocks of its matrices; make it plain first: config, params = "
            "to_plain(graft, params)"
        )
    if config.alora_invocation_tokens is not None:
        raise UnsupportedConfig(
            f"{what} has alora_invocation_tokens, and adapts a prompt only from these tokens on, so a sum "
            "of several has no meaning; set it to None in the config to have the products as those of a LoRA"
        )
    kind = kind_of(config.init_lora_weights)
    if kind in (*REMOVING, "mica"):
        raise UnsupportedConfig(
            f"{what} has init_lora_weights={config.init_lora_weights!r}, so what it adds to the base is not in its "
            "tree alone; make it plain first: config, params = to_plain(graft, params)"
        )
    if kind == "loftq":
        raise UnsupportedConfig(f"{what} has init_lora_weights='loftq', made for a quantised base; merge it instead")


def _product(config: LoraConfig, tree: Tree, path: str, names: tuple[str, str], what: str) -> Product:
    leaves: Mapping[str, Tensor] = tree[path]
    if names[1] not in leaves:
        raise ValueError(f"{what}: {path} has {names[0]} and no {names[1]}; give the whole tree")
    a, b = leaves[names[0]], leaves[names[1]]
    site = Site(path, "linear", a.shape[-1], b.shape[0], within=_attention_of(path, tree))
    r = rank_at(config, site)
    scaling = scaling_of(config, r, alpha_at(config, site))
    layout = _layout(config, path, names, a, b, r, what)
    projected = tree.get(f"{path}.out_proj", {}).get("lora_A")
    if projected is not None and projected.shape[-1] != a.shape[-1]:
        layout = dataclasses.replace(layout, kind="projections")
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a2, b2 = a.to(wide).flatten(1), b.to(wide).flatten(1)
    if layout.kind == "experts":
        b2 = b2.unflatten(1, (r, layout.blocks)).movedim(-1, 0)
    else:
        b2 = b2.unflatten(0, (layout.blocks, -1))
    bias = leaves[BIAS].to(wide) if BIAS in leaves else None
    return Product(
        a2.unflatten(0, (layout.blocks, -1)), b2, scaling, bias, layout, torch.promote_types(a.dtype, b.dtype)
    )


def _layout(config: LoraConfig, path: str, names: tuple[str, str], a: Tensor, b: Tensor, r: int, what: str) -> Layout:
    """Tell from shapes and the config's rank what the leaves hold."""
    given = f"{what}: {path} has {names[0]} {tuple(a.shape)} and {names[1]} {tuple(b.shape)}"
    if a.ndim < 2 or b.ndim != a.ndim or any(size != 1 for size in b.shape[2:]):
        raise ValueError(
            f"{given}, expected two matrices, or a convolution's kernels; a stack is combined adapter by adapter: "
            "unstack(stacked), or torch.vmap"
        )
    rows, columns = a.shape[0], b.shape[1]
    kind, blocks = "matrix", 1
    if is_parameter(config, path) and rows == columns and rows % r == 0:
        kind, blocks = "experts", rows // r
    elif a.ndim > 2 and rows == r and columns < r and r % columns == 0:
        kind, blocks = "groups", r // columns
    elif not rows == columns == r:
        raise ValueError(f"{given}, and its config says a rank of {r} there; give the config that goes with the tree")
    return Layout(names, kind, blocks, tuple(a.shape[1:]), (1,) * (b.ndim - 2))


def is_parameter(config: AdapterConfig, path: str) -> bool:
    """Return whether a path is one of a config's `target_parameters`."""
    targets = getattr(config, "target_parameters", None) or ()
    return any(path == target or path.endswith(f".{target}") for target in targets)


def _attention_of(path: str, tree: Mapping[str, Any]) -> str | None:
    """Return the path of the `MultiheadAttention` whose output projection this is, by whose patterns it goes too."""
    parent, _, name = path.rpartition(".")
    return parent if name == "out_proj" and "lora_A" in tree.get(parent, {}) else None


def config_of_ranks(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return the fields of a LoRA config with these ranks, and a scaling factor of one everywhere."""
    r = max(ranks.values())
    uniform = len(set(ranks.values())) == 1
    # An attention's patterns count for its output projection too, so that has its own wherever ranks differ.
    other = {} if uniform else {f"^{re.escape(path)}": one for path, one in ranks.items() if one != r or _nested(path)}
    return {"r": r, "lora_alpha": r, "use_rslora": False, "rank_pattern": other, "alpha_pattern": dict(other)}


def _nested(path: str) -> bool:
    return path.rpartition(".")[2] == "out_proj"
