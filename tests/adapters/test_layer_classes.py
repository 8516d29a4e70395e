"""PEFT's classes of layers: `isinstance`, one layer by itself, and helpers; each beside real PEFT."""

import copy
import importlib
import inspect

import peft
import pytest
import torch
import transformers
from torch import nn

from torchgraft import adapters
from torchgraft.adapters import as_peft, inject_adapter_in_model
from torchgraft.adapters._config.base import config_types
from torchgraft.functional import UnsupportedConfig

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out", "ignore:.*have no effect")
METHODS = [name for name in config_types() if name in peft.PeftType.__members__]
REAL = {name: importlib.import_module(f"peft.tuners.{name.lower()}.layer") for name in METHODS}
with as_peft():
    OURS = {name: importlib.import_module(f"peft.tuners.{name.lower()}.layer") for name in METHODS}
    HELPERS = importlib.import_module("peft.helpers")
    UTILS = importlib.import_module("peft.utils.other")
    OPTIMIZERS = importlib.import_module("peft.optimizers")
REAL_HELPERS, REAL_UTILS = importlib.import_module("peft.helpers"), importlib.import_module("peft.utils.other")
REAL_OPTIMIZERS = importlib.import_module("peft.optimizers")
MODULES = {
    "Linear": (lambda: nn.Linear(8, 6), lambda: torch.randn(2, 8)),
    "Embedding": (lambda: nn.Embedding(5, 6), lambda: torch.tensor([[0, 3]])),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3), lambda: torch.randn(2, 4, 5)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3), lambda: torch.randn(2, 4, 5, 5)),
    "Conv3d": (lambda: nn.Conv3d(4, 6, 3), lambda: torch.randn(2, 4, 5, 5, 5)),
}
LAYERS = [
    ("LORA", "Linear", {"r": 2, "lora_alpha": 6}, {}),
    ("LORA", "Embedding", {"r": 2, "lora_alpha": 6}, {}),
    ("LORA", "Conv1d", {"r": 2, "lora_alpha": 6}, {}),
    ("LORA", "Conv2d", {"r": 2, "lora_alpha": 6}, {}),
    ("LORA", "Conv3d", {"r": 2, "lora_alpha": 6}, {}),
    ("ADALORA", "SVDLinear", {"r": 2, "lora_alpha": 6}, {"total_step": 5, "init_r": 2}),
    ("IA3", "Linear", {"is_feedforward": True}, {}),
    ("IA3", "Conv2d", {"is_feedforward": False}, {}),
    ("LOHA", "Linear", {"r": 4, "alpha": 6}, {}),
    ("LOHA", "Conv2d", {"r": 4, "alpha": 6}, {}),
    ("LOKR", "Linear", {"r": 2, "alpha": 6}, {}),
    ("HIRA", "Linear", {"r": 2}, {}),
    ("HIRA", "Embedding", {"r": 2}, {}),
    ("MISS", "MissLinear", {"r": 2}, {}),
    ("DELORA", "DeloraLinear", {"r": 2, "delora_lambda": 7}, {}),
    ("GLORA", "GloraLinear", {}, {"r": 2}),
    ("DEFT", "DeftLinear", {"r": 2, "alpha": 4}, {"alpha": 4}),
    ("BEFT", "Linear", {}, {"init_weights": False}),
    ("C3A", "C3ALinear", {"block_size": 2}, {}),
]


