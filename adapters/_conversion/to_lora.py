"""Any adapter as a plain LoRA: from the factors of those that have some, else from what merging changes."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from torchgraft.functional import Binding, Graft, Site, UnsupportedConfig
from torchgraft.functional.extending import Tree, active_trees, modules_of, sort

from .._arithmetic.combine import combine
from .._arithmetic.products import config_of_ranks, products
from .._calibration.initial import REMOVING, kind_of
from .._calibration.progress import shown
from .._config.base import AdapterConfig
from .._config.targets import exact
from .._methods.lora.lora import LoraConfig
from .._methods.lora.to_plain import to_plain
from .changes import Change, changes, leaves_of
from .report import ConversionReport, ModuleError
from .shrink import shrink
from .wanted import Wanted, nearest

_BIASES = ("refuse", "train")

_KEPT = (
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias",
    "inference_mode", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "trainable_token_indices",
    "ensure_weight_tying", "layer_replication",
)  # fmt: skip
"""Fields that mean the same in every method, and stay."""


def to_lora(
    graft: Graft,
    params: Tree,
    rank: int | None = None,
    *,
    energy: float | None = None,
    biases: str = "refuse",
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> tuple[LoraConfig, Tree, ConversionReport]:
    """Return the plain LoRA that is nearest to an adapter, or to several over each other, and its errors.

        B A = the nearest of the rank to  merge(W) - W

    Any method is converted that has a merged weight, on linear layers, `Conv1D`, embeddings, convolutions, attention
    and experts. It is exact for changes of that rank or less: LoRA, AdaLoRA, VeRA, VB-LoRA, TinyLoRA, DeLoRA, MiSS and
    GraLoRA at their own, LoHa at the square of its own. Those that rescale or rotate the weight (DoRA, IA3, OFT, HiRA)
    or change single entries (SHiRA, C3A) have a change of full rank as a rule, of which `rank` keeps the most. Changes
    are computed in float64. Adapters that are plain LoRA need no weight of the base, which may be quantised.

    Args:
        graft: A graft; one with several adapters becomes one LoRA that does what all of them do together.
        params: Its parameter tree, as for a call.
        rank: The rank; modules too small for it get less.
        energy: In place of `rank`, the share of each module's energy (the sum of squared singular values) to keep, with
            as little rank as that takes. With neither, all is kept that is no rounding error: the rank is whatever the
            method's change has.
        biases: What to do where a method changes the base's bias too (IA3, DoRA over a LoRA with a bias), which `B A`
            cannot: `"refuse"` is an error, `"train"` makes it a trained bias, `bias="lora_only"`.
        dtype: Dtype of the leaves; by default that of the adapter's own.
        progress: Whether a bar shows how far it is, where tqdm is installed.

    Returns:
        `(config, params, report)`: a LoRA for the same model, whose scaling factor is one; a `rank_pattern` where ranks
        differ. What is trained as a whole (`modules_to_save`, biases, tokens) stays. The report has the error of each
        module, measured on the leaves as they are returned.

    Raises:
        KeyError, TypeError: A tree that does not fit the graft.
        ValueError: A rank or energy out of range, a bias that changes, a site without a merged weight; names the path.
        UnsupportedConfig: Several adapters of which one trains tensors of the base as a whole.

    >>> from torchgraft.adapters import LoHaConfig
    >>> from torchgraft.functional import bind, merge
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    >>> graft = bind(model, LoHaConfig(r=2, target_modules=["0"]))
    >>> tree = {"0": {leaf: torch.randn_like(t) for leaf, t in graft.init()["0"].items()}}
    >>> config, params, report = to_lora(graft, tree)
    >>> config.r, report.relative < 1e-5
    (4, True)
    >>> torch.allclose(merge(bind(model, config), params)["0.weight"], merge(graft, tree)["0.weight"], atol=1e-4)
    True
    """
    if not isinstance(graft, Graft):
        raise TypeError(
            f"to_lora: graft is of type {type(graft).__name__}, expected what bind(model, config) returned; adapters "
            "in place are converted by convert_to_lora(model, rank), and shrink(config, params, rank) cuts a LoRA"
        )
    wanted = Wanted(rank, energy)
    wanted.check("to_lora")
    if biases not in _BIASES:
        raise ValueError(f"to_lora: biases is {biases!r}, expected one of {_BIASES}")
    active = active_trees(graft, params, "to_lora")
    if not active:
        raise ValueError(
            f"to_lora: params has none of the graft's adapters, {sorted(graft.configs)}; give one at least"
        )
    with torch.no_grad():
        plain = _as_plain(graft, active)
        if plain is None:
            found = shown(changes(graft, active), "converting", progress)
            return _of_changes(graft, active, found, wanted, biases, dtype)
        config, tree, report = shrink(*plain, rank, energy=energy)
        return config, _cast(tree, dtype), report


# -- LoRA as it is -------------------------------------------------------------------------------------------------


def _as_plain(graft: Graft, active: Mapping[str, Tree]) -> tuple[Any, Tree] | None:
    """Return one plain LoRA, where all adapters are some whose factors say what they add; else `None`."""
    plain: list[tuple[AdapterConfig, Tree]] = []
    for name, tree in active.items():
        config: Any = graft.configs[name]
        kind = kind_of(getattr(config, "init_lora_weights", True))
        if kind in (*REMOVING, "mica"):
            config, tree = to_plain(graft, tree, name or "default")
        try:
            whole = all(one.layout.kind != "projections" for one in products(config, tree, "to_lora").values())
        except UnsupportedConfig:
            return None
        if not whole:
            return None
        plain.append((config, tree))
    if len(plain) == 1:
        return plain[0]
    _check_none_replaces(graft, active)
    return combine(plain, [1.0] * len(plain))


def _cast(tree: Tree, dtype: torch.dtype | None) -> Tree:
    if dtype is None:
        return tree
    return {path: {leaf: tensor.to(dtype) for leaf, tensor in leaves.items()} for path, leaves in tree.items()}


# -- what merging changes ------------------------------------------------------------------------------------------


def _of_changes(
    graft: Graft,
    active: Mapping[str, Tree],
    found: Iterable[Change],
    wanted: Wanted,
    biases: str,
    dtype: torch.dtype | None,
) -> tuple[LoraConfig, Tree, ConversionReport]:
    if len(active) > 1:
        _check_none_replaces(graft, active)
    replaced = {path for name in active for path in graft.binding.replaced[name]}
    tree: Tree = {
        path: {leaf: tensor for leaf, tensor in one.items() if leaf in graft.binding.replaced[name][path]}
        for name, leaves in active.items()
        for path, one in leaves.items()
        if path in replaced
    }
    ranks, errors, kept, trained = {}, {}, {}, False
    own = dtype or _dtype(active)
    for change in found:
        path = change.site.path
        leaves, ranks[path], errors[path] = converted(change.site, change.weight, wanted, own, change.floor)
        tree.setdefault(path, {}).update(leaves)
        if change.moves_bias:
            trained |= _takes_bias(change, biases)
        if change.bias is not None and change.site.bias_name == "bias":
            kept[path] = change.bias.to(own)
    for path, bias in kept.items() if trained else ():  # a config trains all biases of its modules, or none
        tree[path]["bias"] = bias
    config = _config(graft, list(active), ranks, trained)
    return config, sort(tree), ConversionReport(errors)


def converted(
    site: Site, change: Tensor, wanted: Wanted, dtype: torch.dtype, floor: float = 0.0
) -> tuple[dict[str, Tensor], int, ModuleError]:
    """Return a LoRA's leaves at a site, their rank, and their error, with the rounding to their dtype.

    Args:
        site: The site.
        change: The change of its weight, `"blocks out in"`.
        wanted: How much of it to keep.
        dtype: Dtype of the leaves.
        floor: Singular values up to this are rounding errors.

    Raises:
        ValueError: A change that is not finite; names the path.
    """
    if not bool(torch.isfinite(change).all()):
        raise ValueError(
            f"{site.path}: the change of its weight has values that are not finite, to which no product is nearest; "
            "check the weights and the adapters' leaves there"
        )
    if wanted.rank is not None and site.groups > 1:
        wanted = Wanted(max(1, wanted.rank // site.groups))
    dtype = torch.promote_types(dtype, torch.complex64) if change.is_complex() else dtype
    a, b = (factor.to(dtype) for factor in nearest(change, wanted, floor))
    left = change - b.to(change.dtype) @ a.to(change.dtype)
    leaves, rank = leaves_of(site, a, b, dtype)
    return (
        leaves,
        rank,
        ModuleError(rank, float(torch.linalg.vector_norm(change)), float(torch.linalg.vector_norm(left))),
    )


def _takes_bias(change: Change, biases: str) -> bool:
    """Return whether a bias is to be trained.

    Raises:
        UnsupportedConfig: It is not.
    """
    path, site = change.site.path, change.site
    if not site.has_bias or site.bias_name != "bias":
        why = "names it otherwise" if site.has_bias else "has none"
        raise UnsupportedConfig(
            f"to_lora: {path} gets another bias from its adapters, and the module {why}, so the LoRA cannot "
            "have it; merge the adapters, or leave that module out of them"
        )
    if biases == "refuse":
        raise UnsupportedConfig(
            f"to_lora: {path} has a bias that its adapters change, which no product B A can; pass biases='train' for a "
            "trained bias beside it (bias='lora_only', which few servers take), or leave that module out"
        )
    return True


def _dtype(active: Mapping[str, Tree]) -> torch.dtype:
    """Return the dtype of the adapters' leaves, the widest of floating point, float32 for none."""
    found = [leaf.dtype for tree in active.values() for leaves in tree.values() for leaf in leaves.values()]
    floating = [dtype for dtype in found if dtype.is_floating_point or dtype.is_complex]
    dtype = floating[0] if floating else torch.float32
    for other in floating[1:]:
        dtype = torch.promote_types(dtype, other)
    return dtype


