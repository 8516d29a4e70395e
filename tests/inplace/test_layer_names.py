"""Names of PEFT's on layers: the same program runs on its layers and on ours, with equal numbers."""

import copy
import operator

import pytest
import torch
from torch import nn

from torchgraft import adapters
from torchgraft.adapters import (
    LoraConfig,
    extract_graft,
    extract_params,
    inject_adapter_in_model,
    load_adapter,
    merge_adapter,
    save_adapter,
    unmerge_adapter,
)

from .models import KINDS, SIZES, both, inject, inputs, layers, net, randomise

pytestmark = pytest.mark.filterwarnings("ignore:.*(fan_in_fan_out|weight_decomposition|have no effect)")
SCALED = ("LORA", "LOHA", "LOKR")
STEPS = [
    operator.methodcaller("set_scale", "default", 0.3),
    operator.methodcaller("scale_layer", 2.5),
    operator.methodcaller("unscale_layer", 2),
    operator.methodcaller("set_scale", "nobody", 9),
    operator.methodcaller("unscale_layer"),
]


def pairs():
    supported = {"LORA": KINDS, "IA3": (*KINDS[:3], "conv2d"), "ADALORA": (*KINDS[:3], "conv2d")}
    supported |= {"LOHA": ("linear", "conv1d", "conv2d"), "OFT": ("linear", "conv2d"), "HIRA": KINDS}
    return [(method, kind) for method in SIZES for kind in supported.get(method, ("linear",))]


