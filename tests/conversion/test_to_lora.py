"""Any method as a LoRA: exact, by merging in float64, where its change has the rank; the nearest, elsewhere."""

import math

import optree
import pytest
import torch
from torch import nn

from tests.contract.cases import KINDS, case
from tests.contract.methods import METHODS
from torchgraft.adapters import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    canonical,
    combine,
    extract_lora,
    shrink,
    to_lora,
)
from torchgraft.functional import UnsupportedConfig, bind, merge, route, stack

pairs = [(name, site) for name in METHODS for site in KINDS[name]]
OTHER_BIASES = [("lora with bias", "attention (kdim, vdim)")] + [
    (method, "linear (registered)")
    for method in ("adamss", "beft", "glora", "glora vectors", "ia3", "loreft", "road", "road 2", "road 4")
]


def filled(graft, seed=1):
    """Parameters of a graft with noise in them."""
    generator = torch.Generator().manual_seed(seed)
    return optree.tree_map(lambda t: t + 0.3 * torch.randn(t.shape, generator=generator, dtype=t.dtype), graft.init())


def merged_or_skip(graft, params):
    try:
        return merge(graft, params)
    except (ValueError, TypeError) as error:
        pytest.skip(f"has no merged weight: {error}")


@pytest.mark.parametrize(("name", "site"), pairs)
def test_each_method_on_each_kind_of_layer_is_the_same_lora(name, site):
    one = case(name, site)
    params = one.params
    expected = merged_or_skip(one.graft, {**params})
    if (name, site) in OTHER_BIASES:
        with pytest.raises(UnsupportedConfig, match="gets another bias from its adapters, .* names it otherwise"):
            to_lora(one.graft, params, biases="train")
        return
    config, lora, report = to_lora(one.graft, params, biases="train")
    actual = merge(bind(one.model, config), lora)
    assert actual.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(actual[key], expected[key].to(actual[key].dtype), rtol=1e-5, atol=1e-6, msg=key)
    assert report.relative < 1e-6


def test_the_error_is_that_of_the_nearest_and_is_measured():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 8)).double()
    graft = bind(model, OFTConfig(oft_block_size=2, target_modules=["0", "1"]))
    params = filled(graft)
    config, lora, report = to_lora(graft, params, 3)
    before, after = merge(graft, params), merge(bind(model, config), lora)
    for path, error in report.modules.items():
        change = before[f"{path}.weight"].detach() - model.state_dict()[f"{path}.weight"]
        s = torch.linalg.svdvals(change)
        assert error.rank == 3 and error.norm == pytest.approx(float(s.norm()))
        assert error.error == pytest.approx(float(s[3:].norm()))
        assert float((after[f"{path}.weight"] - before[f"{path}.weight"]).detach().norm()) == pytest.approx(error.error)
    config, _, report = to_lora(graft, params, energy=0.9)
    assert report.relative**2 <= 0.1 and set(config.rank_pattern.values()) | {config.r} != {1}
    assert str(report).splitlines()[0].split() == ["module", "rank", "norm", "relative", "error"]


@pytest.mark.parametrize("both", [LoraConfig, LoHaConfig])
def test_several_adapters_become_one_that_does_what_they_do_together(both):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 8)).double()
    configs = {"a": LoraConfig(r=2, lora_alpha=5, target_modules=["0"]), "b": both(r=1, target_modules=["0", "1"])}
    graft = bind(model, configs)
    params = filled(graft)
    x = torch.randn(5, 12, dtype=torch.float64)
    config, lora, report = to_lora(graft, params)
    assert report.relative < 1e-12 and sorted(lora) == ["0", "1"]
    torch.testing.assert_close(bind(model, config)(lora, x), graft(params, x))
    config, lora, _ = to_lora(graft, {"b": params["b"]})
    torch.testing.assert_close(bind(model, config)(lora, x), graft({"b": params["b"]}, x))
    with pytest.raises(ValueError, match=r"params has none of the graft's adapters, \['a', 'b'\]"):
        to_lora(graft, {})


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_lora_that_started_from_the_weight(start):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10)).double()
    graft = bind(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=start))
    params = filled(graft)
    config, lora, _ = to_lora(graft, params)
    torch.testing.assert_close(merge(bind(model, config), lora)["0.weight"], merge(graft, params)["0.weight"])
    assert config.r == 4 and config.init_lora_weights is True


