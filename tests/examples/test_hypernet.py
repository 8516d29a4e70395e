"""Adapters that a network emits, in a short run: gradients are those of each world, a run goes on where it was."""

import optree
import pytest
import torch
import torch.nn.functional as F

from torchgraft.adapters import LoraConfig
from torchgraft.functional import bind, unstack


@pytest.fixture(scope="module")
def hypernet(load_example):
    return load_example("hypernet")


@pytest.fixture(scope="module")
def recipes(load_example):
    return load_example("_recipes")


def test_a_network_emits_adapters_of_new_worlds(hypernet, folder, capsys):
    result = hypernet.main(["--quick", "--out", str(folder)])
    assert list(result["found"]) == list(hypernet.WAYS) and all(len(read) == 12 for read in result["found"].values())
    assert result["found"]["trained on all digits"] != result["found"]["the base"]
    assert 0 < result["seconds"]["emitted"] < result["seconds"]["trained on all digits"]
    assert result["picture"].read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(name in printed for name in hypernet.WAYS) and "numbers, emitted in" in printed
    with pytest.raises(SystemExit, match="has a hypernetwork with other settings: .*rank was 4 and is 2"):
        hypernet.main(["--quick", "--rank", "2", "--out", str(folder)])


def test_gradients_reach_the_network_through_each_worlds_adapter(hypernet, tiny):
    model, images, labels = tiny
    graft = bind(model, LoraConfig(r=2, target_modules=["qkv", "up"]))
    network = hypernet.Hypernetwork(graft.init(torch.Generator().manual_seed(0)), width=8).double()
    leaves = [*network.parameters()]
    adapters = network(images[:, :4], labels[:, :4])
    routed = hypernet.loss_of(hypernet.logits_of(graft, adapters, images[:, 4:]), labels[:, 4:])
    each = [
        F.cross_entropy(graft(adapter, x), t)
        for adapter, x, t in zip(
            unstack(network(images[:, :4], labels[:, :4])), images[:, 4:], labels[:, 4:], strict=True
        )
    ]
    expected = torch.autograd.grad(torch.stack(each).mean(), leaves)
    torch.testing.assert_close(torch.autograd.grad(routed, leaves), expected, rtol=1e-9, atol=1e-12)
    assert all(grad.abs().max() > 0 for grad in expected)


def test_it_begins_near_the_frozen_model(hypernet, tiny):
    model, images, labels = tiny
    graft = bind(model, LoraConfig(r=2, target_modules=["qkv", "up"]))
    like = graft.init(torch.Generator().manual_seed(0))
    network = hypernet.Hypernetwork(like).double()
    torch.nn.init.zeros_(network.emit.weight)
    for adapter in unstack(network(images, labels)):
        assert optree.tree_all(optree.tree_map(torch.equal, adapter, like))


def test_worlds_turn_mirror_and_invert(recipes):
    images = torch.rand(1, 5, 32, 32)
    for world, expected in [
        ([0.0, 0, 0], images[0]),
        ([90.0, 0, 0], images[0].rot90(-1, (-2, -1))),
        ([0.0, 1, 0], images[0].flip(-1)),
        ([180.0, 0, 1], 1 - images[0].rot90(2, (-2, -1))),
    ]:
        torch.testing.assert_close(recipes.seen_in(torch.tensor([world]), images)[0], expected, rtol=0, atol=1e-4)
    assert recipes.called(torch.tensor([70.0, 1, 0])) == "70°, mirrored"


def test_new_worlds_are_none_of_the_others(recipes):
    old, new = recipes.some_worlds(500, torch.Generator().manual_seed(0)), recipes.new_worlds()
    away = (old[:, None, 0] - new[None, :, 0]).remainder(360)
    assert torch.minimum(away, 360 - away).min() >= 10
    assert len(new.unique(dim=0)) == 12 and old[:, 1:].unique(dim=0).shape == (4, 2)
    assert recipes.turned_only(new)[:, 0].tolist() == [10, 70, 130, 190, 250, 310]


def test_minimising_goes_on_where_it_was(recipes, tmp_path):
    def run(leaf, file, stop=None):
        def loss(step):
            if step == stop:
                raise KeyboardInterrupt
            return (leaf - torch.randn(3, generator=torch.Generator().manual_seed(step))).square().sum()

        recipes.minimise(loss, [leaf], 220, 0.1, "a leaf", file)
        return leaf

    whole = run(torch.zeros(3), None)
    with pytest.raises(KeyboardInterrupt):
        run(torch.zeros(3), tmp_path / "leaf.safetensors", stop=210)
    parts = run(torch.zeros(3), tmp_path / "leaf.safetensors")
    assert torch.equal(parts, whole) and whole.abs().max() > 0.1
    assert torch.equal(run(torch.zeros(3), tmp_path / "leaf.safetensors", stop=0), whole)  # no step is left


def test_the_lines_of_its_page_run(run_page):
    there = run_page("hypernet")
    assert there["loss"].isfinite() and there["network"][-1].weight.abs().max() > 0