def _check_none_replaces(graft: Graft, active: Mapping[str, Tree]) -> None:
    """Refuse tensors that are trained as a whole by one of several adapters.

    Raises:
        UnsupportedConfig: Names the adapter and the path.
    """
    for name in active:
        for path in graft.binding.replaced[name]:
            raise UnsupportedConfig(
                f"to_lora: adapter {name!r} trains tensors of {path} as a whole, beside other adapters; convert the "
                "adapters one by one, or merge them"
            )


def _config(graft: Graft, names: list[str], ranks: Mapping[str, int], trained: bool) -> LoraConfig:
    """Return a config for the same modules."""
    source: Any = graft.configs[names[0]]
    fields = {name: getattr(source, name) for name in _KEPT if hasattr(source, name)}
    if trained and fields["bias"] == "none":
        fields["bias"] = "lora_only"
    own = {name.name for name in dataclasses.fields(LoraConfig)}
    config = LoraConfig(**{name: value for name, value in fields.items() if name in own}, **config_of_ranks(ranks))
    if len(names) == 1 and _targets(graft, config) == set(ranks):
        return config
    return exact(config, list(ranks), modules_of(graft.model))


def _targets(graft: Graft, config: LoraConfig) -> set[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bound = dataclasses.replace(config, layer_replication=None)
        return set(Binding.plan(graft.model, {"": bound}, False).sites[""])
