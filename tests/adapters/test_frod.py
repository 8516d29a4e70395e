"""FRoD against its equation and against PEFT: bases of roles, places of entries, files with another basis."""

import copy

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from torchgraft.adapters import (
    FrodConfig,
    extract_graft,
    extract_params,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_adapter,
    merge_adapter,
    save_adapter,
    set_peft_model_state_dict,
)
from torchgraft.functional import bind, functional_call, merge, stack

FIELDS = {"target_modules": ["up", "down"], "sparse_rate": 0.1, "progressbar": False}
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    def __init__(self, wide, linear):
        super().__init__()
        self.up, self.down = linear(6, wide), linear(wide, 6)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    """Three layers of two roles: all weights of a role have more rows than columns together, or fewer."""

    def __init__(self, wide=10, linear=nn.Linear):
        super().__init__()
        self.layers = nn.ModuleList(Block(wide, linear) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def net(wide=10, linear=nn.Linear):
    torch.manual_seed(0)
    model = Model(wide, linear)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def theirs(model, seed=3, **fields):
    torch.manual_seed(seed)
    config = peft.FrodConfig(**{**FIELDS, **fields})
    return peft.get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=False).eval()


def moved(tree, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        path: {leaf: t + 0.3 * torch.randn(t.shape, generator=generator) for leaf, t in leaves.items()}
        for path, leaves in tree.items()
    }


def adapted(weight, v, places, leaves):
    """`W + U (S + diag(l - l0)) V^T` in float64, entry by entry, with `W V^-T = U diag(l0)`."""
    weight, v = weight.double(), v.double()
    turned = weight @ torch.linalg.inv(v).T
    start = turned.norm(dim=0)
    middle = torch.diag(leaves["frod_lambda_l"].double() - start)
    for value, row, column in zip(leaves["frod_lambda_s_values"], *places.tolist(), strict=True):
        middle[row, column] = value
    return weight + turned / start @ middle @ v.T


def close(given, wanted):
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4)  # bases are in single precision


@pytest.mark.parametrize("linear", [nn.Linear, lambda n, out: Conv1D(out, n)], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("wide", [4, 10, 30])
def test_bases_outputs_and_files_of_several_layers_are_pefts(tmp_path, wide, linear):
    model = net(wide, linear)
    other = theirs(model, init_weights=False, fan_in_fan_out=linear is not nn.Linear)
    other.save_pretrained(tmp_path / "theirs")
    mine = load_adapter(copy.deepcopy(model), tmp_path / "theirs")
    close(mine(X), other(X))
    save_adapter(mine, tmp_path / "mine")
    files = [load_file(tmp_path / whose / "adapter_model.safetensors") for whose in ("mine", "theirs")]
    assert {key: t.shape for key, t in files[0].items()} == {key: t.shape for key, t in files[1].items()}
    assert sorted(key for key in files[0] if "_V" in key) == ["base_model.frod_V.down", "base_model.frod_V.up"]
    close(*files)
    torch.manual_seed(3)
    close(bind(model, FrodConfig(init_weights=False, **FIELDS)).init(), extract_params(mine))


def test_layers_of_a_role_have_one_basis_and_each_its_own_other_one():
    sites = bind(net(), FrodConfig(**FIELDS)).sites[""]
    first, second = (sites[f"layers.{i}.up"].constants for i in (0, 1))
    assert first.frod_V is second.frod_V and first.frod_s_indices is second.frod_s_indices
    assert not torch.equal(first.frod_U, second.frod_U)
    assert sites["layers.0.down"].constants.frod_V.shape == (10, 10)


def test_merged_weights_are_the_equations():
    model = net()
    graft = bind(model, FrodConfig(**FIELDS))
    params = moved(graft.init())
    state = merge(graft, params)
    for path, site in graft.sites[""].items():
        constants = site.constants
        weight = adapted(
            model.get_submodule(path).weight.detach(), constants.frod_V, constants.frod_s_indices, params[path]
        )
        close(state[f"{path}.weight"].double(), weight)


def test_a_file_with_another_basis_has_the_other_basis_that_belongs_to_it(tmp_path):
    model = net()
    graft = bind(model, FrodConfig(**FIELDS))
    params = moved(graft.init())
    save_adapter(graft, tmp_path, params=params)
    file = tmp_path / "adapter_model.safetensors"
    state = load_file(file)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(2)))[0]
    basis = state["base_model.frod_V.up"] = state["base_model.frod_V.up"] @ turn
    save_file(state, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"base_model\.frod_V\.up' is not what this graft has made of its seed or of"):
        load_adapter(graft, tmp_path)
    loaded = load_adapter(copy.deepcopy(model), tmp_path)
    set_later = inject_adapter_in_model(FrodConfig(**FIELDS), copy.deepcopy(model))
    assert set_peft_model_state_dict(set_later, state) == ([], [])
    for one in (loaded, set_later):
        close(extract_graft(one)(extract_params(one), X), one(X))
        assert torch.equal(get_peft_model_state_dict(one)["base_model.frod_V.up"], basis)
        merge_adapter(one)
        for path in ("layers.0.up", "layers.2.up"):
            places = graft.sites[""][path].constants.frod_s_indices
            wanted = adapted(model.get_submodule(path).weight.detach(), basis, places, params[path])
            close(one.get_submodule(path).get_base_layer().weight.double(), wanted)
        close(one.layers[1].down.get_base_layer().weight, merge(graft, params)["layers.1.down.weight"])


