"""Every method in place: the same numbers as the functional style, and every bit of the base back."""

import contextlib
import copy

import optree
import pytest
import torch
from torch.func import grad

from torchgraft.adapters import (
    adapter_rows,
    disable_adapter,
    extract_params,
    get_base_model_state_dict,
    inject_adapter_in_model,
    merge_adapter,
    merge_and_unload,
    set_adapter,
    set_requires_grad,
    unload,
    unmerge_adapter,
)
from torchgraft.functional import bind

from .cases import case, close, moved, same
from .sites import kind


def injected(one, params=None):
    """Return a copy of the model with a copy of the parameters planted in it."""
    return inject_adapter_in_model(one.config, copy.deepcopy(one.model), params=copy.deepcopy(params))


def base_of(one, model):
    """Return the tensors that the base's own modules have now, merged or not, by the names that they had."""
    found = {name.replace("base_layer.", ""): p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    return {name: found[name] for name in one.model.state_dict()}


def bits(one, model):
    """Return these tensors' content and where they lie."""
    return {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in base_of(one, model).items()}


def unchanged(one, model, before):
    now = bits(one, model)
    return all(now[name][0] == where and torch.equal(now[name][1], tensor) for name, (where, tensor) in before.items())


def test_in_place_starts_as_the_functional_style(name, site):
    one = case(name, site, torch.float32)
    torch.manual_seed(4)
    expected = one.graft.init()
    torch.manual_seed(4)
    assert same(extract_params(injected(one)), expected)


def test_in_place_is_functional(name, site):
    one = case(name, site)
    model = injected(one, one.params)
    close(model(one.x), one.graft(one.params, one.x))
    with disable_adapter(model):
        assert torch.equal(model(one.x), one.frozen(one.x))
    tree = extract_params(model)
    assert same(tree, one.params)
    trained = {p.data_ptr(): p for p in model.parameters() if p.requires_grad}
    leaves = [trained.pop(leaf.data_ptr()) for leaf in optree.tree_leaves(tree)]
    assert not trained
    given = torch.autograd.grad(model(one.x).square().mean(), leaves)
    close(list(given), optree.tree_leaves(grad(one.loss)(one.params, one.x)))
    with torch.no_grad():
        for leaf, other in zip(leaves, optree.tree_leaves(one.trees[1]), strict=True):
            leaf.copy_(other)
    close(model(one.x), one.graft(one.trees[1], one.x))


def test_merging_in_place_is_the_formula_and_unmerging_restores_every_bit(name, site):
    one = case(name, site)
    model = injected(one, one.params)
    before, y = bits(one, model), model(one.x)
    merge_adapter(model)
    close(base_of(one, model), one.dense(one.params))
    assert same(dict(get_base_model_state_dict(model)), dict(one.model.state_dict()))
    close(model(one.x), y)
    unmerge_adapter(model)
    assert unchanged(one, model, before)
    assert torch.equal(model(one.x), y)
    merged = merge_and_unload(model)
    close(dict(merged.state_dict()), one.dense(one.params))
    assert [type(m) for m in merged.modules()] == [type(m) for m in one.model.modules()]


def test_unloading_restores_every_bit(name, site):
    one = case(name, site)
    model = injected(one, one.params)
    before = bits(one, model)
    plain = unload(model)
    assert unchanged(one, plain, before) and torch.equal(plain(one.x), one.frozen(one.x))
    assert list(plain.state_dict()) == list(one.model.state_dict())


def test_two_in_place_are_two_that_are_named(name, site):
    one = case(name, site)
    model = injected(one, one.trees[0])
    inject_adapter_in_model(one.config, model, "other", params=copy.deepcopy(one.trees[1]))
    set_adapter(model, "other")
    close(model(one.x), one.graft(one.trees[1], one.x))
    for names in (["default", "other"], ["other", "default"]):
        set_adapter(model, names)
        graft = bind(one.model, dict.fromkeys(names, one.config))
        trees = {"default": one.trees[0], "other": one.trees[1]}
        close(model(one.x), graft({name: trees[name] for name in names}, one.x))


@pytest.mark.parametrize("training", [False, True])
def test_rows_in_place_are_each_alone(name, site, training):
    one = case(name, site)
    if training and one.row.evaluated:
        pytest.skip("rows draw other noise than each alone")
    model = injected(one, one.trees[0])
    inject_adapter_in_model(one.config, model, "same", params=copy.deepcopy(one.trees[1]))
    other = moved(bind(one.model, one.other).init(torch.Generator().manual_seed(2)), 2)
    inject_adapter_in_model(one.other, model, "other", params=other)
    model.train(training)
    names = ["other", "__base__", "default", "default", "same", "other", "__base__"][: len(one.x)]
    expected, seed, grads = [], torch.randn_like(one.model(one.x)), {}
    for row, adapter in enumerate(names):
        with disable_adapter(model) if adapter == "__base__" else contextlib.nullcontext():
            if adapter != "__base__":
                set_adapter(model, adapter)
            y = model(one.x)[row]
            expected.append(y.detach())
            leaves = {key: p for key, p in model.named_parameters() if p.requires_grad}
            found = torch.autograd.grad((y * seed[row]).sum(), [*leaves.values()], allow_unused=True) if leaves else ()
            grads |= {key: grads.get(key, 0) + g for key, g in zip(leaves, found, strict=True) if g is not None}
    set_requires_grad(model, ["default", "same", "other"])
    y = adapter_rows(model, names)(one.x)
    close(y.detach(), torch.stack(expected))
    base = [row for row, adapter in enumerate(names) if adapter == "__base__"]
    plain = copy.deepcopy(one.frozen).train(training)(one.x)
    close(y[base].detach(), plain[base])
    if training or kind(site) != "attention":  # whose kernel for evaluation has no place for adapters
        assert torch.equal(y[base], plain[base])
    leaves = {key: p for key, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad((y * seed).sum(), [*leaves.values()], allow_unused=True)
    found = {key: g for key, g in zip(leaves, found, strict=True) if g is not None}
    close({key: found[key] for key in grads}, grads)
    assert all(not g.any() for key, g in found.items() if key not in grads)
