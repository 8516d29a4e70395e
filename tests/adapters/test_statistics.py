"""Statistics from data, against PEFT's and their equations; the model stays what it was."""

import copy
import dataclasses
import importlib
import re
import sys
import types
import warnings

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora.eva import get_eva_state_dict
from peft.tuners.lora.loraga import preprocess_loraga
from peft.utils.incremental_pca import IncrementalPCA
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from torchgraft import adapters
from torchgraft.adapters import EvaConfig, LoraConfig, LoraGAConfig, fit_corda, fit_eva, fit_lora_ga
from torchgraft.adapters._calibration.initial.eva import Directions
from torchgraft.functional import bind, merge

from .test_initial import SITES, away, config, net

QUIET = {"progress": False}


def data(count=8, rows=64, seed=0):
    """Inputs with a spectrum, so that directions are distinct."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(12, 12, generator=generator) * torch.logspace(0.7, -0.7, 12)[:, None]
    return [torch.randn(rows, 12, generator=generator) @ mix + 0.3 for _ in range(count)]


def snapshot(model):
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    objects = [[id(x) for x in vars(module).values()] + [module.training] for module in model.modules()]
    return tensors, flags, objects


def assert_untouched(model, before):
    after = snapshot(model)
    assert all(torch.equal(before[0][key], value) for key, value in after[0].items())
    assert before[1:] == after[1:]
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


# -- EVA ---------------------------------------------------------------------------------------------------------------


def test_directions_are_those_of_all_rows_at_once():
    batches = data(20)
    directions = Directions(6, 0.99)
    for batch in batches:
        directions.update(batch)
    rows = torch.cat(batches).double()
    _, s, vh = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    assert (directions.components[:3].double() * vh[:3]).sum(1).abs().min() > 0.999
    torch.testing.assert_close(directions.ratio[:3].double(), s[:3].square() / s.square().sum(), rtol=0.01, atol=1e-3)


def test_directions_that_leave_none_out_are_exactly_those_of_all_rows():
    batches = data(5, 20)
    directions = Directions(12, 0.99)
    for batch in batches:
        directions.update(batch)
    rows = torch.cat(batches).double()
    _, s, vh = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    assert (1 - (directions.components.double() * vh).sum(1).abs()).max() < 1e-6
    torch.testing.assert_close(directions.values.double(), s, rtol=1e-5, atol=0)


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(8, 40), size=st.integers(6, 24), count=st.integers(1, 5), seed=st.integers(0, 99))
def test_directions_are_pefts_step_by_step(rows, size, count, seed):
    generator = torch.Generator().manual_seed(seed)
    theirs = IncrementalPCA(count, lowrank=True, lowrank_seed=42)  # as PEFT's EVA has it
    own = Directions(count, 0.99)
    for _ in range(4):
        batch = torch.randn(rows, size, generator=generator) * torch.linspace(0.3, 2, size)
        own.update(batch)
        theirs.partial_fit(batch)
        torch.testing.assert_close(own.components.double(), theirs.components_.double(), rtol=0, atol=1e-4)
        torch.testing.assert_close(own.ratio.double(), theirs.explained_variance_ratio_.double(), rtol=1e-4, atol=0)


def test_rows_wait_until_there_are_enough():
    whole, parts = Directions(4, 0.9), Directions(4, 0.9)
    rows = data(1, 8)[0]
    whole.update(rows)
    for row in rows[:3].split(1):
        parts.update(row)
    assert parts.components is None
    parts.update(rows[3:])
    torch.testing.assert_close(parts.components, whole.components)


@pytest.mark.parametrize("how", [{}, {"rho": 1.0}, {"whiten": True}, {"adjust_scaling_factors": False}], ids=str)
@pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage")
def test_eva_is_pefts(how):
    model, batches = net(), data()
    before = snapshot(model)
    fitted = fit_eva(model, config("eva", eva_config=how), batches, passes=50, **QUIET)
    assert_untouched(model, before)
    theirs = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=SITES, init_lora_weights="eva", eva_config=peft.EvaConfig(**how)
    )
    options = {"forward_fn": lambda m, x: m(x), "prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None}
    other = copy.deepcopy(model)
    expected = get_eva_state_dict(other, batches, theirs, show_progress_bar=False, **options)
    own = fitted.statistics.sites
    ranks = {path: len(own[path]["components"]) for path in own}
    assert ranks == {path: len(t) for path, t in expected.items() if len(t)}
    for path, one in own.items():
        torch.testing.assert_close(one["components"], expected[path], rtol=0, atol=1e-5, check_dtype=False)
    wrapped = peft.get_peft_model(other, theirs)
    peft.initialize_lora_eva_weights(wrapped, eva_state_dict=dict(copy.deepcopy(list(wrap(expected).items()))))
    planned = bind(model, fitted).sites[""]
    for path, site in planned.items():
        layer = wrapped.base_model.model.get_submodule(path)
        assert (site.constants.r, site.constants.scaling) == (layer.r["default"], layer.scaling["default"])


def wrap(expected):
    return {f"base_model.model.{path}": tensor for path, tensor in expected.items()}


def test_eva_starts_with_what_it_found():
    model, batches = net(), data()
    fitted = fit_eva(model, config("eva"), batches, passes=50, **QUIET)
    graft = bind(model, fitted)
    tree = graft.init()
    assert sum(len(leaves["lora_A"]) for leaves in tree.values()) == 8
    for path, leaves in tree.items():
        assert torch.equal(leaves["lora_A"], fitted.statistics.sites[path]["components"])
        assert not leaves["lora_B"].any()
    assert torch.equal(graft(tree, batches[0]), model(batches[0]))
    injected = adapters.inject_adapter_in_model(fitted, copy.deepcopy(model))
    assert torch.equal(injected.first.lora_A["default"].weight, tree["first"]["lora_A"])
    assert "statistics" not in fitted.to_dict()


def test_eva_files_need_no_statistics(tmp_path):
    model, x = net(), data()[0]
    graft = bind(model, fit_eva(model, config("eva"), data(), passes=50, **QUIET))
    tree = away(graft.init())
    adapters.save_adapter(graft, tmp_path, params=tree)
    torch.testing.assert_close(graft(adapters.load_adapter(graft, tmp_path), x), graft(tree, x))
    torch.testing.assert_close(adapters.load_adapter(net(), tmp_path)(x), graft(tree, x))
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path).eval()
    torch.testing.assert_close(theirs(x), graft(tree, x), rtol=1e-4, atol=1e-5)


def test_modules_without_rank_are_no_targets_any_more():
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(12))  # the second one's inputs vary in every direction alike
        model[0].weight[0] *= 100
    batches = [torch.randn(256, 12, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    given = LoraConfig(r=1, target_modules=["0", "1"], init_lora_weights="eva")
    fitted = fit_eva(model, given, batches, passes=50, **QUIET)
    graft = bind(model, fitted)
    assert list(graft.sites[""]) in (["1"], ["0", "1"]) and sum(s.constants.r for s in graft.sites[""].values()) == 2
    assert given.target_modules == {"0", "1"} and given.statistics is None


def test_what_eva_warns_of():
    with pytest.warns(RuntimeWarning, match="still changed by more than tau=1.0 allows; give more batches"):
        fit_eva(net(), config("eva", eva_config={"tau": 1.0}), data(2), **QUIET)
    with pytest.warns(RuntimeWarning, match="no batch had enough rows for 'first', 'second'"):
        fit_eva(net(), config("eva"), data(1, 3), **QUIET)


def llama():
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=2, **size)).eval()


def tokens(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(0, 50, (4, 12), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 8:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :2] = -100
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def test_eva_of_a_language_model_is_pefts():
    model, batches = llama(), tokens()
    fields = {"r": 3, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": "eva"}
    before = snapshot(model)
    fitted = fit_eva(model, LoraConfig(**fields), batches, passes=200, **QUIET)
    assert_untouched(model, before)
    theirs = peft.LoraConfig(**fields, eva_config=peft.EvaConfig())
    expected = get_eva_state_dict(copy.deepcopy(model), batches, theirs, show_progress_bar=False)
    own = {path: one["components"] for path, one in fitted.statistics.sites.items()}
    assert sum(map(len, own.values())) == sum(map(len, expected.values())) == 18
    for layer in range(2):  # q and v have one input, and their ties are broken as it happens
        paths = [f"model.layers.{layer}.{name}_proj" for name in ("self_attn.q", "self_attn.v", "mlp.down")]
        ranks = [[len(found.get(path, ())) for path in paths] for found in (own, expected)]
        assert sum(ranks[0][:2]) == sum(ranks[1][:2]) and ranks[0][2] == ranks[1][2]
        for path in paths:
            size = min(len(own.get(path, ())), len(expected[path]))
            if size:
                torch.testing.assert_close(own[path][:size], expected[path][:size].float(), rtol=1e-3, atol=1e-3)


# -- CorDA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("kind", ["linear", "transposed"])
def test_corda_is_pefts(mode, kind, monkeypatch):
    # PEFT's file takes its dataclass from attrs, which nothing else here needs.
    monkeypatch.setitem(sys.modules, "attr", types.SimpleNamespace(dataclass=dataclasses.dataclass))
    preprocess = importlib.import_module("peft.tuners.lora.corda").preprocess_corda
    model, batches = net(kind), data(3)
    before = snapshot(model)
    fitted = fit_corda(model, config("corda", corda_config={"corda_method": mode}), batches, **QUIET)
    assert_untouched(model, before)
    other = copy.deepcopy(model)
    theirs = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=SITES,
        init_lora_weights="corda",
        corda_config=peft.tuners.lora.config.CordaConfig(corda_method=mode),
        fan_in_fan_out=kind == "transposed",
    )
    preprocess(other, theirs, run_model=lambda: [other(x) for x in batches])
    other = peft.inject_adapter_in_model(theirs, other)
    graft = bind(model, fitted)
    tree = graft.init()
    for path in SITES:
        layer, leaves = other.get_submodule(path), tree[path]
        expected = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(leaves["lora_B"] @ leaves["lora_A"], expected, rtol=1e-3, atol=1e-3)
    x = torch.randn(5, 12)
    assert torch.equal(graft(tree, x), model(x))
    torch.testing.assert_close(graft(tree, x), other(x), rtol=1e-3, atol=1e-3)
    moved = away(tree)
    torch.testing.assert_close(bind(twin_of(model, graft, moved), config(True))(zero(tree), x), graft(moved, x))


def twin_of(model, graft, tree):
    twin = copy.deepcopy(model)
    twin.load_state_dict(merge(graft, tree))
    return twin


def zero(tree):
    return {path: {leaf: torch.zeros_like(t) for leaf, t in leaves.items()} for path, leaves in tree.items()}


def test_corda_says_what_is_wrong_with_data():
    with pytest.raises(ValueError, match="fit_corda: the covariance of the inputs of first is not finite"):
        fit_corda(net(), config("corda"), [torch.zeros(3, 12)], **QUIET)
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    given = LoraConfig(r=2, init_lora_weights="corda", target_modules=["used", "other"])
    with pytest.raises(ValueError, match="fit_corda: no batch reached 'other'"):
        fit_corda(model, given, [torch.randn(8, 4)], lambda model, x: model["used"](x), **QUIET)


# -- LoRA-GA -----------------------------------------------------------------------------------------------------------


def squares(model, batch):
    return model(batch).square().mean()


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr"])
def test_lora_ga_is_pefts(direction, scale):
    model, batches = net(), data(3)
    before = snapshot(model)
    how = {"direction": direction, "scale": scale}
    fitted = fit_lora_ga(model, config("lora_ga", lora_ga_config=how), batches, squares, **QUIET)
    assert_untouched(model, before)
    other = copy.deepcopy(model)
    own = peft.tuners.lora.config.LoraGAConfig(**how)
    theirs = peft.LoraConfig(r=4, lora_alpha=6, target_modules=SITES, init_lora_weights="lora_ga", lora_ga_config=own)
    preprocess_loraga(other, theirs, lambda: [squares(other, x).backward() for x in batches])
    for path in SITES:
        gradient = other.get_submodule(path)._peft_loraga_grad
        torch.testing.assert_close(fitted.statistics.sites[path]["gradient"], gradient, rtol=1e-5, atol=1e-6)
    other = peft.inject_adapter_in_model(theirs, other)
    graft = bind(model, fitted)
    tree = graft.init()
    for path in SITES:
        layer, leaves = other.get_submodule(path), tree[path]
        for leaf in ("lora_A", "lora_B"):
            expected = getattr(layer, leaf)["default"].weight
            size = float(expected.detach().abs().max())
            torch.testing.assert_close(leaves[leaf].abs(), expected.abs(), rtol=1e-2, atol=1e-3 * size)
    x = torch.randn(5, 12)
    assert torch.equal(graft(tree, x), model(x))


def test_lora_ga_with_random_directions_is_the_same_every_time():
    model = net()
    given = config("lora_ga", lora_ga_config=LoraGAConfig(direction="random"))
    fitted = fit_lora_ga(model, given, data(1), squares, **QUIET)
    first, second = (bind(model, fitted).init() for _ in range(2))
    assert all(torch.equal(first[p][n], second[p][n]) for p in first for n in first[p])


def test_lora_ga_of_a_language_model_takes_its_loss():
    model, batches = llama(), tokens(2)
    before = snapshot(model)
    given = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights="lora_ga")
    with torch.no_grad():
        fitted = fit_lora_ga(model, given, batches, **QUIET)
    assert_untouched(model, before)
    expected = copy.deepcopy(model)
    (sum(expected(**batch).loss for batch in batches) / 2).backward()
    for path, found in fitted.statistics.sites.items():
        torch.testing.assert_close(found["gradient"], expected.get_submodule(path).weight.grad, rtol=1e-4, atol=1e-6)
    graft = bind(model, fitted)
    assert torch.equal(graft(graft.init(), **batches[0]).logits, model(**batches[0]).logits)


def test_lora_ga_says_what_is_wrong():
    with pytest.raises(ValueError, match="the output of Net is no loss and has none; give batches with labels, or"):
        fit_lora_ga(net(), config("lora_ga"), data(1), **QUIET)
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    given = LoraConfig(r=2, init_lora_weights="lora_ga", target_modules=["used", "other"])
    with pytest.raises(ValueError, match="fit_lora_ga: no batch reached 'other'"):
        fit_lora_ga(model, given, [torch.randn(8, 4)], lambda model, x: model["used"](x).sum(), **QUIET)


# -- all of them -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fit", "name"), [(fit_eva, "eva"), (fit_corda, "corda"), (fit_lora_ga, "lora_ga")])
def test_what_all_refuse(fit, name):
    forward = squares if name == "lora_ga" else lambda model, x: model(x)
    with pytest.raises(ValueError, match=re.escape(f"fit_{name} takes a LoraConfig with init_lora_weights={name!r}")):
        fit(net(), LoraConfig(target_modules=SITES), data(1), forward, **QUIET)
    with pytest.raises(ValueError, match="batches is empty; give at least one batch"):
        fit(net(), config(name), [], forward, **QUIET)
    with pytest.raises(ValueError, match="is for linear modules, and 0 is of kind conv2d"):
        fit(nn.Sequential(nn.Conv2d(4, 4, 3)), config(name, r=2, target_modules=["0"]), [], forward, **QUIET)


def test_what_can_be_gone_through_once():
    assert fit_eva(net(), config("eva", eva_config={"tau": 0.0}), iter(data()), **QUIET).statistics is not None
    with pytest.raises(ValueError, match="which can be gone through once; give a list or a DataLoader"):
        fit_eva(net(), config("eva"), iter(data()), passes=2, **QUIET)


def test_an_error_in_a_forward_leaves_the_model_as_it_was():
    model = net()
    before = snapshot(model)

    def fail(model, x):
        model(x)
        raise RuntimeError("no")

    for fit, name in ((fit_eva, "eva"), (fit_corda, "corda"), (fit_lora_ga, "lora_ga")):
        with pytest.raises(RuntimeError, match="no"):
            fit(model, config(name), data(1), fail, **QUIET)
        assert_untouched(model, before)
    torch.testing.assert_close(model(data(1)[0]), net()(data(1)[0]))


def test_a_progress_bar_is_shown(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit_eva(net(), config("eva", eva_config=EvaConfig(tau=0.0)), data())
    assert "EVA" in capsys.readouterr().err
