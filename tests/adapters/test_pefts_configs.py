"""PEFT's config objects become ours by their own dict."""

import dataclasses
import json

import peft
import pytest
import torch
from torch import nn

from torchgraft import adapters
from torchgraft.adapters._config.base import config_types

FIELDS = {
    "LoraConfig": {
        "r": 4,
        "rank_pattern": {"q": 2},
        "use_dora": True,
        "init_lora_weights": "eva",
        "eva_config": peft.EvaConfig(rho=3.0),
        "task_type": "CAUSAL_LM",
    },
    "AdaLoraConfig": {"init_r": 5, "total_step": 9},
    "IA3Config": {"feedforward_modules": {"q"}},
    "OFTConfig": {"oft_block_size": 4},
    "LoHaConfig": {"r": 3, "rank_dropout": 0.5},
    "VeraConfig": {"r": 16, "projection_prng_key": 7},
}


@pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'eva'")
@pytest.mark.parametrize("name", FIELDS)
def test_from_dict_takes_pefts_to_dict(name):
    theirs = getattr(peft, name)(target_modules=["q", "v"], **FIELDS[name])
    ours = getattr(adapters, name).from_dict(theirs.to_dict())
    assert type(ours) is getattr(adapters, name) and not ours.unknown_fields
    assert type(adapters.AdapterConfig.from_dict(theirs.to_dict())) is type(ours)
    for field, value in {"target_modules": {"q", "v"}, **FIELDS[name]}.items():
        expected = dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
        found = getattr(ours, field)
        assert (dataclasses.asdict(found) if dataclasses.is_dataclass(found) else found) == expected, field


# -- what a config takes and gives ---------------------------------------------------------------------------------

NEEDED = {"ADALORA": {"total_step": 9}}
OF_PEFT = {cls.method.name for name, cls in vars(adapters).items() if hasattr(cls, "method") and hasattr(peft, name)}


@pytest.mark.parametrize("name", sorted(OF_PEFT))
def test_a_config_is_made_of_its_own_dict_and_of_pefts(name):
    ours = config_types()[name]
    config = ours(target_modules=["q", "v"], task_type="CAUSAL_LM", **NEEDED.get(name, {}))
    assert ours(**config.to_dict()) == config == adapters.AdapterConfig.from_peft_type(**config.to_dict())
    assert adapters.get_peft_config(config.to_dict()) == config
    assert config.target_modules == {"q", "v"} and config.peft_version == adapters._config.base.PEFT_VERSION
    theirs = getattr(peft, ours.__name__)(target_modules=["q", "v"], **NEEDED.get(name, {}))
    assert (config.peft_type, config.target_modules) == (theirs.peft_type, set(theirs.target_modules))
    fields = theirs.to_dict()
    assert ours(**{field: value for field, value in fields.items() if field != "runtime_config"}).peft_type == name
    assert not config.is_prompt_learning and not config.is_adaption_prompt


@pytest.mark.parametrize("task", [*peft.TaskType, None])
def test_tasks_are_pefts(task):
    assert adapters.LoraConfig(task_type=task).task_type == task
    assert {*adapters.TaskType} == {one.value for one in peft.TaskType}


REFUSED = {
    "task": (
        lambda: adapters.LoraConfig(task_type="CAUSAL"),
        r"task_type is 'CAUSAL', expected one of \['CAUSAL_LM', ",
    ),
    "a task's case": (lambda: adapters.LoraConfig(task_type="seq_cls"), r"or None; did you mean 'SEQ_CLS'\?"),
    "type": (lambda: adapters.LoraConfig(peft_type="IA3"), "peft_type is 'IA3', expected 'LORA'; AdapterConfig.from_"),
    "type later": (lambda: setattr(adapters.LoraConfig(), "peft_type", "X"), "peft_type is 'X', expected 'LORA'"),
    "no type": (lambda: adapters.get_peft_config({"peft_type": "X"}), r"peft_type is 'X', expected one of \['ADALORA'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("start", ["OLoRA", "olora", "OLORA", "Gaussian", "GAUSSIAN"])
def test_initialisations_are_read_in_any_case(start):
    model = nn.Sequential(nn.Linear(8, 6))
    state = model.state_dict()
    factors = []
    for library in (adapters, peft):
        made = nn.Sequential(nn.Linear(8, 6))
        made.load_state_dict(state)
        torch.manual_seed(0)
        config = library.LoraConfig(r=2, target_modules=["0"], init_lora_weights=start)
        factors.append(library.inject_adapter_in_model(config, made)[0].lora_A["default"].weight)
    torch.testing.assert_close(*factors)


def test_files_without_a_type_are_read_by_the_class_that_has_one(tmp_path):
    file = tmp_path / "adapter_config.json"
    adapters.LoraConfig(r=3, target_modules=["q"]).save_pretrained(tmp_path)
    fields = json.loads(file.read_text())
    del fields["peft_type"]
    file.write_text(json.dumps(fields))
    for library in (adapters, peft):
        assert library.LoraConfig.from_pretrained(tmp_path).r == 3
    assert adapters.PeftConfig.from_json_file(file) == peft.PeftConfig.from_json_file(file) == fields
    with pytest.raises(ValueError, match=r"has no peft_type, expected the config of an adapter"):
        adapters.PeftConfig.from_pretrained(tmp_path)
    file.write_text(json.dumps({"r": 3, "hidden_size": 8}))
    with pytest.raises(TypeError, match="has no peft_type, and 'hidden_size', which LoraConfig has no field for"):
        adapters.LoraConfig.from_pretrained(tmp_path)
    with pytest.raises(TypeError):
        peft.LoraConfig.from_pretrained(tmp_path)


def test_configs_are_found_in_the_hubs_cache(tmp_path):
    repository = tmp_path / "models--who--what"
    adapters.IA3Config(target_modules=["k"]).save_pretrained(repository / "snapshots" / "abc" / "sub")
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text("abc")
    found = adapters.PeftConfig.from_pretrained("who/what", "sub", revision="v1", cache_dir=tmp_path, token="x")
    assert found == adapters.IA3Config(target_modules=["k"])
    with pytest.raises(FileNotFoundError, match="revision 'main' is not in the Hub's cache"):
        adapters.PeftConfig.from_pretrained("who/what", cache_dir=tmp_path)


def test_a_mapping_is_written_where_one_is_given(tmp_path):
    mapping = {"base_model_class": "Mine", "parent_library": "mine"}
    for library in (adapters, peft):
        library.LoraConfig(target_modules=["q"]).save_pretrained(tmp_path, auto_mapping_dict=mapping)
        assert library.PeftConfig.from_pretrained(tmp_path).auto_mapping == mapping


def test_errors_have_pefts_classes():
    assert issubclass(adapters.NoMatchingPeftModuleError, (adapters.PeftError, ValueError))
    for library in (adapters, peft):
        with pytest.raises(library.NoMatchingPeftModuleError):
            library.inject_adapter_in_model(library.LoraConfig(target_modules=["q"]), nn.Sequential(nn.Linear(2, 2)))
    assert issubclass(adapters.PeftWarning, UserWarning)