def test_without_bases_in_the_file_they_are_made_of_the_model(tmp_path):
    model = net()
    graft = bind(model, FrodConfig(save_projection=False, **FIELDS))
    params = moved(graft.init())
    save_adapter(graft, tmp_path, params=params)
    assert not any("base_model.frod" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    close(load_adapter(copy.deepcopy(model), tmp_path)(X), graft(params, X))
    close(peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)(X), graft(params, X))


@pytest.mark.parametrize(("rate", "entries"), [(0.0, 0), (1e-9, 1), (1.0, 30)])
def test_the_number_of_entries_is_pefts(rate, entries):
    model = net()
    graft = bind(model, FrodConfig(**{**FIELDS, "sparse_rate": rate}))
    params = graft.init()
    assert params["layers.0.up"]["frod_lambda_s_values"].shape == (entries,)
    assert torch.equal(graft(params, X), model(X))
    places = graft.sites[""]["layers.0.up"].constants.frod_s_indices
    assert torch.equal(places, theirs(model, sparse_rate=rate).base_model.frod_s_indices["up"]["default"])


def test_a_stack_of_different_seeds_and_dropout():
    model = net()
    configs = [FrodConfig(projection_prng_key=seed, **FIELDS) for seed in (0, 4)]
    grafts = [bind(model, config) for config in configs]
    trees = [moved(graft.init(), seed) for seed, graft in enumerate(grafts)]
    several = bind(model, configs)
    given = torch.vmap(lambda i, params: several.at(i)(params, X))(torch.arange(2), stack(trees))
    close(given, torch.stack([graft(tree, X) for graft, tree in zip(grafts, trees, strict=True)]))
    dropping = bind(model.train(), FrodConfig(frod_dropout=0.5, **FIELDS))
    assert not torch.equal(dropping(trees[0], X), dropping(trees[0], X))
    close(dropping.in_mode(training=False)(trees[0], X), grafts[0](trees[0], X))


def test_modules_of_one_role_and_different_sizes_are_an_error_and_so_is_a_weight_without_values():
    model = nn.ModuleDict({"0": nn.ModuleDict({"q": nn.Linear(4, 4)}), "1": nn.ModuleDict({"q": nn.Linear(6, 4)})})
    words = "0.q has 4 inputs and 1.q has 6, and by their names they share the basis 'q'; leave one of them out"
    with pytest.raises(ValueError, match=words):
        bind(model, FrodConfig(target_modules=["q"]))
    graft = bind(nn.Sequential(nn.Linear(4, 4, device="meta")), FrodConfig(target_modules=["0"]))
    params = {"0": {"frod_lambda_l": torch.ones(4), "frod_lambda_s_values": torch.ones(1)}}
    with pytest.raises(ValueError, match="0: the weight was on the meta device when FRoD was to decompose it"):
        functional_call(graft, ({"0.weight": torch.ones(4, 4), "0.bias": torch.ones(4)}, params), (torch.ones(1, 4),))


def test_offloading_has_no_effect_and_says_so():
    with pytest.warns(UserWarning, match="runtime_offload_base_weight is True, which has no effect"):
        FrodConfig(runtime_offload_base_weight=True)
