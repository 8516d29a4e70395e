"""LoRA on embeddings with settings: what the padding row, counted gradients and a largest norm mean for the adapter."""

import copy

import optree
import peft
import pytest
import torch
from torch import nn
from torch.func import grad, vmap

from torchgraft import adapters
from torchgraft.adapters import LoraConfig
from torchgraft.functional import bind, merge, route, stack, unstack, value_and_grad

IDS = torch.tensor([[0, 2, 2, 5], [5, 1, 2, 0], [3, 3, 0, 6]])
FIELDS = {"r": 2, "target_modules": ["embed"]}
SETTINGS = [{"padding_idx": 2}, {"scale_grad_by_freq": True}, {"padding_idx": 0, "scale_grad_by_freq": True}]
settings = pytest.mark.parametrize("options", SETTINGS, ids=str)


class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 4, dtype=torch.float64, **options)

    def forward(self, ids):
        return self.embed(ids).sin()


def spread(graft, seed=0, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    return optree.tree_map(
        lambda t: scale * torch.randn(t.shape, generator=generator, dtype=t.dtype), graft.init(dtype=torch.float64)
    )


@settings
def test_gradients_are_pefts(options):
    mine, theirs = Model(**options), Model(**options)
    adapters.inject_adapter_in_model(LoraConfig(**FIELDS), mine)
    peft.inject_adapter_in_model(peft.LoraConfig(**FIELDS), theirs)
    params = spread(bind(Model(**options), LoraConfig(**FIELDS)))["embed"]
    found = []
    for model in (mine, theirs):
        leaves = [getattr(model.embed, name)["default"] for name in ("lora_embedding_A", "lora_embedding_B")]
        for leaf, name in zip(leaves, ("lora_embedding_A", "lora_embedding_B"), strict=True):
            leaf.data.copy_(params[name])
        y = model(IDS)
        found.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    torch.testing.assert_close(found[0], found[1])
    if "padding_idx" in options:
        assert not found[0][1][:, options["padding_idx"]].any()


@settings
def test_rows_have_the_gradients_of_each_adapter_alone(options):
    graft = bind(Model(**options), LoraConfig(**FIELDS))
    trees = [spread(graft, seed) for seed in range(3)]
    rows = torch.tensor([2, 0, 2])

    def routed(many):
        return graft(route(many, rows), IDS).square().sum()

    for given in (grad(routed)(stack(trees)), value_and_grad(routed)(stack(trees))[1]):
        for adapter, tree in enumerate(unstack(given)):
            mine = IDS[rows == adapter]
            expected = grad(lambda params, ids=mine: graft(params, ids).square().sum())(trees[adapter])
            torch.testing.assert_close(tree, expected)


@settings
def test_vmap_of_grad_is_a_loop(options):
    graft = bind(Model(**options), LoraConfig(**FIELDS))
    trees = [spread(graft, seed) for seed in range(2)]

    def loss(params):
        return graft(params, IDS).square().sum()

    for given, tree in zip(unstack(vmap(grad(loss))(stack(trees))), trees, strict=True):
        torch.testing.assert_close(given, grad(loss)(tree))


def renormed(weight, limit):
    norms = weight.norm(dim=1, keepdim=True)
    return torch.where(norms > limit, weight * limit / (norms + 1e-7), weight)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_largest_norm_holds_for_the_base_and_leaves_it_as_it_is():
    model = Model(max_norm=1.0)
    before = model.embed.weight.detach().clone()
    graft = bind(model, LoraConfig(**FIELDS))
    trees = [spread(graft, seed) for seed in range(2)]
    a, b = (trees[0]["embed"][f"lora_embedding_{name}"] for name in "AB")
    expected = (renormed(before, 1.0) + 4 * (b @ a).T)[IDS].sin()
    torch.testing.assert_close(graft(trees[0], IDS), expected)
    torch.testing.assert_close(graft.view(trees[0])(IDS), expected)
    torch.testing.assert_close(vmap(lambda tree: graft(tree, IDS))(stack(trees))[0], expected)
    torch.testing.assert_close(graft(route(stack(trees), torch.tensor([0, 0, 0])), IDS), expected)
    assert torch.equal(model.embed.weight, before)
    torch.testing.assert_close(graft(graft.init(), IDS), copy.deepcopy(model)(IDS))


def test_a_largest_norm_in_place_is_pefts_where_that_leaves_the_adapter_as_it_is():
    mine, theirs = Model(max_norm=1.0), Model(max_norm=1.0)
    adapters.inject_adapter_in_model(LoraConfig(**FIELDS), mine)
    peft.inject_adapter_in_model(peft.LoraConfig(**FIELDS), theirs)
    params = spread(bind(Model(max_norm=1.0), LoraConfig(**FIELDS)), scale=0.1)["embed"]
    for model in (mine, theirs):
        for name, leaf in params.items():
            getattr(model.embed, name)["default"].data.copy_(leaf)
    torch.testing.assert_close(mine(IDS), theirs(IDS))
    assert torch.equal(mine.embed.base_layer.weight, theirs.embed.base_layer.weight)
    with pytest.raises(ValueError, match=r"embed: an Embedding with max_norm=1\.0 rewrites its weight"):
        adapters.merge_adapter(mine)


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"init_lora_weights": "mica"}], ids=str)
def test_what_takes_the_weight_is_refused_under_a_largest_norm(fields):
    with pytest.raises(ValueError, match=r"embed: an Embedding with max_norm=1\.0 .*set max_norm=None"):
        bind(Model(max_norm=1.0), LoraConfig(**FIELDS, **fields)).init()


def test_merging_under_a_largest_norm_is_refused():
    graft = bind(Model(max_norm=1.0), LoraConfig(**FIELDS))
    with pytest.raises(ValueError, match=r"embed: an Embedding with max_norm=1\.0 .*no fixed weight to merge into"):
        merge(graft, graft.init())
