"""LoRA of fused projections and of separate ones, and of experts stacked in one parameter and apart.

[q; k; v] = W x,  W = [W_q; W_k; W_v]:   B A = [B_q 0 0; 0 B_k 0; 0 0 B_v] [A_q; A_k; A_v]
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchgraft.functional.extending import Tree

from .._arithmetic.given import check_adapter
from .._arithmetic.products import Adapter, products
from .._config.messages import names_of
from .._methods.lora.lora import LoraConfig
from .factors import Factors, adapter_of, factors_of

_EXPERT = re.compile(r"(.+)\.(\d+)\.([^.]+)")


def fuse_projections(
    config: LoraConfig,
    params: Tree,
    parts: Mapping[str, Sequence[str]],
    sizes: Mapping[str, int] | None = None,
) -> Adapter:
    """Return a LoRA for fused layers that equals one for their separate projections; exact.

    The ranks of parts add up, as each has an `A` of its own; parts with one `A` between them, as
    `split_projections` makes them, share it again.

    Args:
        config: The config of a plain LoRA.
        params: Its tree, with paths of separate layers.
        parts: Last names of the parts of each fused layer, in the order of its outputs, `{"qkv_proj": ["q_proj",
            "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}`.
        sizes: Number of outputs of parts, by last name; needed for those that the adapter is not on.

    Returns:
        `(config, params)`; modules that are no parts stay as they are.

    Raises:
        TypeError, ValueError, UnsupportedConfig: No plain LoRA; a part that is missing and has no size; names it.

    >>> tree = {f"layer.{name}": {"lora_A": torch.ones(1, 4), "lora_B": torch.ones(2, 1)} for name in "qk"}
    >>> config, params = fuse_projections(LoraConfig(r=1, target_modules=["q", "k"]), tree, {"qkv": "qkv"}, {"v": 3})
    >>> sorted(config.target_modules), params["layer.qkv"]["lora_B"].shape
    (['layer.qkv'], torch.Size([7, 1]))
    """
    found = factors_of(config, params, "fuse_projections")
    result = dict(found)
    for whole, names in parts.items():
        for parent in _parents(found, names):
            own = {name: found.get(_under(parent, name)) for name in names}
            for name in names:
                result.pop(_under(parent, name), None)
            result[_under(parent, whole)] = _fused(_under(parent, whole), own, sizes or {})
    return adapter_of(result)


def _parents(found: Iterable[str], names: Sequence[str]) -> list[str]:
    """Return the paths of modules that have some of these."""
    return list(dict.fromkeys(path.rpartition(".")[0] for path in found if path.rpartition(".")[2] in names))


def _under(parent: str, name: str) -> str:
    return f"{parent}.{name}" if parent else name


def _fused(path: str, parts: Mapping[str, Factors | None], sizes: Mapping[str, int]) -> Factors:
    present = [one for one in parts.values() if one is not None]
    first = present[0]
    heights = {name: sizes.get(name, 0) if one is None else len(one.b) for name, one in parts.items()}
    if missing := [name for name, height in heights.items() if not height]:
        raise ValueError(
            f"fuse_projections: {path} has a part {missing[0]!r} that the adapter is not on; give its number of "
            f"outputs, sizes={{{missing[0]!r}: ...}}"
        )
    shared = all(one.alpha == first.alpha and torch.equal(one.a, first.a) for one in present)
    scaled = present if shared else [one.folded for one in present]
    a = first.a if shared else torch.cat([one.a for one in scaled])
    dtype = functools.reduce(torch.promote_types, (one.b.dtype for one in scaled))
    b = first.b.new_zeros(sum(heights.values()), len(a), *first.b.shape[2:], dtype=dtype)
    row = column = 0
    left = iter(scaled)
    for name, one in parts.items():
        if one is not None:
            own = next(left)
            b[row : row + heights[name], column : column + own.rank] = own.b
            column += 0 if shared else own.rank
        row += heights[name]
    return Factors(a, b, first.alpha if shared else len(a))


def split_projections(config: LoraConfig, params: Tree, parts: Mapping[str, Mapping[str, int]]) -> Adapter:
    """Return a LoRA for separate layers that equals one for the fused layer; exact.

    Each part has the fused layer's `A`, and its own rows of `B`.

    Args:
        config: The config of a plain LoRA.
        params: Its tree, with paths of fused layers.
        parts: Numbers of outputs of the parts of each fused layer, in their order, by last names: `{"qkv_proj":
            {"q_proj": 4096, "k_proj": 1024, "v_proj": 1024}}`.

    Returns:
        `(config, params)`; other modules stay as they are.

    Raises:
        TypeError, ValueError, UnsupportedConfig: No plain LoRA; sizes that do not add up; names the path.

    >>> tree = {"layer.qkv": {"lora_A": torch.ones(1, 4), "lora_B": torch.ones(7, 1)}}
    >>> _, params = split_projections(LoraConfig(r=1, target_modules=["qkv"]), tree, {"qkv": {"q": 2, "k": 2, "v": 3}})
    >>> {path: tuple(leaves["lora_B"].shape) for path, leaves in params.items()}
    {'layer.k': (2, 1), 'layer.q': (2, 1), 'layer.v': (3, 1)}
    """
    result: dict[str, Factors] = {}
    for path, one in factors_of(config, params, "split_projections").items():
        parent, _, last = path.rpartition(".")
        sizes = parts.get(last)
        if sizes is None:
            result[path] = one
            continue
        if sum(sizes.values()) != len(one.b):
            raise ValueError(
                f"split_projections: {path} has {len(one.b)} outputs, and its parts {dict(sizes)} have "
                f"{sum(sizes.values())}; give the number of outputs of each"
            )
        for name, rows in zip(sizes, one.b.split(list(sizes.values())), strict=True):
            result[_under(parent, name)] = Factors(one.a, rows, one.alpha)
    return adapter_of(result)


def split_experts(config: LoraConfig, params: Tree) -> Adapter:
    """Return a LoRA with a module for each expert, from one on parameters that stack them; exact.

    `mlp.experts.down_proj`, of which `A` is `"experts*r in"` and `B` is `"out r*experts"`, becomes
    `mlp.experts.0.down_proj` and so on, `"r in"` and `"out r"`, as servers and checkpoints name them.

    Args:
        config: The config of a plain LoRA.
        params: Its tree.

    Raises:
        TypeError, ValueError, UnsupportedConfig: No plain LoRA, or one without experts.

    >>> config = LoraConfig(r=2, target_parameters=["experts.up"])
    >>> _, params = split_experts(config, {"experts.up": {"lora_A": torch.ones(6, 4), "lora_B": torch.ones(5, 6)}})
    >>> sorted(params), params["experts.0.up"]["lora_A"].shape
    (['experts.0.up', 'experts.1.up', 'experts.2.up'], torch.Size([2, 4]))
    """
    config, params = check_adapter((config, params), "split_experts: (config, params)")  # type: ignore[assignment]
    stacked = {
        path: one
        for path, one in products(config, params, "split_experts: the adapter").items()
        if one.layout.kind == "experts"
    }
    if not stacked:
        raise ValueError("split_experts: no parameter of target_parameters has experts in this tree")
    rest = {path: leaves for path, leaves in params.items() if path not in stacked}
    result = factors_of(config, rest, "split_experts")
    for path, product in stacked.items():
        owner, _, leaf = path.rpartition(".")
        for expert, (a, b) in enumerate(zip(product.a, product.b, strict=True)):
            own = Factors(a.to(product.dtype), b.to(product.dtype), product.scaling * len(a))
            result[f"{owner}.{expert}.{leaf}".lstrip(".")] = own
    return adapter_of(result)


def join_experts(config: LoraConfig, params: Tree) -> Adapter:
    """Return a LoRA on parameters that stack experts, from one with a module for each expert; exact.

    The inverse of `split_experts`. Experts of a lower rank than the others get zeros.

    Args:
        config: The config of a plain LoRA.
        params: Its tree, with paths such as `mlp.experts.0.down_proj`.

    Raises:
        TypeError, ValueError, UnsupportedConfig: No plain LoRA; no such paths, or experts that are missing; names them.

    >>> tree = {f"experts.{i}.up": {"lora_A": torch.ones(2, 4), "lora_B": torch.ones(5, 2)} for i in range(3)}
    >>> config, params = join_experts(LoraConfig(r=2, target_modules=["up"]), tree)
    >>> config.target_parameters, params["experts.up"]["lora_A"].shape
    (['experts.up'], torch.Size([6, 4]))
    """
    groups: dict[str, dict[int, Factors]] = {}
    result = {}
    for path, one in factors_of(config, params, "join_experts").items():
        found = _EXPERT.fullmatch(path)
        if found is None or found[1].rpartition(".")[2] != "experts":
            result[path] = one
        else:
            groups.setdefault(f"{found[1]}.{found[3]}", {})[int(found[2])] = one
    if not groups:
        raise ValueError(
            f"join_experts: no path is an expert's, '....experts.0.down_proj'; they are {names_of(params)}"
        )
    joined, tree = (
        {path: _joined(path, each) for path, each in groups.items()},
        dict(adapter_of(result)[1]) if result else {},
    )
    return _with_experts(result, joined, tree)


def _joined(path: str, each: Mapping[int, Factors]) -> tuple[Tensor, Tensor]:
    """Return `A`, `"experts r in"`, and `B`, `"experts out r"`, with a scaling factor of one."""
    if missing := sorted(set(range(max(each) + 1)) - set(each)):
        raise ValueError(
            f"join_experts: {path} lacks experts {missing[:4]} of {max(each) + 1}; give all, zeros for those"
        )
    rank = max(one.rank for one in each.values())
    all_a, all_b = [], []
    for _, one in sorted(each.items()):
        own = one.folded
        more = rank - own.rank
        all_a.append(torch.nn.functional.pad(own.a, (0, 0, 0, more)))
        all_b.append(torch.nn.functional.pad(own.b, (0, more)))
    return torch.stack(all_a), torch.stack(all_b)


def _with_experts(
    rest: Mapping[str, Factors], joined: Mapping[str, tuple[Tensor, Tensor]], tree: Tree
) -> tuple[LoraConfig, Tree]:
    # As if they were modules, so that ranks and scaling factors are one plan; then the leaves of each are put in.
    stand_ins = {path: Factors(a[0], b[0], a.shape[1]) for path, (a, b) in joined.items()}
    config: Any = adapter_of({**rest, **stand_ins}, names={*rest, ""})[0]
    for path, (a, b) in joined.items():
        tree[path] = {"lora_A": a.flatten(0, 1).contiguous(), "lora_B": b.movedim(0, -1).flatten(1).contiguous()}
    return config, dict(sorted(tree.items()))
