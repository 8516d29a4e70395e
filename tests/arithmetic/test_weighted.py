"""`add_weighted_adapter` on a model, against PEFT's own: its numbers, and where PEFT's are wrong, right ones."""

import copy
import warnings

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import torchgraft.adapters as adapters
from torchgraft.adapters import (
    IA3Config,
    LoraConfig,
    active_adapters,
    add_weighted_adapter,
    extract_params,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_adapter,
    save_adapter,
    set_adapter,
    set_peft_model_state_dict,
)

SVDS = ["svd", "ties_svd", "dare_ties_svd", "dare_linear_svd", "magnitude_prune_svd"]
FACTORS = ["linear", "ties", "dare_ties", "dare_linear", "magnitude_prune"]
X = torch.tensor([[1, 2, 0], [4, 0, 3]])


class Net(nn.Module):
    """Layers in the order of their names, which is that of a tree, so that random numbers are drawn alike."""

    def __init__(self):
        super().__init__()
        self.a_table = nn.Embedding(5, 6)
        self.b_up, self.c_down = nn.Linear(6, 8), Conv1D(6, 8)
        self.d_grid, self.e_point = nn.Conv2d(3, 4, 2), nn.Conv2d(4, 6, 1)

    def forward(self, x):
        hidden = self.c_down(self.b_up(self.a_table(x)).tanh())
        return self.e_point(self.d_grid(hidden.unflatten(-1, (2, 3)))).mean((2, 3))


TARGETS = ["a_table", "b_up", "c_down", "d_grid", "e_point"]


def fields(**given):
    return {"r": 2, "lora_alpha": 3, "target_modules": TARGETS, **given}


def pair(cls, theirs_cls, *configs, net=Net):
    """The same adapters, with random leaves, in a model of ours and in one of PEFT's."""
    base = net()
    ours, theirs = copy.deepcopy(base), copy.deepcopy(base)
    for i, config in enumerate(configs):
        name = f"adapter{i}"
        inject_adapter_in_model(cls(**config), ours, name)
        state = {key: torch.randn_like(t) for key, t in get_peft_model_state_dict(ours, adapter_name=name).items()}
        set_peft_model_state_dict(ours, state, name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, about Conv1D
            if i == 0:
                theirs = peft.get_peft_model(theirs, theirs_cls(**config), name)
            else:
                theirs.add_adapter(name, theirs_cls(**config))
        peft.set_peft_model_state_dict(theirs, {f"base_model.model.{k}": t for k, t in state.items()}, name)
    return ours, theirs


def loras(*configs, net=Net):
    return pair(LoraConfig, peft.LoraConfig, *configs, net=net)


def add_both(ours, theirs, *args, **kwargs):
    torch.manual_seed(5)
    add_weighted_adapter(ours, *args, **kwargs)
    inject = type(theirs.base_model).inject_adapter

    def seeded(*given, **named):
        inject(*given, **named)
        torch.manual_seed(5)  # PEFT draws a new adapter first

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(type(theirs.base_model), "inject_adapter", seeded)
        theirs.add_weighted_adapter(*args, **kwargs)
    set_adapter(ours, args[2])
    theirs.set_adapter(args[2])


def changes(model, name):
    """What each layer's adapter changes of its weight."""
    found = {}
    for path, module in model.named_modules():
        if hasattr(module, "get_delta_weight") and hasattr(module, "lora_A"):
            found[path.removeprefix("base_model.model.")] = module.get_delta_weight(name)
    return found


def assert_same_changes(ours, theirs, name, but=()):
    left, right = changes(ours, name), changes(theirs, name)
    assert left.keys() == right.keys() and left
    for path in left.keys() - set(but):
        torch.testing.assert_close(left[path], right[path], atol=2e-5, rtol=1e-4, msg=lambda m, p=path: f"{p}: {m}")


@pytest.mark.parametrize("sign", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.3, 0.7])
@pytest.mark.parametrize("how", ["cat", *SVDS, *FACTORS])
def test_the_numbers_are_pefts(how, density, sign):
    if "ties" not in how and sign == "frequency":
        return
    ours, theirs = loras(fields(), fields(lora_alpha=5), fields(lora_alpha=2))
    options = {} if how in ("cat", "svd", "linear") else {"density": density, "majority_sign_method": sign}
    add_both(ours, theirs, ["adapter0", "adapter1", "adapter2"], [0.7, 1.2, 0.4], "sum", how, **options)
    # PEFT has the changes of these transposed, so that random entries are others.
    drawn = ("a_table", "c_down") if how.startswith("dare") and how.endswith("svd") else ()
    assert_same_changes(ours, theirs, "sum", drawn)
    if not drawn:
        torch.testing.assert_close(ours(X), theirs(X), atol=1e-3, rtol=1e-3)
    assert ours.peft_config["sum"].r == theirs.peft_config["sum"].r
    if how in FACTORS or how == "cat":
        state, expected = (
            get_peft_model_state_dict(ours, adapter_name="sum"),
            peft.get_peft_model_state_dict(theirs, adapter_name="sum"),
        )
        for key, tensor in state.items():
            torch.testing.assert_close(tensor, expected[f"base_model.model.{key}"])


