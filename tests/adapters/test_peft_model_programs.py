"""Programs on PEFT's `PeftModel` and `PeftMixedModel`: each runs with PEFT and here, and has the same results."""

import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import torchgraft.adapters as ours

CONFIGS = {
    "LoraConfig": {"r": 2, "init_lora_weights": False},
    "IA3Config": {"feedforward_modules": ["down"], "init_ia3_weights": False},
    "OFTConfig": {"r": 0, "oft_block_size": 2, "init_weights": False},
    "VeraConfig": {"r": 4},
    "LoHaConfig": {"r": 2, "init_weights": False},
}
METHODS = pytest.mark.parametrize("method", CONFIGS)
DRAWN = ("vera_A", "vera_B")
"""What PEFT has in a model's state dict and what is in files alone here: tensors that a seed draws for all layers."""
X = torch.linspace(-1, 1, 24).view(3, 8)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.drop, self.down, self.head = nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.down(self.drop(self.up(x).tanh())))


def base():
    torch.manual_seed(0)
    return Model().eval()


def config(library, method, **more):
    return getattr(library, method)(**{"target_modules": ["up", "down"], **CONFIGS[method], **more})


def wrapped(library, method, name="default", **more):
    model = base()
    torch.manual_seed(1)
    return moved(library.get_peft_model(model, config(library, method, **more), name), name)


def moved(model, name):
    """Give an adapter numbers that do something; VeRA's start at zero."""
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}." in f"{key}.":
                parameter.add_(torch.linspace(0.1, 0.3, parameter.numel()).view_as(parameter))
    return model


def outputs(model):
    with torch.no_grad():
        return model(X)


def trained(model):
    return sorted(name for name, parameter in model.named_parameters() if parameter.requires_grad)


def modes(model):
    return [model.training, model.get_base_model().training, model.drop.training]