@pytest.mark.parametrize(("method", "kind"), pairs())
def test_names_and_sizes_are_pefts(method, kind):
    ours, theirs = (layers(model)[0] for model in both(method, kind))
    for name in ("in_features", "out_features", "active_adapters", "merged", "disable_adapters", "_disable_adapters"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours._get_name() == f"{method.lower()}.{type(theirs).__name__}"
    assert repr(ours).splitlines()[1] == next(line for line in repr(theirs).splitlines() if "base_layer" in line)
    assert set(theirs.adapter_layer_names) - set(ours.adapter_layer_names) <= {
        *(name for name in theirs.adapter_layer_names if not len(getattr(theirs, name))),
        "delora_w_norm",
    }
    lacking = {"rank_dropout_scale", "boft_dropout", "oft_dropout", "delora_w_norm", "shira_indices", "waveft_indices"}
    lacking |= {"deft_init_scale", "deft_decomposition", "deft_para", "_cached_merge_factor", "act_fn", "res_num"}
    lacking |= {"adamss_newB", *(f"exp_avg_{what}_{leaf}" for what in ("ipt", "unc") for leaf in "AB")}
    lacking |= {name for name in theirs.other_param_names if name.startswith("_osf_")}
    assert set(theirs.other_param_names) - set(ours.other_param_names) <= lacking | {"input_fns", "output_fns"}
    for name in set(theirs.other_param_names) & set(ours.other_param_names):
        assert list(getattr(ours, name)) == list(getattr(theirs, name)) == ["default"]
    assert ours._all_available_adapter_names() == theirs._all_available_adapter_names() == ["default"]
    assert ours._get_available_adapters() == theirs._get_available_adapters() == {"default"}
    assert torch.equal(ours.get_base_weight(), theirs.get_base_weight())
    assert ours.get_base_layer() is ours.base_layer


@pytest.mark.parametrize("method", SCALED)
def test_scaling_is_pefts_step_by_step(method):
    pair, x = [randomise(model) for model in both(method)], inputs()
    for step in STEPS:
        for model in pair:
            for layer in layers(model):
                step(layer)
        torch.testing.assert_close(pair[0](x), pair[1](x), rtol=1e-6, atol=1e-8)
        assert layers(pair[0])[0].scaling["default"] == pytest.approx(layers(pair[1])[0].scaling["default"], rel=1e-6)


def test_the_factor_of_a_config_is_adaloras_own():
    layer = layers(inject(net(), "ADALORA", lora_alpha=6))[0]
    layer.set_scale("default", 0.5)
    assert layer.scaling["default"] == 3  # in PEFT 1, for it divides by the rank
    layer.unscale_layer()
    assert layer.scaling["default"] == 6


def test_shira_starts_from_one_and_an_embedding_is_scaled_too():
    layer = layers(inject(net(), "SHIRA"))[0]
    layer.set_scale("default", 0.5)
    layer.scale_layer(3)
    assert layer.scaling["default"] == 1.5
    model, x = randomise(inject(net("embedding"), "LORA")), inputs("embedding")
    base, y = model.first.base_layer(x), model.first(x)
    model.first.scale_layer(2)  # PEFT leaves it as it is
    torch.testing.assert_close(model.first(x) - base, 2 * (y - base))


def test_a_changed_factor_is_what_the_adapter_is_saved_with(tmp_path):
    model, x = randomise(inject(net(), "LORA")), inputs()
    for layer, scale in zip(layers(model), (0.5, 3), strict=True):
        layer.set_scale("default", scale)
    save_adapter(model, tmp_path)
    torch.testing.assert_close(load_adapter(net(), tmp_path)(x), model(x))
    torch.testing.assert_close(extract_graft(model)(extract_params(model), x), model(x))


def test_merged_weights_follow_the_factor_and_come_back_bit_for_bit():
    model, x = randomise(inject(net(), "LORA")), inputs()
    before = model.first.base_layer.weight.clone()
    expected = copy.deepcopy(model)
    merge_adapter(model)
    for one in (*layers(model), *layers(expected)):
        one.scale_layer(0.25)
    torch.testing.assert_close(model(x), expected(x))
    unmerge_adapter(model)
    assert torch.equal(model.first.base_layer.weight, before)
    torch.testing.assert_close(model(x), expected(x))


def test_two_adapters_and_one_that_is_not_active():
    model = inject(net(), "LORA")
    inject(model, "LORA", "other")
    layer = layers(model)[0]
    layer.scale_layer(2)
    assert layer.scaling["other"] == 2 * layer.scaling["default"]
    layer.set_adapter(["default", "other"])
    layer.unscale_layer()
    assert layer.scaling["other"] == layer.scaling["default"] == pytest.approx(8 / 3)


@pytest.mark.parametrize("method", ["IA3", "OFT", "VERA", "GRALORA"])
def test_a_method_without_a_factor_says_so(method):
    layer = layers(inject(net(), method))[0]
    for step in (layer.scale_layer, layer.unscale_layer, lambda scale: layer.set_scale("default", scale)):
        step(1)
        with pytest.raises(ValueError, match=rf"first: scale is 0.5 for adapter 'default', and {method} has no"):
            step(0.5)
    layer.unscale_layer()


def test_factors_that_are_none():
    layer = layers(inject(net(), "LORA"))[0]
    for scale, error in (("2", TypeError), (True, TypeError), (float("nan"), ValueError), (torch.ones(2), TypeError)):
        with pytest.raises(error, match="scale is .*, expected a .*number"):
            layer.scale_layer(scale)
    with pytest.raises(ValueError, match=r"scale is 0; call unscale_layer\(\)"):
        layer.unscale_layer(0)


def test_a_tensor_that_somebody_else_wrote_is_not_written_to():
    model, shared = inject(net(), "LORA"), torch.tensor(0.5)
    for layer in layers(model):
        layer.scaling["default"] = shared
    for layer in layers(model):
        layer.scale_layer(2)
    assert shared == 0.5 and {float(layer.scaling["default"]) for layer in layers(model)} == {1.0}


def test_an_adjustable_factor_stays_one_tensor_also_in_copies():
    model, x = randomise(inject(net(), "LORA")), inputs()
    expected = copy.deepcopy(model)
    for layer in layers(model):
        layer.make_adjustable("default")
    factor, twin = model.first.scaling["default"], copy.deepcopy(model)
    for one in (*layers(model), *layers(expected)):
        one.set_scale("default", 0.5)
    assert model.first.scaling["default"] is factor
    torch.testing.assert_close(model(x), expected(x))
    twin.first.set_scale("default", 4)
    assert twin.first.scaling["default"] is twin.first.adjustable["default"] is not factor
    torch.testing.assert_close(model(x), expected(x))
    merge_adapter(model)
    for one in (*layers(model), *layers(expected)):
        one.set_scale("default", 3)
    torch.testing.assert_close(model(x), expected(x), rtol=1e-6, atol=1e-6)


def test_an_adjustable_factor_follows_a_base_that_moves():
    model = inject(net(), "LORA")
    model.first.make_adjustable("default")
    before = model.first.scaling["default"]
    assert float(before) == 8 / 3  # to the bit, so that files say what they said
    model.first.base_layer.to("meta")  # stands for another device: forwards have a copy of the factor there
    model.first.set_scale("default", 3)
    assert model.first.scaling["default"] is model.first.adjustable["default"] is not before
    assert (float(model.first.scaling["default"]), float(before)) == (8, 8 / 3)


def test_the_base_weight_is_written_in_place_and_not_beneath_a_merge():
    model, x = randomise(inject(net(), "LORA")), inputs()
    layer = model.first
    layer.set_base_weight(torch.zeros(4, 8))
    assert not layer.base_layer.weight.any() and layer(x).any()
    with pytest.raises(ValueError, match=r"first: weight_data has shape \(8, 4\), expected \(4, 8\)"):
        layer.set_base_weight(torch.zeros(8, 4))
    layer.merge()
    with pytest.raises(RuntimeError, match=r"first: \['default'\] are merged into the weight; call unmerge\(\) first"):
        layer.set_base_weight(torch.zeros(4, 8))
    torch.testing.assert_close(layer.get_base_weight(), layer.get_delta_weight("default"))


def test_layers_of_parameters_and_attentions():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(6, 2), "table": nn.Linear(6, 4)})
    inject_adapter_in_model(LoraConfig(target_modules=["attention"], target_parameters=["table.weight"]), model)
    assert (model["attention"].in_features, model["attention"].out_features) == (6, 18)
    assert model["attention"]._get_name() == "lora.MultiheadAttention"
    assert repr(model["table"]).startswith("lora.ParamWrapper(\n  parameter_name='weight',")
    assert torch.equal(model["table"].get_base_weight(), model["table"].get_param())


