"""Weighted sums of adapters, as one adapter: exact, cut to a rank, or pruned."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from torchgraft.functional import AddsLeafwise
from torchgraft.functional.extending import Tree, sort

from .._calibration.initial.configs import CONFIGS, PLAIN
from .._methods.lora.forward import BIAS
from .given import Chosen, Weights, check_adapters, check_alike, check_same_shape, selection, weighted_sum
from .mixing import Mixing, Scalar, mix, sign, square_root
from .products import Adapter, Product, config_of_ranks, products
from .truncated import clamped, truncate, truncate_matrix

_FREE = frozenset({"r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", *PLAIN, *CONFIGS})
"""Fields in which LoRA configs may differ, beside those that choose modules."""


def combine(
    adapters: Sequence[Adapter],
    weights: Weights,
    how: str = "cat",
    *,
    rank: int | None = None,
    density: float | None = None,
    majority_sign: str = "total",
    clamp: float | None = None,
    generator: torch.Generator | None = None,
) -> Adapter:
    """Add adapters with weights, as one adapter.

        change of W = sum_i w_i s_i B_i A_i

    Nothing that is given is changed, and gradients flow to weights and leaves, so that a mixture can be learned
    (LoraHub, arXiv:2307.13269; AdaMerging, arXiv:2310.02575, with weights by path). Task arithmetic (arXiv:2212.04089)
    is weights like `[1, -1, 1]`. The members of a stack are `[(config, tree) for tree in graft.unstack(stacked)]`, or
    `zip(graft.members, ...)` where they have configs of their own; `torch.vmap` maps over stacks, or over rows of
    weights. Adapters may be on different modules: one that has none at a place adds nothing there.

    - `"cat"`: the sum itself, exact. Factors stand side by side, so ranks add up.
    - `"svd"`: the nearest to it of a rank. From the factors alone: no change of a weight is formed.
    - `"linear"`: sums of factors, `(sum_i c_i B_i)(sum_i c_i A_i)` with `c_i = sqrt(w_i s_i)`, whose rank stays. It is
      not the sum: it also has the cross terms `c_i c_j B_i A_j` of each pair. A negative weight negates `A_i`.
    - `"ties"`, `"dare_ties"`, `"dare_linear"`, `"magnitude_prune"`: `"linear"` with factors that are pruned to a
      density first; with TIES only entries of the elected sign count, divided by their number.
    - these with `"_svd"` behind: the changes of the weights themselves are pruned and added, with no cross terms, one
      module after the other, and the sum is cut to a rank.

    Methods whose changes add up leaf by leaf (IA3: `l = 1 + sum_i w_i (l_i - 1)`, C3A) have `"cat"` and `"linear"`,
    which are both the sum, and those that prune, of `l_i - 1`. Others have to become LoRA first. What is trained as a
    whole (`modules_to_save`, `bias`, tokens) is averaged, if each adapter has it and the weights add up to one.

    Args:
        adapters: Pairs `(config, params)`; a tree has no scaling factor, so that its config is needed.
        weights: A number for each adapter, or a tensor `"n"`, or `{path: weights}` for each module its own.
        how: One of the above.
        rank: The rank for `"svd"` and `"..._svd"`, or less where that is exact; by default the largest that an adapter
            has at a module.
        density: The share of entries that pruning keeps, `0 < density <= 1`.
        majority_sign: `"total"` elects the sign of the sum, `"frequency"` the sign that most have.
        clamp: A quantile of the factors' entries and their negatives that limits them, after a decomposition.
        generator: The source of randomness for DARE; by default torch's global one.

    Returns:
        `(config, params)`: a plain LoRA whose scaling factor is one, with a `rank_pattern` where ranks differ. Its
        targets are those of all adapters: the same fields where they agree, else whole names. Other fields are the
        first adapter's.

    Raises:
        TypeError: Adapters that are no pairs.
        UnsupportedConfig: A method, or a start such as PiSSA, that has no sum; DoRA. Says what to do first.
        ValueError: Options that do not go together, weights that are no finite numbers, trees that do not fit their
            configs or each other; names the path.
        KeyError: Weights by path that lack one.

    >>> from torchgraft.adapters import LoraConfig
    >>> from torchgraft.functional import bind
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    >>> configs = [LoraConfig(r=r, target_modules=["0"]) for r in (1, 2)]
    >>> poems, code = (bind(model, config).init() for config in configs)
    >>> config, params = combine([(configs[0], poems), (configs[1], code)], [0.7, -0.2])
    >>> config.r, config.lora_alpha, params["0"]["lora_A"].shape
    (3, 3, torch.Size([3, 4]))
    """
    mixing = Mixing(how, rank, density, majority_sign, clamp, generator)
    mixing.check()
    given = check_adapters(adapters, "combine")
    chosen = Chosen(weights, len(given))
    chosen.check_paths({path: None for _, tree in given for path in tree})
    return combined(given, chosen, mixing)


def combined(adapters: Sequence[Adapter], chosen: Chosen, mixing: Mixing, whole: bool = False) -> Adapter:
    """Return `combine` of what was checked.

    Args:
        adapters: The adapters.
        chosen: Their weights.
        mixing: How.
        whole: Whether the weights add up to one, whatever they are.
    """
    first = adapters[0][0]
    ability = first.method.ability(AddsLeafwise)
    if ability is not None and all(type(config) is type(first) for config, _ in adapters):
        config, tree = _leafwise(adapters, chosen, mixing, ability.identity)
    else:
        config, tree = _of_products(adapters, chosen, mixing)
    for path, leaves in _replaced(adapters, chosen, whole).items():
        tree[path] = {**tree.get(path, {}), **leaves}
    return config, sort(tree)


# -- LoRA ----------------------------------------------------------------------------------------------------------


def _of_products(adapters: Sequence[Adapter], chosen: Chosen, mixing: Mixing) -> Adapter:
    found = [products(config, tree, f"combine: adapters[{i}]") for i, (config, tree) in enumerate(adapters)]
    if not any(found):
        raise ValueError("combine: no adapter has factors of LoRA in its tree; give the trees that go with the configs")
    check_alike(adapters, _FREE | adapters[0][0].site_fields, "combine")
    tree, ranks = {}, {}
    for path in sorted(frozenset().union(*found)):
        weights = chosen.at(path)
        here = [(one[path], weight) for one, weight in zip(found, weights, strict=True) if path in one]
        tree[path], ranks[path] = _at_site(path, here, mixing)
    selected = selection(adapters, [frozenset(one) for one in found])
    fields = {**PLAIN, **config_of_ranks(ranks), **selected}
    return dataclasses.replace(adapters[0][0], **fields), tree


def _at_site(path: str, here: Sequence[tuple[Product, Scalar]], mixing: Mixing) -> tuple[dict[str, Tensor], int]:
    """Return the leaves of one module, and their rank."""
    first, layout = here[0][0], here[0][0].layout
    for product, _ in here[1:]:
        if product.layout != layout or product.b.shape[:-1] != first.b.shape[:-1]:
            raise ValueError(
                f"combine: {path} has factors of shapes {_sizes(first)} and {_sizes(product)}, of different "
                "modules; combine adapters of one model"
            )
    a, b = _factors(path, here, mixing)
    dtype = first.dtype
    for product, _ in here[1:]:
        dtype = torch.promote_types(dtype, product.dtype)
    leaves = {name: leaf.to(dtype) for name, leaf in layout.leaves(a, b).items()}
    biases = [(p.bias, p.scaling * weight) for p, weight in here if p.bias is not None]
    if biases:
        leaves[BIAS] = weighted_sum([bias for bias, _ in biases], [weight for _, weight in biases]).to(dtype)
    return leaves, layout.rank(a)


def _factors(path: str, here: Sequence[tuple[Product, Scalar]], mixing: Mixing) -> tuple[Tensor, Tensor]:
    """Return `A` and `B` of the result, whose scaling factor is one."""
    all_a = [product.a for product, _ in here]
    all_b = [product.b for product, _ in here]
    scaled = [weight * product.scaling for product, weight in here]
    if mixing.truncates:
        here[0][0].check_whole(path, f"combine: how is {mixing.how!r}")
        rank = max(a.shape[-2] for a in all_a) if mixing.rank is None else mixing.rank
        if mixing.rank is not None and here[0][0].layout.kind == "groups":
            rank = max(1, rank // len(all_a[0]))
        try:
            if mixing.how == "svd":
                a, b = truncate(*_side_by_side(all_a, all_b, scaled), rank)
            else:
                changes = [product.dense for product, _ in here]
                a, b = truncate_matrix(mix(changes, [weight for _, weight in here], mixing), rank)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined,unused-ignore] # strict alone sees it
            raise ValueError(
                f"combine: {path} has no singular values; check its leaves and the weights: {error}"
            ) from error
        return (a, b) if mixing.clamp is None else clamped(a, b, mixing.clamp)
    if mixing.how == "cat":
        return _side_by_side(all_a, all_b, scaled)
    advice = f"how={mixing.how!r} adds factors of one rank; use how='cat', or how='svd' with a rank"
    check_same_shape(all_a, path, here[0][0].layout.names[0], "combine", advice)
    roots = [square_root(weight) for weight in scaled]
    signed = [root * sign(weight) for root, weight in zip(roots, scaled, strict=True)]
    return mix(all_a, signed, mixing), mix(all_b, roots, mixing)


def _side_by_side(all_a: Sequence[Tensor], all_b: Sequence[Tensor], scaled: Sequence[Scalar]) -> tuple[Tensor, Tensor]:
    weighted = [a * weight for a, weight in zip(all_a, scaled, strict=True)]
    return torch.cat(weighted, -2), torch.cat(list(all_b), -1)


def _sizes(product: Product) -> str:
    return f"{tuple(product.a.shape)} and {tuple(product.b.shape)}"


# -- methods that add up leaf by leaf ------------------------------------------------------------------------------


def _leafwise(adapters: Sequence[Adapter], chosen: Chosen, mixing: Mixing, identity: float) -> Adapter:
    first, method = adapters[0][0], adapters[0][0].method
    if mixing.truncates:
        raise ValueError(
            f"combine: how is {mixing.how!r}, and {method.name} has no rank to cut to; use 'cat', the exact sum"
        )
    check_alike(adapters, first.site_fields | method.varying, "combine")
    is_own = first.form.is_leaf
    mine = [{path: leaves for path, leaves in tree.items() if any(map(is_own, leaves))} for _, tree in adapters]
    _check_told(adapters, mine)
    result: Tree = {}
    for path in sorted(frozenset().union(*mine)):
        weights = chosen.at(path)
        here = [(one[path], weight) for one, weight in zip(mine, weights, strict=True) if path in one]
        result[path] = {leaf: _mixed_leaf(path, leaf, here, mixing, identity) for leaf in here[0][0] if is_own(leaf)}
    selected = selection(adapters, [frozenset(one) for one in mine])
    if selected and first.form.infer is not None:
        selected |= first.form.infer(first, result)
    return dataclasses.replace(first, **selected) if selected else first, result


def _mixed_leaf(
    path: str, leaf: str, here: Sequence[tuple[Mapping[str, Tensor], Scalar]], mixing: Mixing, identity: float
) -> Tensor:
    tensors = [leaves[leaf] for leaves, _ in here]
    check_same_shape(tensors, path, leaf, "combine", "they rescale, or are cut, in different ways and do not add up")
    wide = [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) - identity for tensor in tensors]
    return (mix(wide, [weight for _, weight in here], mixing) + identity).to(tensors[0].dtype)


def _check_told(adapters: Sequence[Adapter], mine: Sequence[Mapping[str, Mapping[str, Tensor]]]) -> None:
    """Refuse configs that differ in what the shapes of leaves do not tell.

    Raises:
        ValueError: Names the field.
    """
    first = adapters[0][0]
    drawn = {name for name in first.method.varying if name.startswith("init_")}
    if any(leaf.ndim > 2 for one in mine for leaves in one.values() for leaf in leaves.values()):
        check_alike(adapters, first.site_fields | drawn, "combine")


# -- tensors that are trained as a whole ---------------------------------------------------------------------------


def _replaced(adapters: Sequence[Adapter], chosen: Chosen, whole: bool) -> Tree:
    """Return the averages of copies of the base's tensors, by path."""
    trees = [tree for _, tree in adapters]
    is_own = adapters[0][0].form.is_leaf
    found = {(path, leaf): None for tree in trees for path in tree for leaf in tree[path] if not is_own(leaf)}
    result: Tree = {}
    for path, leaf in found:
        if not all(leaf in tree.get(path, {}) for tree in trees) or not (whole or chosen.add_up_to_one(path)):
            raise ValueError(
                f"combine: {path} has {leaf}, which is trained as a whole, and a sum of changes needs the base's own; "
                "it is averaged where each adapter has it and the weights are numbers that add up to 1 (soup, "
                "interpolate). Else combine adapters without modules_to_save, trained biases and tokens"
            )
        tensors = [tree[path][leaf] for tree in trees]
        check_same_shape(tensors, path, leaf, "combine", "average copies of one base's tensor")
        averaged = weighted_sum(tensors, chosen.at(path)).to(tensors[0].dtype)
        result.setdefault(path, {})[leaf] = averaged
    return result