@pytest.mark.parametrize(("method", "name", "fields", "settings"), LAYERS)
def test_a_layer_by_itself_is_pefts(method, name, fields, settings):
    make, x = MODULES[
        name.removeprefix("SVD")
        .removeprefix("Miss")
        .removeprefix("Delora")
        .removeprefix("C3A")
        .removeprefix("Glora")
        .removeprefix("Deft")
    ]
    torch.manual_seed(0)
    base, x, config = make(), x(), config_types()[method].__name__
    made = []
    for module, lib in ((OURS[method], adapters), (REAL[method], peft)):
        torch.manual_seed(1)
        made.append(getattr(module, name)(copy.deepcopy(base), "a", config=getattr(lib, config)(**settings), **fields))
    ours, theirs = made
    assert isinstance(ours, getattr(OURS[method], name)) and isinstance(ours, adapters.BaseTunerLayer)
    for (path, p), (other, q) in zip(
        sorted(ours.named_parameters()),
        sorted(one for one in theirs.named_parameters() if "ranknum" not in one[0]),
        strict=True,
    ):
        assert path == other and ("base_layer" in path or p.requires_grad is q.requires_grad)
        torch.testing.assert_close(p, q)
    with torch.no_grad():
        for (_, p), (_, q) in zip(sorted(ours.named_parameters()), sorted(theirs.named_parameters()), strict=False):
            p += 0.1 * torch.arange(p.numel()).view_as(p) / p.numel() if p.shape == q.shape else 0
        theirs.load_state_dict(ours.state_dict(), strict=False)
    ours.eval()
    theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_each_class_of_pefts_is_here_and_has_its_names():
    for method, real in REAL.items():
        base = importlib.import_module("peft.tuners.tuners_utils").BaseTunerLayer
        classes = {
            name: one
            for name, one in vars(real).items()
            if inspect.isclass(one) and one.__module__ == real.__name__ and issubclass(one, base) and name[0] != "_"
        }
        assert classes.keys() <= set(vars(OURS[method])), method
        of_all = next(name for name in classes if name.endswith("Layer"))
        ours = getattr(OURS[method], of_all)
        for name in classes.keys() - {of_all}:
            assert issubclass(getattr(OURS[method], name), ours)
        assert set(ours.adapter_layer_names) >= {name for name in ours.adapter_layer_names if "embedding" not in name}


def test_instances_are_of_their_kind_and_method():
    model = nn.ModuleDict({"linear": nn.Linear(4, 4), "conv": nn.Conv2d(4, 4, 1), "table": nn.Linear(4, 4)})
    model["transposed"], model["embedding"] = transformers.pytorch_utils.Conv1D(4, 4), nn.Embedding(4, 4)
    twin = copy.deepcopy(model)
    for lib, one in ((adapters, model), (peft, twin)):
        config = lib.LoraConfig(target_modules=["linear", "conv", "embedding"], target_parameters=["table.weight"])
        lib.inject_adapter_in_model(config, one)
    for name in ("linear", "conv", "embedding", "table"):
        found = ["LoraLayer", "Linear", "Conv2d", "Embedding", "ParamWrapper"]
        ours = [isinstance(model[name], getattr(OURS["LORA"], one)) for one in found]
        assert ours == [isinstance(twin[name], getattr(REAL["LORA"], one)) for one in found], name
    adalora = inject_adapter_in_model(
        adapters.AdaLoraConfig(target_modules=["0"], total_step=3), nn.Sequential(nn.Linear(2, 2))
    )
    assert isinstance(adalora[0], OURS["LORA"].LoraLayer) and isinstance(adalora[0], OURS["ADALORA"].SVDLinear)
    assert not isinstance(adalora[0], OURS["LORA"].Linear) and not isinstance(model["linear"], OURS["IA3"].IA3Layer)


def test_layers_that_cannot_be_made():
    linear, config = OURS["LORA"].Linear, adapters.LoraConfig(r=2)
    base = nn.Linear(4, 4)
    for call, match in [
        (lambda: OURS["LORA"].LoraLayer(base), r"LoraLayer is the class of several layers; make one of \['Linear'"),
        (lambda: linear(base, "a"), r"Linear: config is of type NoneType, expected a LoraConfig; call Linear\(base"),
        (lambda: linear(base, "a", config=adapters.IA3Config()), "config is of type IA3Config, expected a LoraConfig"),
        (lambda: linear(base, "a", config=config, rank=3), "Linear: LoraConfig has no rank; it has"),
        (lambda: linear(base, "a", config=config, r=3), "r is given without lora_alpha; give both, or none for"),
        (lambda: linear(nn.Embedding(3, 4), "a", config=config), "base_layer is a Embedding, .* class is Embedding"),
    ]:
        with pytest.raises(TypeError, match=match):
            call()


def test_a_layer_takes_one_more_adapter_and_leaves_the_base_as_trained_as_it_was():
    base = nn.Linear(4, 4)
    base.bias.requires_grad_(False)
    layer = OURS["LORA"].Linear(base, "a", config=adapters.LoraConfig(r=2, modules_to_save=["head"], bias="all"))
    assert OURS["IA3"].Linear(layer, "b", config=adapters.IA3Config()) is layer
    assert layer._all_available_adapter_names() == ["a", "b"] and layer.active_adapters == ["b"]
    assert (base.weight.requires_grad, base.bias.requires_grad) == (True, False)
    table = OURS["LORA"].ParamWrapper(nn.Linear(4, 4), "a", parameter_name="weight", config=adapters.LoraConfig(r=2))
    assert repr(table).startswith("lora.ParamWrapper(") and isinstance(table, OURS["LORA"].ParamWrapper)


