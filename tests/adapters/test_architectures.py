"""The default targets are PEFT's."""

import types

import pytest
from peft.utils import constants
from torch import nn

from torchgraft.adapters import AdaLoraConfig, IA3Config, LoraConfig, OFTConfig, VeraConfig, inject_adapter_in_model
from torchgraft.adapters.config.architectures import TARGETS, with_targets


def model_of(kind):
    model = nn.Sequential()
    model.config = types.SimpleNamespace(model_type=kind)
    return model


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("config", [LoraConfig(), OFTConfig()], ids=["LORA", "OFT"])
def test_targets_are_pefts(config, kind):
    expected = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[kind]
    assert with_targets(config, model_of(kind)).target_modules == expected


def test_methods_with_tables_of_their_own():
    for kind, expected in constants.TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING.items():
        assert with_targets(AdaLoraConfig(), model_of(kind)).target_modules == expected
    for kind, expected in constants.TRANSFORMERS_MODELS_TO_VERA_TARGET_MODULES_MAPPING.items():
        assert with_targets(VeraConfig(), model_of(kind)).target_modules == expected
    feedforward = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    for kind, expected in constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.items():
        config = with_targets(IA3Config(), model_of(kind))
        assert (config.target_modules, config.feedforward_modules) == (expected, feedforward[kind])


def test_other_models_and_given_targets_are_left_alone():
    assert with_targets(VeraConfig(), model_of("unheard-of")).target_modules is None
    assert with_targets(LoraConfig(target_modules=["a"]), model_of("llama")).target_modules == ["a"]
    with pytest.raises(ValueError, match="target_modules is None; name the modules to adapt"):
        inject_adapter_in_model(LoraConfig(), nn.Sequential(nn.Linear(2, 2)))
