"""Loading: from checked files into a model or into a tree."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.functional import Graft
from torchgraft.functional.extending import (
    Plan,
    Site,
    Tree,
    each,
    modules_of,
    plan_follows,
    plan_replaced,
    plan_sites,
    resting,
    sort,
    state_of,
    structure_for,
    tensor_at,
    trainable_dtype,
    whole,
    wide_dtype,
)

from ..config.base import AdapterConfig
from ..config.keys import SHARED, names_of
from ..config.replaced import saved_buffers
from ..config.targets import find_targets
from ..inplace import adapter_names, get_base_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from ..inplace.gathering import fill
from ..inplace.walk import bare_modules, layers, original_base
from .disk.headers import Weights
from .fit import Parts, fit, found_leaves


@dataclasses.dataclass(frozen=True)
class Stored:
    """An adapter's opened files, and how to read them.

    Attributes:
        config: The config.
        weights: The opened weights.
        check_finite: Whether to refuse values that are not finite.
        dtype: Dtype for the parameters, or `None` for the rule of the target.
        device: Device for the parameters, or `None` for that of the base.
    """

    config: AdapterConfig
    weights: Weights
    check_finite: bool
    dtype: torch.dtype | None
    device: torch.device | str | None

    def plan(self, modules: Mapping[str, nn.Module], model: nn.Module) -> dict[str, Site]:
        """The sites that the config means on this model."""
        found = found_leaves(self.config, self.weights)
        if not found:
            raise KeyError(
                f"{self.weights.file}: has no tensor of {self.config.method.name}, the method of the config; it has "
                f"{names_of(self.weights.specs)}"
            )
        self.config.form.check(self.config, found)
        return plan_sites(self.config, modules, find_targets(self.config, modules, model), original_base(model))

    def read(self) -> dict[str, Tensor]:
        """The tensors by key, on the CPU."""
        tensors = self.weights.read()
        for key, tensor in tensors.items() if self.check_finite else ():
            tensor = tensor.float() if tensor.is_floating_point() else tensor
            if (tensor.is_floating_point() or tensor.is_complex()) and not tensor.isfinite().all():
                raise ValueError(f"{self.weights.file}: {key!r} has values that are NaN or infinite")
        return tensors

    def check_tied(self, parts: Parts, tensors: Mapping[str, Tensor]) -> None:
        """Refuse copies of a leaf that differ from it: tensors that are one here and were not where the file is from.

        Raises:
            ValueError: Names both keys.
        """
        for key, (*at, transposed) in parts.tied.items():
            where = (at[0], at[1])
            given = tensors[key].mT if transposed else tensors[key]
            if where in parts.leaves and not torch.equal(given, tensors[parts.leaves[where]]):
                raise ValueError(
                    f"{self.weights.file}: {key!r} differs from {parts.leaves[where]!r}, and the two are one tensor of "
                    "the model; untie them, or set ensure_weight_tying to false"
                )

    def leaf(self, key: str, tensor: Tensor, base: Tensor, dtype: torch.dtype) -> Tensor:
        """One parameter where it belongs, in memory of its own.

        Raises:
            ValueError: Values that the dtype cannot hold.
        """
        device = self.device or ("cpu" if base.is_meta else base.device)
        if tensor.is_complex() and not (self.dtype or dtype).is_complex:
            raise ValueError(
                f"{self.weights.file}: {key!r} is complex, {tensor.dtype}, and the model takes {self.dtype or dtype}, "
                "which has no imaginary part; load it into a complex model"
            )
        made = tensor.to(self.dtype or dtype)
        if made.itemsize < tensor.itemsize and (made.isinf() & ~tensor.isinf()).any():
            raise ValueError(
                f"{self.weights.file}: {key!r} has values of up to {tensor.abs().max():.3g}, more than {made.dtype} "
                f"can hold; pass dtype={tensor.dtype}"
            )
        return made.to(device)


def load_into_graft(graft: Graft, stored: Stored, adapter_name: str) -> Tree:
    """Read the tree of one of a graft's adapters.

    Raises:
        ValueError: A config that means something else than the graft's; tensors of the base that are not the graft's.
        KeyError: Tensors that are missing, or that nothing has a use for.
    """
    name = adapter_name if graft.named else ""
    if name not in graft.configs:
        raise ValueError(f"adapter_name is {name!r}; this graft was bound with {sorted(graft.configs)}")
    modules = modules_of(graft.model)
    sites = graft.sites[name]
    config: Any = graft.configs[name]
    _check_method(stored.config, config)
    stored = dataclasses.replace(stored, config=stored.config.recall(config).for_model(graft.model, modules))
    planned, replaced = stored.plan(modules, graft.model), graft.replaced[name]
    _check_same(stored, config, sites, planned)
    _check_same_replaced(replaced, plan_replaced(stored.config, modules, graft.model, planned))
    parts = fit(stored.config, stored.weights, sites, replaced, graft.follows[name], {}, lambda: state_of(graft.model))
    tensors = stored.read()
    stored.check_tied(parts, tensors)
    for shared in _other_shared(sites, parts, tensors):
        raise ValueError(
            f"{stored.weights.file}: {parts.shared[shared]!r} is not what this graft has drawn from its seed; use "
            "load_adapter(model, path), which takes the file's"
        )
    for path, leaf in _other_fixed(config, sites, parts, tensors):
        raise ValueError(
            f"{stored.weights.file}: {parts.leaves[path, leaf]!r} is not what this graft has made of the base's "
            "weights (perhaps with other signs, on another device); load_adapter(model, path) takes the file's, and "
            "extract_graft(model) and extract_params(model) then give a graft and a tree with it"
        )
    for base in _other_base(state_of(graft.model), parts, tensors):
        raise ValueError(
            f"{stored.weights.file}: {parts.base[base]!r} differs from {base!r} of the model, which a graft never "
            "changes; use load_adapter(model, path) on the model, or load this tensor into it first"
        )
    tree: Tree = {}
    for (path, leaf), key in parts.leaves.items():
        if path in sites and leaf in _fixed(config, sites[path]):
            continue
        own = _base_of(path, leaf, modules, sites, replaced)
        made = stored.leaf(key, tensors[key], own, wide_dtype(own))
        tree.setdefault(path, {})[leaf] = made
    return sort(tree)


def _base_of(
    path: str, leaf: str, modules: Mapping[str, nn.Module], sites: Mapping[str, Site], replaced: Plan
) -> Tensor:
    """The tensor of the base that says where a leaf belongs."""
    if leaf in replaced.get(path, {}):
        return tensor_at(modules, replaced[path][leaf].names[0])
    return sites[path].like(modules[sites[path].owner])


def _check_same_replaced(own: Plan, given: Plan) -> None:
    """Refuse a config that trains less of the base, or in another way; what more it trains is held against the base."""
    mine, theirs = ({(path, leaf): one for path, leaf, one in each(plan)} for plan in (own, given))
    for where in sorted(mine):
        if mine[where] != theirs.get(where):
            raise ValueError(
                f"the config and the graft differ in what they replace: {where[1]!r} of {where[0]!r} is "
                f"{theirs.get(where)} in the file and {mine[where]} in the graft; bind the model with the file's "
                "config: AdapterConfig.from_pretrained(path)"
            )


def _check_method(config: AdapterConfig, own: Any) -> None:
    if config.method.name != own.method.name:
        raise ValueError(
            f"peft_type is {config.method.name}, and the graft was bound with {type(own).__name__}; bind the model "
            "with the file's config: AdapterConfig.from_pretrained(path)"
        )


def _ranges(config: Any) -> list[tuple[int, ...]]:
    return [tuple(one) for one in getattr(config, "layer_replication", None) or ()]


def _check_same(stored: Stored, own: Any, sites: Mapping[str, Site], planned: Mapping[str, Site]) -> None:
    """Refuse a config that computes something else with the same tensors."""
    remedy = "; bind the model with the file's config: AdapterConfig.from_pretrained(path)"
    given, expected = (_ranges(config) for config in (stored.config, own))
    if given != expected:
        raise ValueError(f"layer_replication is {given} in the file and {expected} in the graft{remedy}")
    if sites.keys() != planned.keys():
        only = sorted(sites.keys() ^ planned.keys())
        where = "graft" if only[0] in sites else "file"
        raise ValueError(f"the config adapts other modules than the graft: only the {where} has {only[0]!r}{remedy}")
    for path, site in sites.items():
        for constant, value in site.constants.items():
            other = planned[path].constants[constant]
            if f"{SHARED}{constant}" in stored.weights.specs or _equal(value, other):
                continue
            what = f"is {other} in the file and {value} in the graft"
            raise ValueError(f"{constant} of {path} {'differs' if isinstance(value, Tensor) else what}{remedy}")
    for field in own.form.reads:
        given, expected = getattr(stored.config, field), getattr(own, field)
        if given != expected:
            raise ValueError(f"{field} is {given!r} in the file and {expected!r} in the graft{remedy}")


def _equal(a: Any, b: Any) -> bool:
    """Whether constants are the same; those made of weights may differ in their last bits from one time to another."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return bool(a == b)
    return a.shape == b.shape and torch.allclose(a, b.to(a), rtol=1e-4, atol=1e-5 * float(a.abs().max()))