def test_custom_layers_are_registered_otherwise():
    with pytest.raises(UnsupportedConfig, match=r"got layers for LSTM, .* register_layer\(cls, 'linear'"):
        adapters.LoraConfig()._register_custom_module({nn.LSTM: OURS["LORA"].Linear})


# -- helpers -----------------------------------------------------------------------------------------------------------


def pair(**fields):
    """The same adapter of random numbers in the same model, by both libraries."""
    torch.manual_seed(0)
    base, found = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)), []
    for lib in (adapters, peft):
        torch.manual_seed(1)
        config = lib.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False, **fields)
        found.append(lib.PeftModel(copy.deepcopy(base), config))
    return found


X = torch.linspace(-1, 1, 12).view(3, 4)


def test_factors_are_rescaled_for_a_while():
    ours, theirs = (model.get_base_model() for model in pair())
    before, factors = ours(X), [layer.scaling["default"] for layer in (ours[0], ours[2])]
    for multiplier in (0.5, 0, -2.0):
        with HELPERS.rescale_adapter_scale(ours, multiplier), REAL_HELPERS.rescale_adapter_scale(theirs, multiplier):
            torch.testing.assert_close(ours(X), theirs(X))
            with HELPERS.rescale_adapter_scale(ours, 3):
                pass
            torch.testing.assert_close(ours(X), theirs(X))
    assert torch.equal(ours(X), before) and [layer.scaling["default"] for layer in (ours[0], ours[2])] == factors
    with pytest.raises(RuntimeError, match="stop"), HELPERS.rescale_adapter_scale(ours, 0.1):
        raise RuntimeError("stop")
    assert torch.equal(ours(X), before)
    with (
        pytest.raises(TypeError, match="multiplier is 'a', expected a number"),
        HELPERS.rescale_adapter_scale(ours, "a"),
    ):
        pass
    with pytest.raises(ValueError, match="no LoRA adapter, whose"), HELPERS.rescale_adapter_scale(nn.Linear(2, 2), 1):
        pass


def test_factors_that_are_written_in_place_are_rescaled_too():
    ours = pair()[0].get_base_model()
    ours[0].make_adjustable("default")
    before = ours(X)
    with HELPERS.rescale_adapter_scale(ours, 0.5):
        assert ours[0].scaling["default"] == 2 and not torch.equal(ours(X), before)
    assert torch.equal(ours(X), before) and ours[0].scaling["default"] is ours[0].adjustable["default"]


def test_casts_are_off_for_a_while():
    ours = pair()[0].get_base_model()
    with HELPERS.disable_input_dtype_casting(ours, active=False):
        assert ours[0].cast_input_dtype_enabled
    seen = []

    def fail():
        seen.extend([ours[0].cast_input_dtype_enabled, ours[2].cast_input_dtype_enabled])
        raise KeyError

    with pytest.raises(KeyError), HELPERS.disable_input_dtype_casting(ours):
        fail()
    assert seen == [False, False] and ours[0].cast_input_dtype_enabled


def test_folders_with_an_adapter(tmp_path):
    ours, theirs = pair()
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{")
    for name, expected in (("theirs", True), ("ours", True), ("broken", False), ("none", False)):
        assert HELPERS.check_if_peft_model(str(tmp_path / name)) is expected


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x, scale: float = 1.0):
        """Scale."""
        return self.lin(x) * scale

    def generate(self, x, steps=2):
        return x


def test_signatures_are_the_models_own():
    for lib, helpers in ((adapters, HELPERS), (peft, REAL_HELPERS)):
        model = lib.PeftModel(Named(), lib.LoraConfig(target_modules=["lin"]))
        helpers.update_signature(model)
        assert str(inspect.signature(model.forward)) == "(x, scale: float = 1.0)"
        assert model.forward.__doc__ == "Scale." and model(X, scale=2.0).shape == X.shape
        copy.deepcopy(model)(X)
    model = adapters.PeftModel(Named(), adapters.LoraConfig(target_modules=["lin"]))
    HELPERS.update_generate_signature(model)
    assert str(inspect.signature(model.generate)) == "(x, steps=2)" and model.generate(X) is X
    HELPERS.update_forward_signature(model)
    with pytest.raises(ValueError, match="method is 'call', expected 'forward', 'generate' or 'all'"):
        HELPERS.update_signature(model, "call")


# -- optimizers, dtypes and small functions -----------------------------------------------------------------------


