"""What every method refuses: fields that mean nothing, and trees that do not fit; the error says which and where."""

import copy
import dataclasses
import re
import typing

import pytest
import torch
from torch import nn

from torchgraft.adapters import inject_adapter_in_model
from torchgraft.functional import bind, merge, stack

from .cases import case, changed
from .methods import METHODS
from .sites import SITES


def test_wrong_values_are_errors_that_say_so(name):
    row = METHODS[name]
    for fields, words in row.wrong:
        with pytest.raises(ValueError, match=re.escape(words)):
            bind(SITES["linear"].build(), changed(row.config, fields))


@pytest.mark.parametrize("config", {type(row.config): row.config for row in METHODS.values()}.values(), ids=type)
def test_values_of_a_wrong_type_are_errors_for_every_field(config):
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        if hints[field.name] is not typing.Any:
            with pytest.raises(ValueError, match=f"{type(config).__name__}: {field.name} is <object"):
                changed(config, {field.name: object()})


def test_unknown_fields_and_targets_that_match_nothing_are_errors(name):
    config = METHODS[name].config
    with pytest.raises(TypeError, match="magic"):
        changed(config, {"magic": 1})
    with pytest.raises(ValueError, match="first.* match"):
        bind(nn.ModuleDict({"third": nn.Linear(4, 4)}), config)


def damaged(params):
    """Return trees that do not fit, with what the error has to name."""
    path = next(iter(params))
    leaf = next(iter(params[path]))
    leaves, tensor, words = params[path], params[path][leaf], f"{re.escape(path)}.*{leaf}"
    yield {**params, "third": leaves}, "third"
    yield {other: tree for other, tree in params.items() if other != path}, re.escape(path)
    yield {**params, path: {**leaves, "magic": tensor}}, "magic"
    yield {**params, path: {other: t for other, t in leaves.items() if other != leaf}}, leaf
    yield {**params, path: {**leaves, leaf: tensor.flatten()[1:]}}, words
    yield {**params, path: {**leaves, leaf: torch.stack([tensor, tensor])}}, words
    yield {**params, path: {**leaves, leaf: None}}, words
    yield {**params, path: {**leaves, leaf: tensor.to("meta")}}, leaf.split(".")[0] if path == "*" else words


def test_trees_that_do_not_fit_are_errors(name, site):
    one = case(name, site)
    for tree, words in damaged(one.params):
        with pytest.raises((ValueError, KeyError, TypeError), match=words):
            one.graft(tree, one.x)
        with pytest.raises((ValueError, KeyError, TypeError), match=words):
            merge(one.graft, tree)


def cut(leaf):
    """Return a leaf with one entry on its first axis that has more; torch would repeat it."""
    axis = next((axis for axis, size in enumerate(leaf.shape) if size > 1), None)
    return None if axis is None else leaf.narrow(axis, 0, 1)


def leaves_of(tree):
    return [(path, leaf) for path, leaves in tree.items() for leaf in leaves if cut(leaves[leaf]) is not None]


def calls_of(one, tree, stacked):
    """Return how an adapter and a stack meet the model: once by a call, and as what was made of them before."""
    x, rows = one.x, torch.arange(len(one.x)) % 2
    routed = one.route(stacked, rows)
    view, by_rows = one.graft.view(tree), one.graft.view(routed)
    return [lambda: one.graft(tree, x), lambda: view(x)], [lambda: one.graft(routed, x), lambda: by_rows(x)]


def test_leaves_that_are_cut_after_a_call_are_errors_in_calls_views_and_in_place(name, site):
    one = case(name, site)
    tree, stacked = copy.deepcopy(one.params), stack(copy.deepcopy(one.trees[:2]))
    model = inject_adapter_in_model(one.config, copy.deepcopy(one.model), params=copy.deepcopy(one.params))
    alone, many = calls_of(one, tree, stacked)
    for call in (*alone, *many, lambda: model(one.x)):
        call()
    for path, leaf in leaves_of(tree):
        words = rf"{re.escape(leaf.partition('.')[0])}.* has shape .*, expected"
        for given, calls, of in ((tree, alone, cut), (stacked, many, lambda held: cut(held[0]).unsqueeze(0))):
            whole = given[path][leaf]
            kept, whole.data = whole.data, of(whole.data)
            for call in calls:
                with pytest.raises(ValueError, match=words):
                    call()
            whole.data = kept
    for parameter in filter(lambda p: p.requires_grad and cut(p) is not None, model.parameters()):
        kept, parameter.data = parameter.data, cut(parameter.data)
        with pytest.raises(ValueError, match="has shape .*, expected"):
            model(one.x)
        parameter.data = kept
    for call in (*alone, *many, lambda: model(one.x)):
        call()
