"""The default targets are PEFT's."""

import copy
import types

import peft
import pytest
from peft.utils import constants
from torch import nn

from torchgraft import adapters
from torchgraft.adapters import BaseTunerLayer, IA3Config, LoraConfig, VeraConfig, inject_adapter_in_model
from torchgraft.adapters._config.architectures import TARGETS, with_targets
from torchgraft.adapters._config.base import config_types
from torchgraft.functional import bind


def model_of(kind):
    model = nn.Sequential()
    model.config = types.SimpleNamespace(model_type=kind)
    return model


METHODS = sorted(
    cls.method.name for name, cls in vars(adapters).items() if hasattr(cls, "method") and hasattr(peft, name)
)


@pytest.mark.parametrize("name", sorted({*METHODS} - {"IA3", "LORA_XS", "TRAINABLE_TOKENS"}))
def test_targets_are_pefts(name):
    table = getattr(constants, f"TRANSFORMERS_MODELS_TO_{name.replace('LN_', 'LN')}_TARGET_MODULES_MAPPING")
    assert table
    for kind, expected in table.items():
        given = with_targets(config_types()[name](), model_of(kind)).target_modules
        assert given == (expected if isinstance(expected, str) else set(expected)), kind


@pytest.mark.parametrize("kind", TARGETS)
def test_targets_where_a_method_has_no_table_are_those_of_lora(kind):
    expected = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[kind]
    given = with_targets(LoraConfig(), model_of(kind)).target_modules
    assert given == (expected if isinstance(expected, str) else set(expected))


def test_targets_of_ia3_are_pefts():
    feedforward = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    for kind, expected in constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.items():
        config = with_targets(IA3Config(), model_of(kind))
        assert (config.target_modules, config.feedforward_modules) == (set(expected), set(feedforward[kind]))


def test_other_models_and_given_targets_are_left_alone():
    assert with_targets(VeraConfig(), model_of("unheard-of")).target_modules is None
    assert with_targets(LoraConfig(target_modules=["a"]), model_of("llama")).target_modules == {"a"}
    with pytest.raises(ValueError, match="target_modules is None; name the modules to adapt"):
        inject_adapter_in_model(LoraConfig(), nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("config", [LoraConfig(), IA3Config()], ids=["lora", "ia3"])
def test_bind_has_the_targets_that_inject_has(config):
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("k_proj", "q_proj", "v_proj", "o_proj", "down_proj")})
    model.config = types.SimpleNamespace(model_type="llama")
    graft, stacked = bind(model, config, allow_unreached=True), bind(model, [config, config], allow_unreached=True)
    injected = inject_adapter_in_model(config, copy.deepcopy(model))
    expected = sorted(path for path, module in injected.named_modules() if isinstance(module, BaseTunerLayer))
    assert sorted(graft.sites[""]) == sorted(stacked.sites[""]) == expected