def test_optimizers_take_pefts_steps():
    for build in (
        lambda lib, model: lib.create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=4, loraplus_weight_decay=0.1, eps=1e-6
        ),
        lambda lib, model: lib.create_lorafa_optimizer(model, r=2, lora_alpha=8, lr=1e-2, weight_decay=0.1),
    ):
        models = pair()
        for lib, model in zip((OPTIMIZERS, REAL_OPTIMIZERS), models, strict=True):
            optimizer = build(lib, model)
            for _ in range(3):
                optimizer.zero_grad()
                model(X).square().sum().backward()
                optimizer.step()
        torch.testing.assert_close(models[0](X), models[1](X), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"use_rslora is True, and the configs of \['default'\] say otherwise"):
        OPTIMIZERS.create_lorafa_optimizer(pair()[0], r=2, lora_alpha=8, lr=1e-2, use_rslora=True)


def tiny_llama():
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=12
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated", "ignore:.*use_reentrant")
@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": False}])
def test_models_are_prepared_as_by_peft(loaded, kwargs):
    def program(utils):
        model = tiny_llama()
        model.is_loaded_in_8bit = loaded
        result = utils.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs=kwargs)
        assert result is model
        y = model(torch.tensor([[1, 2]])).logits
        dtypes = {name: (p.dtype, p.requires_grad) for name, p in model.named_parameters()}
        return dtypes, model.is_activation_checkpointing, y.requires_grad, y

    ours, theirs = program(UTILS), program(REAL_UTILS)
    assert ours[:3] == theirs[:3] and torch.equal(ours[3], theirs[3])


def test_packed_models_keep_their_dtypes():
    model = tiny_llama()
    model.quantization_method = "gptq"
    UTILS.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and not model.is_activation_checkpointing

    class Own(nn.Linear):
        is_loaded_in_4bit = True

        def gradient_checkpointing_enable(self):
            """Take nothing."""

        def get_input_embeddings(self):
            return self

    with pytest.raises(TypeError, match="which Own.gradient_checkpointing_enable does not take; leave it out"):
        UTILS.prepare_model_for_kbit_training(Own(2, 2), gradient_checkpointing_kwargs={"a": 1})
    assert UTILS.prepare_model_for_kbit_training(Own(2, 2))(torch.ones(2)).requires_grad


def test_mixed_precision_is_pefts_and_not_beneath_a_merge():
    ours, theirs = pair()
    UTILS.cast_mixed_precision_params(ours, torch.bfloat16)
    REAL_UTILS.cast_mixed_precision_params(theirs, torch.bfloat16)
    assert {n: p.dtype for n, p in ours.named_parameters()} == {n: p.dtype for n, p in theirs.named_parameters()}
    ours.merge_adapter()
    with pytest.raises(RuntimeError, match=r"0: adapters are merged; call unmerge_adapter\(model\)"):
        UTILS.cast_mixed_precision_params(ours, torch.float16)


def test_small_functions_are_pefts():
    model = pair()[0]
    parent, target, name = UTILS._get_submodules(model, "base_model.model.0")
    assert parent is model.get_base_model() and parent[0] is target and name == "0"
    weight = nn.Parameter(torch.randn(2, 3))
    for flag in (True, False):
        ours, theirs = (utils.transpose(weight, flag) for utils in (UTILS, REAL_UTILS))
        assert torch.equal(ours, theirs) and type(ours) is type(theirs)
    assert UTILS.infer_device() == REAL_UTILS.infer_device()
    pairs = [(size, factor) for size in (1, 7, 12, 127, 128, 256) for factor in (-1, 1, 4, 5, 300)]
    assert all(OURS["LOKR"].factorization(*one) == REAL["LOKR"].factorization(*one) for one in pairs)


def test_units_of_a_sharded_model_are_its_blocks_and_what_is_trained(monkeypatch):
    model = adapters.get_peft_model(tiny_llama(), adapters.LoraConfig(target_modules=["q_proj"]))
    policy = UTILS.fsdp_auto_wrap_policy(model)
    block = model.base_model.model.model.layers[0]
    wrapped = {
        name for name, module in model.named_modules() if policy(module=module, recurse=False, nonwrapped_numel=1)
    }
    names = {name for name, module in model.named_modules() if module is block}
    assert wrapped == names | {f"{next(iter(names))}.self_attn.q_proj.lora_{side}.default" for side in "AB"}
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "Nothing")
    with pytest.raises(TypeError, match="no module of class 'Nothing', which is to be a unit; set FSDP_TRANSFORMER"):
        UTILS.fsdp_auto_wrap_policy(model)
