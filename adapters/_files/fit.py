"""Whether the tensors of a file are those that a model expects: their keys, shapes and dtypes, all before any is read.

A file has the adapter's leaves; the copies of `modules_to_save`; the constants that a method shares between modules;
and, for embeddings, tensors of the base model itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from torchgraft.functional.extending import SHARED as SHARED_LEAVES
from torchgraft.functional.extending import Plan, Site, TiedSites, each, shared_shapes

from .._config.base import AdapterConfig
from .._config.keys import PREFIX, SHARED, held_at, join, places, replaced_key, split_key
from .._config.messages import names_of
from .._config.replaced import other_names
from .disk.headers import Spec, Weights


@dataclasses.dataclass(frozen=True)
class Parts:
    """Keys of a file by what they are.

    Attributes:
        leaves: Of the adapter's leaves, by `(path, leaf)`; those that sites share are at `"*"`.
        saved: Of buffers of `modules_to_save`, by their name in the model.
        shared: Of shared constants, by name.
        base: Of tensors of the base model, by their name there.
        tied: Of further copies of a leaf, by key: its path and name, and whether it is transposed.
    """

    leaves: dict[tuple[str, str], str]
    saved: dict[str, str]
    shared: dict[str, str]
    base: dict[str, str]
    tied: dict[str, tuple[str, str, bool]]


def found_leaves(config: AdapterConfig, weights: Weights) -> dict[str, dict[str, Tensor]]:
    """Return the leaves that a file has at each place, as tensors without values."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, spec in weights.specs.items():
        if (split := split_key(config, key)) is not None:
            found.setdefault(split[0], {})[split[1]] = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
    return found


def fit(
    config: AdapterConfig,
    weights: Weights,
    sites: Mapping[str, Site],
    replaced: Plan,
    follows: TiedSites,
    saved: Mapping[str, Tensor],
    base: Callable[[], Mapping[str, Tensor]],
) -> Parts:
    """Hold what a file has against what an adapter needs.

    Args:
        config: The config that came with the file.
        weights: The opened file.
        sites: The modules that it adapts, by path.
        replaced: The tensors of the base that it has copies of.
        follows: The modules that have the parameters of one of these sites.
        saved: The buffers of `modules_to_save`, by name.
        base: `() -> {name: tensor}` of the base model, asked for only where the file has more than the adapter.

    Raises:
        KeyError: A key that is missing, or one that belongs to nothing in the model.
        ValueError: Another shape, or another kind of dtype.
    """
    wanted = _wanted(config, sites, replaced, follows, saved)
    parts, rest = Parts({}, {}, {}, {}, {}), []
    for key, name in _stripped(weights).items():
        if not _take(config, weights, key, name, wanted, sites, parts) and not _is_spare(config, name, replaced):
            rest.append(key)
    _check_complete(config, weights, parts, wanted)
    tensors = base() if rest else {}
    for key in rest:
        name = _base_name(key, tensors)
        if name not in tensors:
            raise KeyError(
                f"{weights.file}: has {key!r}, which is neither a tensor of this {config.method.name} adapter nor of "
                f"the model; was it made for another model? The config adapts {names_of(sites)}"
            )
        parts.base[name] = key
        _check(weights, key, tuple(tensors[name].shape), tensors[name].dtype)
    return parts


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """What an adapter needs of a file, by key without PEFT's prefix.

    Attributes:
        leaves: Path and name of each leaf; a leaf may have two keys, of which the last is the one to ask for.
        shapes: The shape of each leaf, by path and name.
        tied: Further copies of a leaf: its path and name, and whether it is transposed.
        saved: The buffers of `modules_to_save`.
        shared: Shared constants, by their whole key.
    """

    leaves: dict[str, tuple[str, str]]
    shapes: dict[tuple[str, str], tuple[int, ...]]
    tied: dict[str, tuple[str, str, bool]]
    saved: Mapping[str, Tensor]
    shared: dict[str, Tensor]


def _wanted(
    config: AdapterConfig, sites: Mapping[str, Site], replaced: Plan, follows: TiedSites, saved: Mapping[str, Tensor]
) -> _Wanted:
    at = places(sites)
    shapes = {(path, leaf): shape for path, site in sites.items() for leaf, shape in _shapes(config, site).items()}
    leaves = {join(config, at[path], leaf): (path, leaf) for path, leaf in shapes}
    for path, leaf, one in each(replaced):
        for adapted in (path not in sites, path in sites):  # PEFT writes either
            leaves[replaced_key(held_at(path, sites), leaf, adapted)] = path, leaf
        shapes[path, leaf] = one.shape
    for name, shape in shared_shapes(config, sites).items():
        shapes[SHARED_LEAVES, name] = shape
    tied = {name: (*where, False) for name, where in other_names(replaced).items()}
    first: dict[str, str] = {}
    for path, site in sites.items():
        leaves |= {f"{SHARED}{name}": (SHARED_LEAVES, name) for name in config.form.together(site).values()}
        for leaf, name in config.form.repeats(site).items():
            key = join(config, at[path], leaf)
            if first.setdefault(name, key) == key:
                leaves[key] = SHARED_LEAVES, name
            else:
                tied[key] = SHARED_LEAVES, name, False
    for path, leaf, one in each(replaced):
        others = one.names[1:] if one.rows is not None else ()  # PEFT writes rows again for each name of the matrix
        tied |= {replaced_key(other.rpartition(".")[0], leaf): (path, leaf, False) for other in others}
    for path, follow in follows.items():
        tied |= {
            join(config, path, own): (follow.source, leaf, follow.transposed) for own, leaf in follow.leaves.items()
        }
    shared = {f"{SHARED}{name}": tensor for name, tensor in config.form.shared_tensors(sites.values()).items()}
    return _Wanted(leaves, shapes, tied, saved, shared)


