"""Stacks in files: each adapter is what it is alone, also for PEFT."""

import optree
import peft
import pytest
import torch
from torch import nn

from torchgraft.adapters import AdaLoraConfig, IA3Config, LoraConfig, load_adapter, load_stack, save_adapter, save_stack
from torchgraft.functional import bind, route, stack

X = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def alike(a, b):
    return optree.tree_structure(a) == optree.tree_structure(b) and optree.tree_all(optree.tree_map(torch.equal, a, b))


@pytest.mark.parametrize(
    "configs",
    [
        [
            LoraConfig(r=r, lora_alpha=5, init_lora_weights=False, target_modules=targets, modules_to_save=["0"])
            for r, targets in ((1, ["2"]), (4, ["2"]))
        ],
        [
            LoraConfig(r=r, init_lora_weights=False, target_modules=targets)
            for r, targets in ((1, ["0", "2"]), (4, ["2"]))
        ],
        [AdaLoraConfig(init_r=r, init_lora_weights=False, target_modules=["0"]) for r in (1, 3)],
        [IA3Config(init_ia3_weights=False, target_modules=[target]) for target in ("0", "2")],
    ],
)
def test_saved_and_loaded_a_stack_is_the_same(configs, tmp_path):
    graft = bind(mlp(), configs, names=["poems", "code"])
    many = graft.init()
    folders = save_stack(graft, tmp_path, many)
    assert folders == {"poems": tmp_path / "poems", "code": tmp_path / "code"}
    for given in (folders, list(folders.values())):
        again, loaded = load_stack(mlp(), given)
        assert again.names == ("poems", "code") and alike(loaded, many)
        rows = torch.tensor([1, 0, -1, 1])
        assert torch.equal(again(route(loaded, rows), X), graft(route(many, rows), X))
    assert alike(load_adapter(graft.member("code"), tmp_path / "code"), graft.unstack(many)[1])


def test_a_stack_of_one_config_is_saved_by_place(tmp_path):
    graft = bind(mlp(), LoraConfig(r=2, init_lora_weights=False, target_modules=["0"]))
    trees = [graft.init(), graft.init()]
    again, loaded = load_stack(graft.model, save_stack(graft, tmp_path, stack(trees)))
    assert again.names == ("0", "1") and alike(loaded, stack(trees))


def test_pefts_files_are_a_stack(tmp_path):
    rows, expected = torch.tensor([1, 0, 0, -1]), {}
    for i, r in enumerate((1, 3)):
        model = peft.get_peft_model(mlp(), peft.LoraConfig(r=r, init_lora_weights=False, target_modules=["0", "2"]))
        model.save_pretrained(tmp_path / f"own-{i}")
        expected[i] = model(X)
    graft, many = load_stack(mlp(), [tmp_path / "own-0", tmp_path / "own-1"])
    y = graft(route(many, rows), X)
    alone = torch.stack([expected[i][row] if i >= 0 else graft.model(X)[row] for row, i in enumerate(rows.tolist())])
    torch.testing.assert_close(y, alone)


def test_what_is_no_stack_says_so(tmp_path):
    configs = {"a": LoraConfig(target_modules=["0"]), "b": IA3Config(target_modules=["0"])}
    named = bind(mlp(), configs)
    for name, config in configs.items():
        graft = bind(mlp(), config)
        save_adapter(graft, tmp_path / name, params=graft.init())
    with pytest.raises(TypeError, match=r"configs\[1\] is a IA3Config and configs\[0\] a LoraConfig"):
        load_stack(mlp(), [tmp_path / "a", tmp_path / "b"])
    with pytest.raises(TypeError, match=r"folders is '.*a', expected a list of directories"):
        load_stack(mlp(), tmp_path / "a")
    with pytest.raises(ValueError, match="got no directories"):
        load_stack(mlp(), [])
    with pytest.raises(ValueError, match="would both have the name 'a'; give {name: directory}"):
        load_stack(mlp(), [tmp_path / "a", tmp_path / "x" / "a"])
    with pytest.raises(FileNotFoundError, match="no such directory"):
        load_stack(mlp(), [tmp_path / "a", tmp_path / "c"])
    with pytest.raises(ValueError, match=r"adapters by name, \['a', 'b'\], which add up"):
        save_stack(named, tmp_path, stack([named.init()]))
    outside = bind(mlp(), [configs["a"]], names=["../a"])
    with pytest.raises(ValueError, match="expected a name without slashes"):
        save_stack(outside, tmp_path, outside.init())
