"""The alias itself: what is found under PEFT's name, for how long, and what comes back."""

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
import threading
import types

import peft
import pytest
from torch import nn

from torchgraft import adapters
from torchgraft.adapters import IA3Config, LoraConfig, as_peft, inject_adapter_in_model
from torchgraft.adapters._config.base import config_types
from torchgraft.adapters._peft.absent import Absent
from torchgraft.adapters._peft.peft_modules import MODULES
from torchgraft.functional import UnsupportedCall


def real(name):
    """A module of PEFT's; that of CorDA takes its dataclass from attrs, which nothing else here needs."""
    sys.modules.setdefault("attr", types.SimpleNamespace(dataclass=dataclasses.dataclass))
    module = importlib.import_module(name)
    if isinstance(sys.modules["attr"], types.SimpleNamespace):
        del sys.modules["attr"]
    return module


REAL = {name: real(name) for name in MODULES}


def real_modules():
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "peft"}


@pytest.fixture(autouse=True)
def everything_comes_back():
    modules, finders = real_modules(), list(sys.meta_path)
    yield
    assert real_modules() == modules
    assert sys.meta_path == finders
    assert importlib.metadata.version("peft") == peft.__version__
    assert importlib.import_module("peft") is peft


def test_names_are_those_of_torchgraft():
    with as_peft():
        from peft import LoraConfig as Config
        from peft import PeftConfig, PeftType, TaskType, get_peft_model_state_dict
        from peft.functional import delete_adapter, set_adapter
        from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper
        from peft.utils.other import AuxiliaryTrainingWrapper
    assert Config is LoraConfig
    assert PeftConfig is adapters.AdapterConfig
    assert PeftType is adapters.PeftType
    assert (delete_adapter, set_adapter) == (adapters.delete_adapter, adapters.set_adapter)
    assert get_peft_model_state_dict is adapters.get_peft_model_state_dict
    assert BaseTunerLayer is adapters.BaseTunerLayer
    assert ModulesToSaveWrapper is adapters.ModulesToSaveWrapper
    assert isinstance(ModulesToSaveWrapper(nn.Linear(2, 2)), AuxiliaryTrainingWrapper)
    assert not isinstance(nn.Linear(2, 2), AuxiliaryTrainingWrapper)
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.LORA] == "lora_"
    assert Config(task_type=TaskType.CAUSAL_LM).to_dict()["task_type"] == "CAUSAL_LM"


def test_the_names_of_methods_are_pefts():
    assert {one.value for one in adapters.PeftType} == {one.value for one in peft.PeftType}


def test_every_method_has_its_config_and_its_layer():
    for config in config_types().values():
        if config.__module__.startswith("torchgraft.") and config.method.name in peft.PeftType.__members__:
            offered = MODULES[f"peft.tuners.{config.method.name.lower()}"]
            assert offered[config.__name__] is config is MODULES["peft"][config.__name__]
            assert config.__name__.replace("Config", "Layer") in offered or not config.method.kinds


def test_targets_by_type_of_model_are_pefts_and_more():
    for name, table in MODULES["peft.utils.constants"].items():
        if "MODULES_MAPPING" in name:
            theirs = getattr(REAL["peft.utils.constants"], name)
            assert {**table, **theirs} == table, name  # LoRA's where a method's own table has none


def test_every_name_is_one_of_pefts():
    for name, offered in MODULES.items():
        assert not [one for one in offered if not hasattr(REAL[name], one)], name


def test_version_and_spec():
    with as_peft():
        assert importlib.metadata.version("peft") == importlib.import_module("peft").__version__ == "0.22.0"
        assert importlib.metadata.distribution("PEFT").metadata["Name"] == "peft"
        assert importlib.metadata.version("torch")
        assert importlib.util.find_spec("peft").origin == "torchgraft.adapters"
        assert importlib.util.find_spec("peft.tuners.lora") is not None
        assert importlib.util.find_spec("torch.nn") is not None
    with as_peft("9.1"):
        assert importlib.metadata.version("peft") == importlib.import_module("peft").__version__ == "9.1"


def test_modules_are_found_again_when_somebody_drops_them():
    with as_peft():
        first = sys.modules.pop("peft.functional")
        assert importlib.import_module("peft.functional") is first
        assert importlib.reload(importlib.import_module("peft")) is sys.modules["peft"]


def test_modules_stay_the_same_from_one_alias_to_the_next():
    with as_peft():
        first = real_modules()
    with as_peft():
        assert real_modules() == first