@pytest.mark.parametrize("how", ["cat", "svd", "linear", "dare_linear", "magnitude_prune_svd"])
def test_negative_weights_are_pefts_where_no_sign_is_elected(how):
    ours, theirs = loras(fields(), fields(lora_alpha=5))
    options = {} if how in ("cat", "svd", "linear") else {"density": 0.5}
    add_both(ours, theirs, ["adapter0", "adapter1"], [0.7, -1.2], "sum", how, **options)
    assert_same_changes(ours, theirs, "sum")


@pytest.mark.parametrize("options", [{"svd_rank": 1}, {"svd_rank": 3, "svd_full_matrices": False}])
def test_options_of_the_decomposition_are_pefts(options):
    ours, theirs = loras(fields(), fields(r=4))
    add_both(ours, theirs, ["adapter0", "adapter1"], [0.7, 1.2], "sum", "svd", **options)
    assert_same_changes(ours, theirs, "sum")


@pytest.mark.parametrize("how", ["cat", "svd"])
def test_other_ranks_patterns_and_modules_give_pefts_outputs(how):
    one = fields(rank_pattern={"b_up": 4}, alpha_pattern={"c_down": 7})
    ours, theirs = loras(one, fields(r=3, target_modules=TARGETS[:3]))
    options = {"svd_rank": 4} if how == "svd" else {}
    add_both(ours, theirs, ["adapter0", "adapter1"], [0.5, -1.5], "sum", how, **options)
    torch.testing.assert_close(ours(X), theirs(X), atol=1e-3, rtol=1e-3)


def test_ia3_is_pefts_where_weights_add_up_to_one():
    configs = [{"target_modules": ["b_up", "c_down"], "feedforward_modules": ["c_down"]}] * 2
    ours, theirs = pair(IA3Config, peft.IA3Config, *configs)
    add_weighted_adapter(ours, ["adapter0", "adapter1"], [0.3, 0.7], "sum")
    theirs.add_weighted_adapter(["adapter0", "adapter1"], [0.3, 0.7], "sum")
    set_adapter(ours, "sum"), theirs.set_adapter("sum")
    torch.testing.assert_close(ours(X), theirs(X))


def test_a_rank_beyond_a_layers_is_the_exact_sum_where_pefts_fails():
    ours, theirs = loras(fields(r=4, target_modules=["b_up"]), fields(r=4, target_modules=["b_up"]))
    add_weighted_adapter(ours, ["adapter0", "adapter1"], [0.7, -1.2], "sum", svd_rank=7)
    assert_exact(ours, [0.7, -1.2])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        theirs.add_weighted_adapter(["adapter0", "adapter1"], [0.7, -1.2], "sum", svd_rank=7)


def test_clamping_does_not_depend_on_the_signs_of_singular_vectors_where_pefts_does():
    model, _ = loras(fields(target_modules=["b_up"]))
    add_weighted_adapter(model, ["adapter0"], [1.0], "free", "svd")
    add_weighted_adapter(model, ["adapter0"], [1.0], "one", "svd", svd_clamp=0.9)
    add_weighted_adapter(model, ["adapter0"], [-1.0], "other", "svd", svd_clamp=0.9)
    free, one, other = (extract_params(model, name)["b_up"] for name in ("free", "one", "other"))
    entries = torch.cat([leaf.flatten() for leaf in free.values()])
    limit = torch.quantile(torch.cat([entries, -entries]), 0.9)
    for leaf in free:
        torch.testing.assert_close(one[leaf], free[leaf].clamp(-limit, limit))
        torch.testing.assert_close(one[leaf].abs(), other[leaf].abs())


