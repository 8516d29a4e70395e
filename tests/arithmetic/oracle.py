"""Adapters on a model with layers of each kind, and what they change, as merging says it: in float64."""

import dataclasses

import torch
from torch import nn

from torchgraft.adapters import LoraConfig
from torchgraft.functional import bind, merge

LAYERS = ["up", "down", "table", "conv", "grid", "attention"]


class Layers(nn.Module):
    """One layer of each kind that LoRA adapts and merges."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.table = nn.Embedding(10, 6)
        self.conv, self.grid = nn.Conv1d(6, 4, 3), nn.Conv2d(3, 5, (2, 3))
        self.attention = nn.MultiheadAttention(8, 2)


class Experts(nn.Module):
    """Three matrices in one parameter."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(3, 6, 5))


def lora(**fields):
    return LoraConfig(**{"target_modules": LAYERS, **fields})


def adapter(model, config, seed=0):
    """An adapter whose leaves are all random, in float64."""
    generator = torch.Generator().manual_seed(seed)
    tree = bind(model, config).init()
    return config, {
        path: {leaf: torch.randn(t.shape, generator=generator, dtype=torch.float64) for leaf, t in leaves.items()}
        for path, leaves in tree.items()
    }


def changes(model, one):
    """What an adapter adds to each tensor of the model, by merging."""
    config, params = one
    state = merge(bind(model, config), params)
    return {name: (state[name] - tensor).detach() for name, tensor in model.state_dict().items()}


def weighted(model, adapters, weights):
    """The sum of what adapters add, each times its weight."""
    each = [changes(model, one) for one in adapters]
    return {
        name: sum(weight * one[name] for one, weight in zip(each, weights, strict=True)) for name in model.state_dict()
    }


def assert_same(actual, expected, atol=1e-10):
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=1e-10, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def with_leaves(one, **replaced):
    config, tree = one
    return dataclasses.replace(config, **replaced), tree