def _take(
    config: AdapterConfig,
    weights: Weights,
    key: str,
    name: str,
    wanted: _Wanted,
    sites: Mapping[str, Site],
    parts: Parts,
) -> bool:
    """Enter a key into the parts of a file, and return whether it is one that is wanted."""
    if name in wanted.leaves:
        where = wanted.leaves[name]
        if where in parts.leaves:
            raise KeyError(f"{weights.file}: has {key!r} and {parts.leaves[where]!r}, which mean the same")
        parts.leaves[where] = key
        floating = weights.specs[key].dtype.is_floating_point  # as PEFT writes integers on Windows
        integers = None if floating else integers_of(config, sites, *where)
        _check(weights, key, wanted.shapes[where], integers or _own_kind(weights, key))
    elif (other := name.replace(".base_layer.", ".")) in wanted.tied:
        path, leaf, transposed = parts.tied[key] = wanted.tied[other]
        shape = wanted.shapes[path, leaf]
        _check(weights, key, shape[::-1] if transposed else shape, _own_kind(weights, key))
    elif name in wanted.saved:
        parts.saved[name] = key
        _check(weights, key, tuple(wanted.saved[name].shape), wanted.saved[name].dtype)
    elif key in wanted.shared:
        parts.shared[key.removeprefix(SHARED)] = key
        constant = wanted.shared[key]
        _check(weights, key, tuple(constant.shape), constant.dtype)
    else:
        return False
    return True


def _shapes(config: AdapterConfig, site: Site) -> dict[str, tuple[int, ...]]:
    """Return shapes of all that a file has of a site, trained or not."""
    fixed = {leaf: tuple(tensor.shape) for leaf, tensor in config.form.fixed_tensors(config, site).items()}
    return config.method.shapes(config, site) | fixed


def integers_of(config: AdapterConfig, sites: Mapping[str, Site], path: str, leaf: str) -> torch.dtype | None:
    """Return the dtype of a leaf that is not trained where it holds integers, such as a mask's indices."""
    fixed = config.form.fixed_tensors(config, sites[path]) if path in sites else {}
    dtype = fixed[leaf].dtype if leaf in fixed else torch.float32
    return None if dtype.is_floating_point or dtype.is_complex else dtype


def _stripped(weights: Weights) -> dict[str, str]:
    """Return keys by key, without PEFT's prefix."""
    stripped: dict[str, str] = {}
    seen: dict[str, str] = {}
    for key in weights.specs:
        name = key.removeprefix("_orig_mod.").removeprefix(PREFIX)
        if name in seen:
            raise KeyError(f"{weights.file}: has {key!r} and {seen[name]!r}, which mean the same")
        stripped[key], seen[name] = name, key
    return stripped


def _is_spare(config: AdapterConfig, name: str, replaced: Plan) -> bool:
    """Return whether a key is a second one that PEFT writes for a trained module: a bias, or resized embeddings."""
    for part in (".original_module.", ".modules_to_save."):
        path, found, _ = name.partition(part)
        more = config.bias == "all" or part == ".modules_to_save."
        if found and more and any(one == path or one.startswith(f"{path}.") for one in replaced):
            return True
    return False


def _base_name(key: str, tensors: Mapping[str, Tensor]) -> str:
    name = key.removeprefix("_orig_mod.").removeprefix(PREFIX)
    inner = (".token_adapter.base_layer.", ".base_layer.", ".original_module.")  # where PEFT's modules have a base
    found = (one for one in (name, *(name.replace(part, ".") for part in inner)) if one in tensors)
    return next(found, name.replace(".base_layer.", "."))


def _own_kind(weights: Weights, key: str) -> torch.dtype:
    """Return a dtype of the kind that a leaf has in the file; whether it fits the model is seen when it is read."""
    return weights.specs[key].dtype if weights.specs[key].dtype.is_complex else torch.float32


def _check(weights: Weights, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    spec: Spec = weights.specs[key]
    if spec.shape != shape:
        raise ValueError(
            f"{weights.file}: {key!r} has shape {spec.shape}, expected {shape} by the model and the config; was it "
            "made for another model, or the config changed?"
        )
    if spec.dtype != dtype and not (spec.dtype.is_floating_point and dtype.is_floating_point):
        kind = "a floating-point dtype" if dtype.is_floating_point else str(dtype)
        raise ValueError(f"{weights.file}: {key!r} has dtype {spec.dtype}, expected {kind}")


def _check_complete(config: AdapterConfig, weights: Weights, parts: Parts, wanted: _Wanted) -> None:
    """Refuse a file that lacks keys."""
    keys = {where: key for key, where in wanted.leaves.items()}
    missing = [
        key if where[0] == SHARED_LEAVES else f"{PREFIX}{key}"
        for where, key in keys.items()
        if where not in parts.leaves
    ]
    missing += [f"{PREFIX}{name}" for name in wanted.saved if name not in parts.saved]
    if config.form.saves_shared(config) or parts.shared:
        missing += [key for key in wanted.shared if key.removeprefix(SHARED) not in parts.shared]
    if missing:
        raise KeyError(
            f"{weights.file}: lacks {names_of(missing)}, which the config asks for on this model; it has "
            f"{names_of(weights.specs)}"
        )