# -- what is otherwise than in PEFT --------------------------------------------------------------------------------


def exact(ours, weights):
    """The sum of what the adapters change, by layer."""
    each = [changes(ours, f"adapter{i}") for i in range(len(weights))]
    return {path: sum(w * one[path] for one, w in zip(each, weights, strict=True)) for path in each[0]}


def assert_exact(ours, weights):
    expected = exact(ours, weights)
    found = changes(ours, "sum")
    for path in expected:
        torch.testing.assert_close(found[path], expected[path], atol=1e-5, rtol=1e-4)


def test_rank_stabilised_scaling_counts_once_where_peft_scales_the_sum_again():
    ours, theirs = loras(fields(use_rslora=True), fields(use_rslora=True))
    add_both(ours, theirs, ["adapter0", "adapter1"], [0.7, 1.2], "sum", "cat")
    assert_exact(ours, [0.7, 1.2])
    wrong, right = changes(theirs, "sum"), exact(ours, [0.7, 1.2])
    torch.testing.assert_close(wrong["b_up"], right["b_up"] * 2, atol=1e-5, rtol=1e-4)  # 4 / sqrt(4)


def test_a_negated_adapter_votes_as_such_where_peft_elects_the_sign_it_had():
    ours, theirs = loras(fields(), fields())
    state = get_peft_model_state_dict(ours, adapter_name="adapter0")
    set_peft_model_state_dict(ours, state, "adapter1")
    peft.set_peft_model_state_dict(theirs, {f"base_model.model.{k}": t for k, t in state.items()}, "adapter1")
    add_both(ours, theirs, ["adapter0", "adapter1"], [1.0, -0.5], "sum", "ties_svd", density=1.0, svd_rank=2)
    one, two = changes(ours, "adapter0")["b_up"], changes(ours, "sum")["b_up"]
    torch.testing.assert_close(two, torch.where(one > 0, one, one * -0.5).new_tensor(two.tolist()))
    votes = torch.stack([one, -one])
    elected = torch.where(votes.sum(0) >= 0, 1, -1)
    full = torch.where(votes.sign() == elected, votes * torch.tensor([1.0, 0.5]).view(2, 1, 1), 0).sum(0)
    assert not torch.allclose(full, changes(theirs, "sum")["b_up"])


def test_one_adapter_is_pruned_where_peft_does_not():
    ours, theirs = loras(fields(target_modules=["b_up"]))
    add_both(ours, theirs, ["adapter0"], [1.0], "sum", "magnitude_prune", density=0.5)
    assert (extract_params(ours, "sum")["b_up"]["lora_A"] == 0).float().mean() == 0.5
    assert (theirs.base_model.model.b_up.lora_A["sum"].weight == 0).float().mean() == 0


def test_a_bias_of_b_is_summed_where_peft_drops_it():
    ours, theirs = loras(*[fields(lora_bias=True, target_modules=["b_up"])] * 2)
    add_both(ours, theirs, ["adapter0", "adapter1"], [0.7, 1.2], "sum", "cat")
    biases = [extract_params(ours, f"adapter{i}")["b_up"]["lora_B_bias"] for i in range(2)]
    torch.testing.assert_close(
        extract_params(ours, "sum")["b_up"]["lora_B_bias"], 1.5 * (0.7 * biases[0] + 1.2 * biases[1])
    )
    assert theirs.base_model.model.b_up.lora_B["sum"].bias.abs().max() == 0


def test_ia3_adds_changes_where_peft_adds_vectors_the_base_among_them():
    configs = [{"target_modules": ["b_up"], "feedforward_modules": []}] * 2
    ours, theirs = pair(IA3Config, peft.IA3Config, *configs)
    add_weighted_adapter(ours, ["adapter0", "adapter1"], [1.0, 1.0], "sum")
    theirs.add_weighted_adapter(["adapter0", "adapter1"], [1.0, 1.0], "sum")
    first, second = (extract_params(ours, f"adapter{i}")["b_up"]["ia3_l"] for i in range(2))
    torch.testing.assert_close(extract_params(ours, "sum")["b_up"]["ia3_l"], first + second - 1)
    torch.testing.assert_close(theirs.base_model.model.b_up.ia3_l["sum"].data, first + second)


