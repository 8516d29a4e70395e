"""Loading: from checked files into a model."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from torchgraft.functional.extending import (
    Plan,
    Site,
    Tree,
    resting,
    structure_for,
    trainable_dtype,
)

from .._config.replaced import saved_buffers
from .._inplace import adapter_names, get_base_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from .._inplace.tensors.gathering import fill
from .._inplace.walk import bare_modules, layers, placed_in
from .fit import Parts, fit, integers_of
from .stored import Stored, base_of, fixed_leaves, other_base, other_shared


def load_into_model(model: nn.Module, stored: Stored, adapter_name: str, is_trainable: bool, activate: bool) -> None:
    """Inject an adapter with the values of a file; all that can fail comes before the model is touched.

    Raises:
        ValueError: A name that is taken, a config that does not fit the model, tensors of the base that are not the
            model's.
        KeyError: Tensors that are missing, or that belong to nothing in the model.
    """
    if adapter_name in (taken := adapter_names(model)):
        raise ValueError(
            f"the model has an adapter {adapter_name!r} already (it has {taken}); choose another adapter_name, or call "
            "delete_adapter first"
        )
    shape = structure_for([stored.config], model)
    modules = bare_modules(shape)
    stored = dataclasses.replace(stored, config=stored.config.for_model(shape, modules))
    binding = stored.bind(modules, shape)
    sites, replaced, tied = binding.sites[""], binding.replaced[""], binding.tied[""]
    saved = saved_buffers(stored.config, modules)
    parts = fit(stored.config, stored.weights, sites, replaced, tied, saved, lambda: get_base_model_state_dict(shape))
    tensors = stored.read()
    stored.check_tied(parts, tensors)
    others = other_shared(stored.config, sites, parts, tensors)
    if others and not stored.config.form.saves_shared(stored.config):
        raise ValueError(
            f"{stored.weights.file}: {parts.shared[next(iter(others))]!r} is not what the config's seed gives, and the "
            "config says that such tensors are not in the file; set save_projection in it to true"
        )
    embeddings = _embeddings(model, modules, stored, parts, tensors)
    tree = _tree(stored, parts, tensors, modules, sites, replaced)
    fixed = {path: {leaf: tree[path].pop(leaf) for leaf in fixed_leaves(stored.config, sites[path])} for path in sites}
    tree = {path: leaves for path, leaves in tree.items() if leaves}

    config = dataclasses.replace(stored.config, inference_mode=not is_trainable)
    inject_adapter_in_model(config, model, adapter_name, params=tree, activate=activate)
    if parts.saved:
        set_peft_model_state_dict(model, {name: tensors[key] for name, key in parts.saved.items()}, adapter_name)
    _put_constants(model, adapter_name, fixed, others)
    for module, leaf, value in embeddings:
        fill(module, leaf, value)


def _tree(
    stored: Stored,
    parts: Parts,
    tensors: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module],
    sites: Mapping[str, Site],
    replaced: Plan,
) -> Tree:
    """Return the parameters of the file, each with the dtype and the device of the base where it belongs."""
    tree: Tree = {}
    of_base = dataclasses.replace(stored, dtype=None)
    for (path, leaf), key in parts.leaves.items():
        base = base_of(path, leaf, modules, sites, replaced)
        reader = of_base if leaf in replaced.get(path, {}) else stored
        dtype = integers_of(stored.config, sites, path, leaf) or trainable_dtype(base)
        tree.setdefault(path, {})[leaf] = reader.leaf(key, tensors[key], base, dtype)
    return tree


def _put_constants(model: nn.Module, adapter_name: str, fixed: Tree, shared: Mapping[str, Tensor]) -> None:
    """Have an injected adapter use the file's leaves that are not trained, and its shared constants."""
    for path, layer in layers(model).items():
        for leaf, value in fixed.get(path, {}).items():
            layer.set_leaf(adapter_name, leaf, nn.Parameter(value, requires_grad=False))
    for layer in layers(model).values() if shared else ():
        if adapter_name in layer.entries:
            layer.set_shared(adapter_name, shared)


def _embeddings(
    model: nn.Module, modules: Mapping[str, nn.Module], stored: Stored, parts: Parts, tensors: Mapping[str, Tensor]
) -> list[tuple[nn.Module, str, Tensor]]:
    """Tensors of the base to be replaced by the file's: an adapter may bring its embeddings, and nothing else."""
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    if (part := placed_in(output)) is not None:
        output = part.user_module
    found = []
    names: Iterable[str] = other_base(get_base_model_state_dict(model), parts, tensors) if parts.base else ()
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = modules[path]
        if not isinstance(module, nn.Embedding) and module is not output:
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
