"""Merging: adapters baked into a state dict of the original model."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from ._binding.binding import Binding
from ._binding.replaced import merged
from ._dense import active_trees, adapted_layers, followers
from ._dequantized import dequantized
from ._given import check_graft
from ._graft import Graft
from ._method import Tree
from ._sites.parameters import find
from ._sites.tensors import own_tensor
from ._tensors.placement import is_sharded, spread
from ._tensors.wrappers import bare_name, modules_of, state_of


def merge(graft: Graft, params: Tree, *, dequantize: bool = False) -> dict[str, Tensor]:
    """Bake adapters into a full state dict under the original model's keys.

    Adapters apply in the order they were bound in, `W' = merge_n(... merge_1(W))`, in float32 or wider, rounded to
    the base's dtype once; the norms of DoRA are those of the base's own weight, as in PEFT. Tensors that no adapter
    touches are the model's own, as in `model.state_dict()`; the model stays as it was.

    Args:
        graft: What `bind` returned.
        params: A parameter tree, as for a call; the result is differentiable in it.
        dequantize: Merge into the dequantised weights of a quantised base. All its quantised layers are dequantised
            (torchao's, torch's dynamic int8, bitsandbytes'), and the state dict is one of that model in floating point,
            `dequantized(model)`. `torchgraft.adapters.requantized` quantises it again, and says the error.

    Returns:
        A state dict to load into a model of the original architecture, which then computes the adapted output.

    Raises:
        KeyError, TypeError, ValueError: A tree that does not fit; a quantised weight without `dequantize`; one that is
            tied to a module outside of the adapter or computed by a parametrization, which no state dict can express; a
            site whose method has no dense form.

    >>> import torch
    >>> from torchgraft.adapters import LoraConfig
    >>> from torchgraft.functional import bind
    >>> graft = bind(torch.nn.Linear(2, 2), LoraConfig(target_modules="all-linear"))
    >>> sorted(merge(graft, graft.init()))
    ['bias', 'weight']
    """
    instead = "; adapters in place are merged by torchgraft.adapters.merge_adapter(model)"
    check_graft(graft, "merge", instead)
    active = active_trees(graft, params, "merge")
    if dequantize:
        graft = over_dequantized(graft)
    model = graft.binding.model
    state = state_of(model)
    modules = modules_of(model)
    given = merged(modules, graft.binding.replaced, active)
    state.update(given)
    names: dict[int, list[str]] = {}
    tensors = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    for name, tensor in itertools.chain(*tensors):
        names.setdefault(id(tensor), []).append(bare_name(name))
    following = followers(graft.binding, active)
    for site, layer in adapted_layers(graft.binding, active, given):
        for leaf, value in site.stored(*layer.dense()).items():
            _write(state, names, modules, site.path, leaf, value, following.get(site.path, ()))
    return state


def over_dequantized(graft: Graft) -> Graft:
    """Return the same adapters on the dequantised model, with the constants that they have.

    Raises:
        TypeError: A graft of stacks.
    """
    binding = graft.binding
    if type(binding) is not Binding:
        raise TypeError(
            "dequantize: the graft is of a stack; bind one adapter's config: bind(dequantized(model), config)"
        )
    model = dequantized(binding.model)
    constants = {name: {path: site.constants for path, site in sites.items()} for name, sites in binding.sites.items()}
    paths = {name: list(sites) for name, sites in binding.sites.items()}
    modules = modules_of(model)
    made = Binding.of_modules(model, binding.configs, modules, named=binding.named, paths=paths, constants=constants)
    return Graft(model, made)


def _write(
    state: dict[str, Tensor],
    names: dict[int, list[str]],
    modules: dict[str, nn.Module],
    path: str,
    leaf: str,
    value: Tensor,
    following: Collection[int] = (),
) -> None:
    module: Any = find(modules, path)[0]
    tensor = own_tensor(module, leaf)
    if tensor is None:
        raise ValueError(
            f"{path}: {leaf} is computed (a parametrization or weight norm), so no entry of the state dict is the "
            "merged one; remove it first, or use graft.view(params)"
        )
    for name in names[id(tensor)]:
        parent = name.rpartition(".")[0]
        if modules[parent] is not module and id(modules[parent]) not in following:
            raise ValueError(
                f"{path}: its {leaf} is tied to {name}, which would change with it; untie the two, "
                "or use graft.view(params), which keeps them apart"
            )
        value = value.to(tensor.dtype)
        state[name] = spread(value, tensor.device_mesh, tensor.placements) if is_sharded(tensor) else value  # type: ignore[attr-defined]