def _other_shared(sites: Mapping[str, Site], parts: Parts, tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the shared constants that are not those of the file, up to the file's precision."""
    constants = next(iter(sites.values())).constants
    return [
        name for name, key in parts.shared.items() if not torch.equal(constants[name].to(tensors[key]), tensors[key])
    ]


def _other_fixed(
    config: AdapterConfig, sites: Mapping[str, Site], parts: Parts, tensors: Mapping[str, Tensor]
) -> list[tuple[str, str]]:
    """Leaves that are not trained and differ from those of the file by more than the file's precision."""
    found = []
    for path, site in sites.items():
        for leaf, own in config.form.fixed_tensors(config, site).items():
            given = tensors[parts.leaves[path, leaf]]
            step = 4 * torch.finfo(given.dtype).eps
            if not torch.allclose(own.to("cpu", torch.float64), given.double(), rtol=step, atol=max(step, 1e-5)):
                found.append((path, leaf))
    return found


def _other_base(base: Mapping[str, Tensor], parts: Parts, tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the base's tensors that are not those of the file."""
    return [
        name
        for name, key in parts.base.items()
        if base[name].is_meta or not torch.equal(whole(base[name]).cpu(), tensors[key].to(base[name].dtype))
    ]


def load_into_model(model: nn.Module, stored: Stored, adapter_name: str, is_trainable: bool) -> None:
    """Inject an adapter with the values of a file; all that can fail comes before the model is touched.

    Raises:
        ValueError: A name that is taken, a config that does not fit the model, tensors of the base that are not the
            model's.
        KeyError: Tensors that are missing, or that nothing has a use for.
    """
    if adapter_name in (taken := adapter_names(model)):
        raise ValueError(
            f"the model has an adapter {adapter_name!r} already (it has {taken}); choose another adapter_name, or call "
            "delete_adapter first"
        )
    shape = structure_for([stored.config], model)
    modules = bare_modules(shape)
    stored = dataclasses.replace(stored, config=stored.config.for_model(shape, modules))
    sites = stored.plan(modules, shape)
    replaced = plan_replaced(stored.config, modules, model, sites)
    saved = saved_buffers(stored.config, modules)
    follows = plan_follows(stored.config, modules, sites)
    parts = fit(
        stored.config, stored.weights, sites, replaced, follows, saved, lambda: get_base_model_state_dict(shape)
    )
    tensors = stored.read()
    stored.check_tied(parts, tensors)
    others = _other_shared(sites, parts, tensors)
    if others and not stored.config.form.saves_shared(stored.config):
        raise ValueError(
            f"{stored.weights.file}: {parts.shared[others[0]]!r} is not what the config's seed gives, and the config "
            "says that such tensors are not in the file; set save_projection in it to true"
        )
    embeddings = _embeddings(model, modules, stored, parts, tensors)
    tree: Tree = {}
    of_base = dataclasses.replace(stored, dtype=None)
    for (path, leaf), key in parts.leaves.items():
        base = _base_of(path, leaf, modules, sites, replaced)
        dtype = trainable_dtype(base)
        reader = of_base if leaf in replaced.get(path, {}) else stored
        tree.setdefault(path, {})[leaf] = reader.leaf(key, tensors[key], base, dtype)
    fixed = {path: {leaf: tree[path].pop(leaf) for leaf in _fixed(stored.config, sites[path])} for path in sites}
    constants = {name: tensors[parts.shared[name]].to(_constant(sites, name)) for name in others}

    config = dataclasses.replace(stored.config, inference_mode=not is_trainable)
    inject_adapter_in_model(config, model, adapter_name, params=tree)
    if parts.saved:
        set_peft_model_state_dict(model, {name: tensors[key] for name, key in parts.saved.items()}, adapter_name)
    for path, layer in layers(model).items():
        for leaf, value in fixed.get(path, {}).items():
            layer.set_leaf(adapter_name, leaf, nn.Parameter(value, requires_grad=False))
    for layer in layers(model).values() if constants else ():
        if adapter_name in layer.entries:
            layer.set_constants(adapter_name, constants)
    for module, leaf, value in embeddings:
        fill(module, leaf, value)


def _fixed(config: AdapterConfig, site: Site) -> tuple[str, ...]:
    return config.form.fixed(config, site)


def _constant(sites: Mapping[str, Site], name: str) -> Tensor:
    return next(iter(sites.values())).constants[name]


def _embeddings(
    model: nn.Module, modules: Mapping[str, nn.Module], stored: Stored, parts: Parts, tensors: Mapping[str, Tensor]
) -> list[tuple[nn.Module, str, Tensor]]:
    """Tensors of the base to be replaced by the file's: an adapter may bring its embeddings, and nothing else."""
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    found = []
    names: Iterable[str] = _other_base(get_base_model_state_dict(model), parts, tensors) if parts.base else ()
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = modules[path]
        if not isinstance(module, nn.Embedding) and module is not getattr(output, "base_layer", output):
            raise ValueError(
                f"{stored.weights.file}: {parts.base[name]!r} differs from {name!r} of the model, which no adapter may "
                "replace; was it made for another model? Load it into the model first if that is what you want"
            )
        tensor = resting(module, leaf)
        found.append((module, leaf, tensors[parts.base[name]].to(tensor.device, tensor.dtype)))
        warnings.warn(
            f"{name} of the base is replaced by the one that came with the adapter", UserWarning, stacklevel=4
        )
    return found