def test_dora_and_names_are_errors_where_peft_is_silent():
    ours, theirs = loras(fields(use_dora=True, target_modules=["b_up"]), fields(target_modules=["b_up"]))
    theirs.add_weighted_adapter(["adapter0", "adapter1"], [1.0, 1.0], "sum", "cat")
    before = get_peft_model_state_dict(ours, adapter_name="adapter0")
    with pytest.raises(ValueError, match=r"adapters\[0\] has use_dora.*to_lora"):
        add_weighted_adapter(ours, ["adapter0", "adapter1"], [1.0, 1.0], "sum", "cat")
    theirs.add_weighted_adapter(["adapter1"], [7.0], "adapter0", "cat")  # does nothing
    with pytest.raises(ValueError, match="adapter_name is 'adapter0', which the model has already"):
        add_weighted_adapter(ours, ["adapter1"], [7.0], "adapter0", "cat")
    with pytest.raises(ValueError, match="adapters has 'other'; the model has"):
        add_weighted_adapter(ours, ["other"], [7.0], "sum", "cat")
    with pytest.raises(TypeError, match="adapters is 'adapter1', expected a list of names"):
        add_weighted_adapter(ours, "adapter1", [7.0], "sum", "cat")
    assert adapters.adapter_names(ours) == ["adapter0", "adapter1"]
    after = get_peft_model_state_dict(ours, adapter_name="adapter0")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_written_scalings_count_and_pissa_is_made_plain():
    model = Net()
    base = copy.deepcopy(model)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["b_up"], init_lora_weights="pissa"), model, "pissa")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["b_up"]), model, "plain")
    for name in ("pissa", "plain"):
        for leaf in extract_params(model, name)["b_up"].values():
            with torch.no_grad():
                leaf.add_(0.1 * torch.randn_like(leaf))
    model.b_up.scaling["plain"] = 0.25
    add_weighted_adapter(model, ["pissa", "plain"], [1.0, 2.0], "sum", "cat")
    x, found = torch.randn(3, 6), {}
    for name in ("pissa", "plain", "sum"):
        set_adapter(model, name)
        found[name] = model.b_up(x) - base.b_up(x)
    torch.testing.assert_close(found["sum"], found["pissa"] + 2 * found["plain"], atol=1e-5, rtol=1e-4)


# -- what it leaves ------------------------------------------------------------------------------------------------


def test_the_new_adapter_is_frozen_and_rests_and_is_a_file_that_peft_reads(tmp_path):
    ours, _ = loras(fields(), fields(r=3, target_modules=TARGETS[:2]))
    before = ours(X)
    add_weighted_adapter(ours, ["adapter0", "adapter1"], [0.5, -1.0], "sum", "cat")
    assert active_adapters(ours) == ["adapter1"] and torch.equal(ours(X), before)
    own = [p for name, p in ours.named_parameters() if ".sum" in name]
    assert own and not any(p.requires_grad or p.grad_fn for p in own)
    set_adapter(ours, "sum")
    save_adapter(ours, tmp_path, "sum")
    base = adapters.unload(copy.deepcopy(ours))
    again = copy.deepcopy(base)
    load_adapter(again, tmp_path / "sum")
    torch.testing.assert_close(again(X), ours(X))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, about Conv1D
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "sum")
    torch.testing.assert_close(theirs(X), ours(X), atol=1e-5, rtol=1e-5)


def test_names_are_whole_ones_though_another_module_ends_alike():
    model = nn.ModuleDict({"up": nn.Linear(3, 3), "down": nn.Linear(3, 3), "x": nn.ModuleDict({"up": nn.Linear(3, 3)})})
    for name, target in (("one", "^up$"), ("two", "down")):
        pattern = "up" if name == "one" else "down"
        inject_adapter_in_model(LoraConfig(r=1, target_modules=pattern), model, name)
        del target
    add_weighted_adapter(model, ["one", "two"], [1.0, 1.0], "sum", "cat")
    assert sorted(extract_params(model, "sum")) == ["down", "up"]


def test_a_peft_model_has_it_too():
    model = get_peft_model(Net(), LoraConfig(**fields()), "one")
    model.add_adapter("two", LoraConfig(**fields(r=3)))
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "both", combination_type="cat")
    assert model.peft_config["both"].r == 5
