"""The state dict of a view: the adapted tensors, as `merge` gives them, or an error that says what to save.

A view shares the base's tensors, and its adapter is no part of its module tree: a state dict of what hangs there would
be the base's.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import nn

from .._binding.replaced import Plan, each, tensor_at
from .._method import SiteAdapter
from .._routing.route import Routed
from .._sites.parameters import find
from .._sites.tensors import own_tensor
from .._skeleton.saving import INSTEAD
from .._skeleton.swaps import swap_tensors
from .._tensors.placement import is_sharded
from .._tensors.wrappers import bare_name, modules_of
from .bound_model import BoundModel
from .constant import check_constant, precompute
from .entered import watch
from .fill import named_base
from .run import with_base
from .shared_tensors import SharedTensors


def make_view(bound: BoundModel, params: Any, constant: bool) -> nn.Module:
    """Make a module like the user's with adapters in, as `Graft.view` does."""
    binding = bound.binding
    base, params = with_base(params)
    active = binding.active(params)
    if constant:
        check_constant(active)
        check_constant({"base_params": dict(base)})
    skeleton = bound.build()
    skeleton.context.trees = active
    skeleton.own_buffers()
    replaced = named_base(skeleton, base)
    for key, tensor in replaced.items():
        for container, name in skeleton.places[key]:
            container[name] = tensor
    swap_tensors(skeleton, active)
    if constant:
        precompute(skeleton)
    adapters = {name: binding.adapters(name) for name in active}
    guard(skeleton.root, conflict(binding.model, adapters, {name: binding.replaced[name] for name in active}))
    if any(isinstance(tree, Routed) for tree in active.values()):
        watch(bound, skeleton, active, base)
    modules = [module for module, _ in skeleton.modules]
    if not constant and not any(is_sharded(parameter) for parameter in binding.model.parameters()):
        skeleton.root.register_forward_pre_hook(SharedTensors(modules, replaced))
    return skeleton.root


def guard(root: nn.Module, conflict: str | None) -> None:
    """Refuse loads into a view, whose tensors are the user's, and saves that no state dict expresses.

    Args:
        root: The view.
        conflict: Why a state dict of the whole view is not the adapted model.
    """
    for module in root.modules():
        hooks: Any = module._load_state_dict_pre_hooks.values()
        if not any(getattr(wrapped, "hook", None) is _refuse_loading for wrapped in hooks):
            module.register_load_state_dict_pre_hook(_refuse_loading)
    if conflict is not None:
        root.register_state_dict_pre_hook(functools.partial(_refuse_saving, conflict=conflict))


def conflict(
    model: nn.Module, adapters: Mapping[str, Mapping[str, SiteAdapter]], plans: Mapping[str, Plan]
) -> str | None:
    """Say which adapted tensor is tied to a module outside of the adapters, where no state dict can have both.

    Args:
        model: The user's model.
        adapters: Parts of the active adapters, by name and path.
        plans: What these adapters replace.
    """
    modules = modules_of(model)
    names: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(bare_name(name))
    adapted: dict[int, set[int]] = {}
    first: dict[int, str] = {}
    for by_path in adapters.values():
        for path, adapter in by_path.items():
            module, leaf = find(modules, path)
            for held in (leaf,) if leaf else adapter.site.names:
                parameter = own_tensor(module, held)
                if parameter is not None:
                    adapted.setdefault(id(parameter), set()).add(id(module))
                    first.setdefault(id(parameter), f"{path}: its {held}")
    for plan in plans.values():
        for path, leaf, replacement in each(plan):
            key = id(tensor_at(modules, replacement.names[0]))
            owners = {id(modules[name.rpartition(".")[0]]) for name in replacement.names}
            adapted.setdefault(key, set()).update(owners)
            first.setdefault(key, f"{path}: its {leaf}")
    for key, owners in adapted.items():
        for name in names.get(key, ()):
            if id(modules[name.rpartition(".")[0]]) not in owners:
                return f"{first[key]} is tied to {name}, which is not adapted, and a model has one tensor for both"
    return None


def _refuse_loading(module: nn.Module, state_dict: Any, prefix: str, *_: Any) -> None:
    raise RuntimeError(
        f"load_state_dict on {prefix.removesuffix('.') or 'a view'}: a view shares its tensors with the user's model, "
        "which would change; load into that model, or into one of its own: "
        "model.load_state_dict(merge(graft, params))"
    )


def _refuse_saving(module: nn.Module, prefix: str, keep_vars: bool, *, conflict: str) -> None:
    raise ValueError(f"state_dict of a view: {conflict}; {INSTEAD}")