def test_aliases_nest_and_close_once():
    outer, inner = as_peft(), as_peft("9.9")
    assert importlib.metadata.version("peft") == "0.22.0"
    outer.close()
    outer.close()
    assert outer.closed and not inner.closed
    assert sys.modules["peft"] is not peft
    inner.close()
    assert sys.modules["peft"] is peft


def test_an_error_inside_ends_the_alias():
    with pytest.raises(KeyError), as_peft():
        raise KeyError
    assert sys.modules["peft"] is peft


@pytest.mark.parametrize(
    ("statement", "error", "words"),
    [
        ("import peft.tuners.lora.arrow", ImportError, r"no 'arrow' in peft.tuners.lora; did you mean 'ArrowConfig'"),
        ("from peft import nothing_like_it", ImportError, r"no 'nothing_like_it' in peft; dir\(peft\) has its names\."),
        ("from peft import LoRAConfig", ImportError, r"no 'LoRAConfig' in peft; did you mean 'LoraConfig'\?"),
        ("import peft; peft.functional.set_adapte", AttributeError, r"did you mean 'set_adapter'\?"),
    ],
)
def test_names_that_are_not_here(statement, error, words):
    with as_peft(), pytest.raises(error, match=rf"torchgraft stands in for peft here .*{words}.* Leave as_peft\(\)"):
        exec(statement)


def test_names_of_methods_that_are_not_here_are_an_error_when_used():
    with as_peft():
        from peft import PrefixTuningConfig, PromptLearningConfig, PromptTuningInit
        from peft.tuners.shadow import ShadowLayer
    config = LoraConfig(target_modules=["0"])
    assert not isinstance(config, (PrefixTuningConfig, PromptLearningConfig))
    assert not isinstance(inject_adapter_in_model(config, nn.Sequential(nn.Linear(2, 2)))[0], ShadowLayer)
    with pytest.raises(UnsupportedCall, match=r"PrefixTuningConfig is of the method PREFIX_TUNING, which .* not have"):
        PrefixTuningConfig(num_virtual_tokens=4)
    with pytest.raises(AttributeError, match=r"PromptTuningInit.RANDOM: .* the method PROMPT_TUNING"):
        PromptTuningInit.RANDOM  # noqa: B018


def test_each_of_pefts_configs_is_there_or_stands_for_a_method_that_is_not():
    for method, config in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING.items():
        here = MODULES["peft"][config.__name__]
        assert (here.__name__, method.value in config_types()) == (config.__name__, not isinstance(here, Absent))


def test_programs_that_wrap_run():
    with as_peft():
        from peft import LoraConfig as Config
        from peft import LoraModel, PeftModel, TaskType, get_peft_model

        model = get_peft_model(nn.Sequential(nn.Linear(2, 2)), Config(target_modules=["0"]))
    assert isinstance(model, PeftModel) and isinstance(model.base_model, LoraModel)
    assert isinstance(model.base_model.model[0], adapters.BaseTunerLayer) and TaskType.CAUSAL_LM == "CAUSAL_LM"


def test_instances():
    with as_peft():
        from peft import PeftModel
        from peft.tuners.ia3 import IA3Layer
        from peft.tuners.lora import LoraLayer
    ours = inject_adapter_in_model(LoraConfig(target_modules=["0"]), nn.Sequential(nn.Linear(2, 2)))
    assert not isinstance(ours, PeftModel)
    assert isinstance(ours[0], LoraLayer) and not isinstance(ours[0], IA3Layer)
    inject_adapter_in_model(IA3Config(target_modules=["0"]), ours, "other")
    assert isinstance(ours[0], IA3Layer)
    assert not isinstance(ours[0].base_layer, LoraLayer)


def test_weight_mapping_needs_transformers(monkeypatch):
    monkeypatch.delitem(sys.modules, "transformers.core_model_loading", raising=False)
    with as_peft():
        from peft.utils.transformers_weight_conversion import build_peft_weight_mapping
    with pytest.raises(ImportError, match="transformers"):
        build_peft_weight_mapping([], "default")


def test_threads_that_open_and_close():
    wrong = []

    def work():
        for _ in range(100):
            with as_peft():
                from peft import LoraConfig as Config

                if Config is not LoraConfig or importlib.metadata.version("peft") != "0.22.0":
                    wrong.append(Config)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.slow
def test_importing_torchgraft_opens_none():
    program = "import sys, torchgraft.adapters; print('peft' in sys.modules, len(sys.meta_path))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    bare = subprocess.run(
        [sys.executable, "-c", "import sys; print(len(sys.meta_path))"], capture_output=True, text=True
    )
    assert run.stdout.split() == ["False", bare.stdout.strip()]
