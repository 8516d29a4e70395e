"""What every method refuses: fields that mean nothing, and trees that do not fit; the error says which and where."""

import dataclasses
import re
import typing

import pytest
import torch
from torch import nn

from torchgraft.functional import bind, merge

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