def test_wrappers_of_saved_modules_and_of_tokens():
    import peft

    def program(lib):
        model = nn.ModuleDict({"embedding": nn.Embedding(6, 4), "linear": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
        fields = {"target_modules": ["linear"], "modules_to_save": ["head"]}
        config = lib.LoraConfig(**fields, trainable_token_indices={"embedding": [1, 3]})
        lib.inject_adapter_in_model(config, model)
        head, rows = model["head"], model["embedding"]
        found = [head.adapter_layer_names, head.other_param_names, head._adapters, head._get_available_adapters()]
        found += [sorted(head.adapter_state_dict("default", head.state_dict())), head.adapter_state_dict("no", {})]
        found += [sorted(rows.adapter_state_dict("default", rows.state_dict())), rows._adapters]
        found += [rows.adapter_layer_names, rows.token_adapter.adapter_layer_names, rows.active_adapters]
        found += [type(rows.original_module).__name__, type(rows.token_adapter.get_base_layer()).__name__]
        found += [tuple(rows.token_adapter.get_merged_weights(["default"]).shape), rows.disable_adapters]
        return [*found, rows.adapter_state_dict_load_map("default"), rows.adapter_state_dict_load_map("no")]

    ours, theirs = program(adapters), program(peft)
    theirs[-1] = {}  # PEFT names rows that are not there
    assert ours == theirs


def casting(module, storage, compute):
    """What diffusers' layerwise casting does to a module: another dtype between calls than within them."""
    module.to(storage)
    module.register_forward_pre_hook(lambda module, args: module.to(compute) and None)
    module.register_forward_hook(lambda module, args, output: module.to(storage) and None)


def test_inputs_are_not_cast_where_hooks_cast_weights():
    pair, x = [randomise(model) for model in both("LORA", dtype=torch.float32)], inputs(dtype=torch.float32)
    for model in pair:
        for layer in layers(model):
            casting(layer.lora_A["default"], torch.float8_e4m3fn, torch.float32)
            casting(layer.lora_B["default"], torch.float8_e4m3fn, torch.float32)
            layer.cast_input_dtype_enabled = False
    torch.testing.assert_close(pair[0](x), pair[1](x))
    pair[0].first.cast_input_dtype_enabled = True
    with pytest.raises(RuntimeError, match="same dtype"):
        pair[0](x)