def compared(program, *args):
    """Run a program with both libraries, and compare what it yields."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mine, theirs = (list(program(library, *args)) for library in (ours, peft))
    assert len(mine) == len(theirs)
    for index, (one, two) in enumerate(zip(mine, theirs, strict=True)):
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(one, two, msg=lambda text, index=index: f"result {index}: {text}")
        else:
            assert one == two, f"result {index}"


def making(library, method):
    model = wrapped(library, method)
    yield type(model).__name__
    yield type(model.base_model).__name__
    yield model.peft_type
    yield model.active_adapter
    yield model.active_adapters
    yield list(model.peft_config)
    yield model.active_peft_config.peft_type
    yield model.active_peft_config.target_modules
    yield trained(model)
    yield sorted(key for key in model.state_dict() if not any(one in key for one in DRAWN))
    yield model.get_nb_trainable_parameters()
    yield model.modules_to_save
    yield sorted(library.get_peft_model_state_dict(model))
    yield outputs(model)
    yield model.base_model_torch_dtype
    yield model.base_model.model is model.get_base_model()
    yield [model.up is model.base_model.model.up, isinstance(model, library.PeftModel)]


def switching(library, method):
    model = wrapped(library, method)
    model.add_adapter("second", config(library, method, target_modules=["down"]))
    moved(model, "second")
    yield [model.active_adapters, trained(model), list(model.peft_config)]
    yield outputs(model)
    model.set_adapter("second")
    yield [model.active_adapters, model.active_adapter, trained(model)]
    yield outputs(model)
    model.set_adapter("default", inference_mode=True)
    yield [model.active_adapters, trained(model)]
    model.set_requires_grad(["default", "second"])
    yield trained(model)
    model.set_requires_grad("second", requires_grad=False)
    yield trained(model)
    with model.disable_adapter():
        yield outputs(model)
        with model.disable_adapter():
            yield outputs(model)
        yield outputs(model)
    yield outputs(model)
    model.set_adapter("second")
    model.delete_adapter("second")
    yield [model.active_adapters, model.active_adapter, list(model.peft_config), trained(model)]
    yield outputs(model)


def merging(library, method):
    model = wrapped(library, method)
    expected = outputs(model)
    model.merge_adapter()
    yield torch.allclose(outputs(model), expected, atol=1e-5)
    yield outputs(model)
    yield model.get_model_status().merged_adapters
    model.unmerge_adapter()
    yield outputs(model)
    merged = model.merge_and_unload(safe_merge=True)
    yield [type(merged).__name__, sorted(merged.state_dict())]
    yield outputs(merged)
    model = wrapped(library, method)
    model.add_adapter("second", config(library, method))
    moved(model, "second")
    yield outputs(model.merge_and_unload(adapter_names=["second"]))
    unloaded = wrapped(library, method).unload()
    yield [type(unloaded).__name__, sorted(unloaded.state_dict())]
    yield outputs(unloaded)


def files(library, method, folder):
    model = wrapped(library, method, modules_to_save=["head"])
    model.add_adapter("second", config(library, method, target_modules=["down"]))
    moved(model, "second")
    model.save_pretrained(folder)
    yield sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    for name in (".", "second"):
        tensors = load_file(folder / name / "adapter_model.safetensors")
        yield sorted(tensors)
        yield from (tensors[key] for key in sorted(tensors))
        fields = json.loads((folder / name / "adapter_config.json").read_text())
        yield [fields[one] for one in ("peft_type", "inference_mode", "task_type", "auto_mapping", "modules_to_save")]
        yield sorted(fields["target_modules"])
    again = library.PeftModel.from_pretrained(base().train(), folder)
    yield [again.active_adapters, trained(again), modes(again)]
    yield outputs(again)
    result = again.load_adapter(folder / "second", "second")
    yield [result.missing_keys, result.unexpected_keys, again.active_adapters, trained(again)]
    again.set_adapter("second")
    yield outputs(again)
    again = library.PeftModel.from_pretrained(base(), folder, adapter_name="other", is_trainable=True)
    yield [trained(again), list(again.peft_config), again.peft_config["other"].inference_mode]
    again.load_adapter(folder / "second", "second", is_trainable=True)
    yield [trained(again), again.active_adapters]
    tensors = library.load_peft_weights(folder, device="cpu")
    yield library.set_peft_model_state_dict(again, tensors, "other").unexpected_keys
    one = library.PeftConfig.from_pretrained(folder)
    yield [type(one).__name__, one.peft_type, one.target_modules, one.modules_to_save]
    selected = folder / "selected"
    model.save_pretrained(selected, selected_adapters=["second"])
    yield sorted(str(path.relative_to(selected)) for path in selected.rglob("*.safetensors"))


def statuses(library, method):
    model = wrapped(library, method)
    model.add_adapter("second", config(library, method))
    for one in model.get_layer_status():
        yield [one.enabled, one.active_adapters, one.merged_adapters, one.requires_grad, one.available_adapters]
        yield one.devices
    whole = model.get_model_status()
    names = ("base_model_type", "adapter_model_type", "trainable_params", "total_params", "num_adapter_layers")
    yield [getattr(whole, name) for name in (*names, "enabled", "active_adapters", "requires_grad", "devices")]
    yield sorted(whole.peft_types.items())


def states(library, method):
    model = wrapped(library, method)
    found = library.get_peft_model_state_dict(model)
    other = library.get_peft_model(base(), config(library, method), "other")
    library.set_peft_model_state_dict(other, found, adapter_name="other")
    yield outputs(other)
    yield library.get_peft_model_state_dict(other, adapter_name="other").keys() == found.keys()
    changed = {name: tensor * 2 if "default" in name else tensor for name, tensor in model.state_dict().items()}
    given = library.get_peft_model_state_dict(model, state_dict=changed)
    yield from (given[key] for key in sorted(given) if not key.endswith(DRAWN))


@METHODS
@pytest.mark.parametrize("program", [making, switching, merging, statuses, states], ids=lambda one: one.__name__)
def test_a_program_has_pefts_results(program, method):
    compared(program, method)


@METHODS
def test_files_are_pefts(method, tmp_path):
    compared(lambda library, method: files(library, method, tmp_path / library.__name__), method)


# -- PeftMixedModel ------------------------------------------------------------------------------------------------

PAIRS = [("LoraConfig", "LoHaConfig"), ("LoHaConfig", "LoraConfig"), ("OFTConfig", "LoraConfig")]


def mixing(library, first, second):
    torch.manual_seed(1)
    model = library.get_peft_model(base(), config(library, first), "a", mixed=True)
    yield [type(model).__name__, type(model.base_model).__name__, model.active_adapters]
    model.add_adapter("b", config(library, second))
    moved(model, "a"), moved(model, "b")
    yield [model.active_adapters, list(model.peft_config)]
    yield outputs(model)
    for names in ("b", ["a", "b"], ["b", "a"]):
        model.set_adapter(names)
        yield model.active_adapters
        yield model.get_nb_trainable_parameters()
        yield outputs(model)
    with model.disable_adapter():
        yield outputs(model)
    yield outputs(model.merge_and_unload())
    torch.manual_seed(1)
    model = library.get_peft_model(base(), config(library, first), "a", mixed=True)
    model.add_adapter("b", config(library, second))
    model.set_adapter("b")
    model.delete_adapter(["a"])
    yield [model.active_adapters, list(model.peft_config)]
    yield outputs(model.unload())


def mixed_files(library, folder):
    for name, method in (("a", "LoraConfig"), ("b", "LoHaConfig")):
        wrapped(library, method, name).save_pretrained(folder)
    model = library.PeftMixedModel.from_pretrained(base(), folder / "a", "a")
    yield [type(model).__name__, model.active_adapters]
    yield outputs(model)
    result = model.load_adapter(folder / "b", "b")
    yield [result.missing_keys, result.unexpected_keys, model.active_adapters]
    model.set_adapter(["a", "b"])
    yield outputs(model)


def without_layers(library):
    model = library.get_peft_model(normed(), library.LNTuningConfig(target_modules=["1"]), "a")
    model.add_adapter("b", library.LNTuningConfig(target_modules=["1"]))
    model.set_adapter("b")
    yield model.has_active_enabled_adapter
    with model.disable_adapter():
        yield model.has_active_enabled_adapter
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that another one is active now
        model.delete_adapter("b")
    yield [model.active_adapters, [name for name, one in model.named_parameters() if one.requires_grad] != []]


def normed():
    return nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))


def test_the_next_adapter_is_active_where_there_are_no_layers():
    compared(without_layers)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_mixed_models_have_pefts_results(pair):
    compared(mixing, *pair)


def test_mixed_models_load_pefts_way(tmp_path):
    compared(lambda library: mixed_files(library, tmp_path / library.__name__))


def test_mixed_models_do_here_what_peft_refuses(tmp_path):
    model = ours.get_peft_model(base(), config(ours, "IA3Config"), "a", mixed=True)
    model.add_adapter("b", config(ours, "VeraConfig"))
    model.set_adapter(["a", "b"])
    model.save_pretrained(tmp_path)
    assert model.get_model_status().active_adapters == ["a", "b"]
    again = ours.PeftMixedModel.from_pretrained(base(), tmp_path / "a", "a")
    again.load_adapter(tmp_path / "b", "b")
    again.set_adapter(["a", "b"])
    torch.testing.assert_close(outputs(again), outputs(model))
    with pytest.raises(ValueError, match=r"the model has no adapter 'c'; it has \['a', 'b'\]"):
        model.delete_adapter(["a", "c"])
    model.merge_adapter(["b"])
    with pytest.raises(ValueError, match=r"adapter 'b' is merged \(.*call unmerge_adapter\(model\) first"):
        model.delete_adapter(["a", "b"])
    assert list(model.peft_config) == ["a", "b"]