def test_biases_are_refused_or_trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4, bias=False), nn.Linear(4, 3)).double()
    config = IA3Config(target_modules=["0", "1", "2"], feedforward_modules=["2"])
    graft = bind(model, config)
    params = filled(graft)
    with pytest.raises(UnsupportedConfig, match="0 has a bias that its adapters change.*pass biases='train'"):
        to_lora(graft, params)
    lora_config, lora, _ = to_lora(graft, params, biases="train")
    assert lora_config.bias == "lora_only" and "bias" in lora["2"] and "bias" not in lora["1"]
    x = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(bind(model, lora_config)(lora, x), graft(params, x))


def test_what_is_trained_as_a_whole_stays():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()
    graft = bind(model, LoHaConfig(r=2, target_modules=["0"], modules_to_save=["1"], bias="all"))
    params = filled(graft)
    config, lora, _ = to_lora(graft, params)
    assert config.modules_to_save == ["1"] and config.bias == "all"
    x = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(bind(model, config)(lora, x), graft(params, x))
    both = bind(
        model,
        {"a": LoHaConfig(r=2, target_modules=["0"], modules_to_save=["1"]), "b": LoraConfig(target_modules=["0"])},
    )
    with pytest.raises(UnsupportedConfig, match=r"adapter 'a' trains tensors of 1 as a whole.*one by one"):
        to_lora(both, filled(both))


def test_half_precision_and_a_dtype():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32)).bfloat16()
    graft = bind(model, LoHaConfig(r=2, target_modules=["0"]))
    config, lora, report = to_lora(graft, filled(graft))
    assert config.r == 4 and lora["0"]["lora_A"].dtype == torch.float32 and report.relative < 1e-6
    _, lora, report = to_lora(graft, filled(graft), dtype=torch.bfloat16)
    assert lora["0"]["lora_A"].dtype == torch.bfloat16 and 1e-4 < report.relative < 2e-2


def test_errors():
    model = nn.Sequential(nn.Linear(4, 4))
    graft = bind(model, LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(TypeError, match=r"graft is of type Sequential.*convert_to_lora\(model, rank\)"):
        to_lora(model, {})
    with pytest.raises(ValueError, match=r"biases is 'drop', expected one of \('refuse', 'train'\)"):
        to_lora(graft, graft.init(), biases="drop")
    many = stack([graft.init(), graft.init()])
    with pytest.raises(TypeError, match=r"to_lora: got a routed stack.*to_lora\(graft, unstack\(many\)\[i\]\)"):
        to_lora(graft, route(many, torch.tensor([0, 1])))
    meta = bind(model.to("meta"), LoHaConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="0: the base's weight is on the meta device, without values"):
        to_lora(meta, meta.init(device="cpu"))


def test_values_that_are_not_finite_are_an_error_that_names_the_module():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    plain = LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False)
    for config in (plain, LoHaConfig(r=2, target_modules=["0", "1"], init_weights=False)):
        graft = bind(model, config)
        params = graft.init()
        params["1"] = {leaf: torch.full_like(tensor, float("nan")) for leaf, tensor in params["1"].items()}
        with pytest.raises(ValueError, match=r"\b1(:| has) .*values that are not finite.*check"):
            to_lora(graft, params, rank=2)
    params = bind(model, plain).init()
    params["1"]["lora_A"] = params["1"]["lora_A"] * math.inf
    for call in (lambda: shrink(plain, params, 1), lambda: canonical(plain, params)):
        with pytest.raises(ValueError, match=": 1 has factors with values that are not finite; check its leaves"):
            call()
    with pytest.raises(ValueError, match="combine: 1 has no singular values; check its leaves and the weights"):
        combine([(plain, params)] * 2, [1, 1], "svd", rank=1)
    state = model.state_dict()
    with pytest.raises(ValueError, match="1: the change of its weight has values that are not finite"):
        extract_lora(state, {**state, "1.weight": state["1.weight"] * math.nan}, 2)
