"""PEFT's ways to look at data: the same program runs with both libraries, and starts from the same numbers."""

import copy
import importlib

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig as PeftCordaConfig
from torch import nn

from torchgraft import adapters
from torchgraft.adapters import CordaConfig, LoraConfig, LoraGAConfig, as_peft, inject_adapter_in_model, save_adapter

from .test_alias import real
from .test_initial import SITES, net
from .test_statistics import assert_untouched, data, snapshot

NAMES = ("peft.tuners.lora.corda", "peft.tuners.lora.loraga", "peft.tuners.lora.eva")
REAL = [real(name) for name in NAMES]
with as_peft():
    OURS = [importlib.import_module(name) for name in NAMES]
LIBS = [(adapters, *OURS), (peft, *REAL)]


def run(model, batches):
    return lambda: [model(batch) for batch in batches]


def products(model):
    """`B A` of each adapted layer, which has no sign to choose."""
    found = {path: layer for path, layer in model.named_modules() if hasattr(layer, "lora_A")}
    return {
        path.removeprefix("base_model.model."): layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        for path, layer in found.items()
    }


def assert_same_start(ours, theirs, x):
    own, other = products(ours), products(theirs)
    assert own.keys() == other.keys()
    for path in own:
        torch.testing.assert_close(own[path], other[path], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_starts_as_in_peft(mode):
    batches, made = data(), []
    for (lib, corda, *_), how in zip(LIBS, (CordaConfig, PeftCordaConfig), strict=True):
        model = net()
        before = snapshot(model) if lib is adapters else None
        config = lib.LoraConfig(
            r=2, target_modules=SITES, init_lora_weights="corda", corda_config=how(corda_method=mode)
        )
        corda.preprocess_corda(model, config, run(model, batches))
        if lib is adapters:
            assert_untouched(model, before)
        made.append(lib.get_peft_model(model, config))
    assert_same_start(*made, batches[0])


def test_corda_keeps_files_and_reads_them_again(tmp_path):
    batches, model = data(), net()
    files = {"cache_file": str(tmp_path / "a" / "cache"), "covariance_file": str(tmp_path / "b" / "covariance")}

    def config(**how):
        fields = {"r": 2, "target_modules": SITES, "init_lora_weights": "corda", "corda_config": CordaConfig(**how)}
        return LoraConfig(**fields)

    first, again, other = config(**files), config(**files), config(covariance_file=files["covariance_file"])
    OURS[0].preprocess_corda(model, first, run(model, batches))
    OURS[0].preprocess_corda(model, again)
    OURS[0].preprocess_corda(model, other)
    for path, parts in first.statistics.sites.items():
        for name, tensor in parts.items():
            assert torch.equal(again.statistics.sites[path][name], tensor)
            assert torch.equal(other.statistics.sites[path][name], tensor)
    wrong = config(**files)
    wrong.r = 3
    with pytest.raises(ValueError, match=r"cache: U of .* has shape \(10, 2\), expected \(10, 3\); it was"):
        OURS[0].preprocess_corda(model, wrong)
    torch.save({"a": torch.ones(1)}, tmp_path / "pickle")
    with pytest.raises(ValueError, match="pickle: is no safetensors file, or cut off: .*"):
        OURS[0].preprocess_corda(model, config(cache_file=str(tmp_path / "pickle")))
    with pytest.raises(ValueError, match="run_model is None, and corda_config has no file that is there; give one"):
        OURS[0].preprocess_corda(model, config(cache_file=str(tmp_path / "none")))
    inject_adapter_in_model(first, model)
    with pytest.warns(UserWarning, match="files hold neither the data nor what it chose"):
        save_adapter(model, tmp_path / "adapter")  # with the names of files in its config
    assert adapters.load_config(tmp_path / "adapter").corda_config.cache_file == files["cache_file"]


def test_corda_of_another_model_than_the_one_that_runs():
    batches, model, hooked = data(), net(), net()
    config = LoraConfig(r=2, target_modules=SITES, init_lora_weights="corda")
    OURS[0].preprocess_corda(model, config, run(hooked, batches), hooked_model=hooked)
    assert set(config.statistics.sites) == set(SITES)
    with pytest.raises(ValueError, match="no batch reached"):
        OURS[0].preprocess_corda(model, config, lambda: None)
    with pytest.raises(ValueError, match=f"hooked_model has no module '{SITES[0]}', which is targeted"):
        OURS[0].preprocess_corda(model, config, lambda: None, hooked_model=nn.Sequential())
    assert not any(module._forward_pre_hooks for module in (*model.modules(), *hooked.modules()))


def steps(model, batches):
    def step():
        for batch in batches:
            model.zero_grad()
            model(batch).square().mean().backward()

    return step


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_lora_ga_starts_as_in_peft():
    batches, made = data(3), []
    for lib, _, loraga, _ in LIBS:
        model = net()
        before = snapshot(model)
        config = lib.LoraConfig(
            r=2, target_modules=SITES, init_lora_weights="lora_ga", lora_ga_config=lib.LoraGAConfig()
        )
        step = [lambda model=model, batch=batch: model(batch).square().mean().backward() for batch in batches]
        loraga.preprocess_loraga(model, config, lambda step=step: [one() for one in step])
        if lib is adapters:
            assert_untouched(model, before)
        made.append(lib.get_peft_model(model, config))
    ours, theirs = made
    for path in SITES:
        for leaf in ("lora_A", "lora_B"):  # up to the signs of singular vectors
            own, other = (getattr(model.base_model.model.get_submodule(path), leaf)["default"].weight for model in made)
            torch.testing.assert_close(own.abs(), other.abs(), rtol=1e-2, atol=1e-3 * float(other.detach().abs().max()))
    torch.testing.assert_close(ours(batches[0]), theirs(batches[0]), rtol=1e-3, atol=1e-3)


def test_lora_ga_is_the_mean_whatever_the_program_does_with_gradients(tmp_path):
    batches, model = data(3), net()
    plain, zeroing, cached = (
        LoraConfig(r=2, target_modules=SITES, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
        for _ in range(3)
    )
    OURS[1].preprocess_loraga(model, plain, lambda: [model(one).square().mean().backward() for one in batches])
    OURS[1].preprocess_loraga(model, zeroing, steps(model, batches), tmp_path / "gradients")
    OURS[1].preprocess_loraga(model, cached, lambda: 1 / 0, tmp_path / "gradients")
    for path, parts in plain.statistics.sites.items():
        for other in (zeroing, cached):
            torch.testing.assert_close(other.statistics.sites[path]["gradient"], parts["gradient"])
    with pytest.raises(ZeroDivisionError):
        OURS[1].preprocess_loraga(model, cached, lambda: 1 / 0)
    with pytest.raises(ValueError, match="preprocess_loraga: no batch reached"):
        OURS[1].preprocess_loraga(model, cached, lambda: None)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


OPTIONS = {
    "forward_fn": lambda model, x: model(x),
    "prepare_model_inputs_fn": None,
    "prepare_layer_inputs_fn": None,
    "show_progress_bar": False,
}


@pytest.mark.filterwarnings("ignore:lora with eva initialization", "ignore:LoraConfig. init_lora_weights is 'eva'")
@pytest.mark.parametrize("fields", [{}, {"rank_pattern": {SITES[0]: 3}, "alpha_pattern": {SITES[1]: 5}}], ids=str)
def test_eva_starts_again_as_in_peft(fields, tmp_path):
    batches, made, found = data(), [], []
    for lib, *_, eva in LIBS:
        config = lib.LoraConfig(
            r=4, target_modules=SITES, init_lora_weights="eva", lora_alpha=6, eva_config=lib.EvaConfig(), **fields
        )
        model = lib.get_peft_model(net(), copy.deepcopy(config))
        found.append(eva.get_eva_state_dict(model, batches, **OPTIONS))
        eva.initialize_lora_eva_weights(model, batches, **OPTIONS)
        made.append(model)
    ours, theirs = made
    assert {key: tuple(one.shape) for key, one in found[0].items()} == {k: tuple(t.shape) for k, t in found[1].items()}
    kept = {path for path, layer in theirs.named_modules() if hasattr(layer, "lora_A")}
    assert kept == {path for path, layer in ours.named_modules() if hasattr(layer, "lora_A")}
    for path in kept:
        own, other = ours.get_submodule(path), theirs.get_submodule(path)
        assert own.scaling["default"] == pytest.approx(other.scaling["default"])
        a, b = (layer.lora_A["default"].weight for layer in (own, other))
        assert a.shape == b.shape and a.requires_grad
        torch.testing.assert_close(a.mT @ a, b.mT @ b, rtol=1e-2, atol=1e-2)
        assert not own.lora_B["default"].weight.any()
    torch.testing.assert_close(ours(batches[0]), theirs(batches[0]))
    ours.save_pretrained(tmp_path)
    adapters.PeftModel.from_pretrained(net(), tmp_path)
    peft.PeftModel.from_pretrained(net(), tmp_path)
    again = adapters.get_peft_model(
        net(), LoraConfig(r=4, target_modules=SITES, init_lora_weights="eva", lora_alpha=6, **fields)
    )
    OURS[2].initialize_lora_eva_weights(again, eva_state_dict=found[0])
    for path in kept:
        own, other = (model.get_submodule(path).lora_A["default"].weight for model in (ours, again))
        torch.testing.assert_close(own, other)


@pytest.mark.filterwarnings("ignore:LoraConfig. init_lora_weights is 'eva'")
def test_eva_beside_another_adapter_and_with_own_functions():
    batches, seen = data(), []
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=SITES), net(), "other")
    inject_adapter_in_model(LoraConfig(r=4, target_modules=SITES, init_lora_weights="eva"), model, "mine")
    state = {name: p.clone() for name, p in model.named_parameters() if ".other." in name}

    def rows(x, batch, name):
        seen.append(name)
        return x.flatten(0, -2)

    options = {**OPTIONS, "prepare_layer_inputs_fn": rows}
    OURS[2].initialize_lora_eva_weights(model, batches, adapter_name="mine", **options)
    assert set(seen) <= set(SITES) and seen
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters() if name in state)
    assert adapters.active_adapters(model) == ["mine"]


@pytest.mark.filterwarnings("ignore:LoraConfig. init_lora_weights is 'eva'")
def test_what_eva_refuses():
    plain = inject_adapter_in_model(LoraConfig(r=2, target_modules=SITES), net())
    eva = inject_adapter_in_model(LoraConfig(r=2, target_modules=SITES, init_lora_weights="eva"), net())
    start, look = OURS[2].initialize_lora_eva_weights, OURS[2].get_eva_state_dict
    for call, match in [
        (lambda: start(plain, data()), "adapter 'default' of the model has no LoraConfig with init_lora_weights='eva'"),
        (lambda: start(eva), "dataloader and eva_state_dict are both None; give batches, or what they said"),
        (
            lambda: start(eva, eva_state_dict={"x": torch.ones(1, 2)}),
            r"has 'x' of shape \(1, 2\), which fits no",
        ),
        (lambda: look(net(), data()), "peft_config is None, and the model has no adapter 'default'; give a LoraConfig"),
    ]:
        with pytest.raises(ValueError, match=match):
            call()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=SITES), eva, "other")
    adapters.set_adapter(eva, ["default", "other"])
    with pytest.raises(ValueError, match=r"several adapters are active, \['default', 'other'\]; set one"):
        start(eva, data())
