"""What files tell without a model: PEFT's and torchgraft's, sound and odd."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from torchgraft.adapters import (
    AdaLoraConfig,
    DeloraConfig,
    GraloraConfig,
    HiraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    VeraConfig,
    inspect_adapter,
    save_adapter,
)
from torchgraft.functional import bind

BOTH = ["a", "b.c"]
CONFIGS = {
    "lora": (LoraConfig(r=2, rank_pattern={"a": 3}, use_dora=True, target_modules=BOTH), (2, 3)),
    "whole": (LoraConfig(r=2, bias="all", modules_to_save=["head"], target_modules=BOTH), (2,)),
    "tokens": (LoraConfig(r=2, trainable_token_indices={"embed": [1]}, target_modules=[*BOTH, "d"]), (2,)),
    "experts": (LoraConfig(r=2, target_parameters=["a.weight"]), (2,)),
    "adalora": (AdaLoraConfig(init_r=5, target_modules=BOTH), (5,)),
    "loha": (LoHaConfig(r=3, target_modules=BOTH), (3,)),
    "vera": (VeraConfig(r=4, target_modules=BOTH), (4,)),
    "ia3": (IA3Config(target_modules=BOTH, feedforward_modules=["a"]), ()),
    "oft": (OFTConfig(oft_block_size=2, target_modules=BOTH), ()),
}


def model():
    torch.manual_seed(0)
    parts = {"a": nn.Linear(4, 4), "b": nn.ModuleDict({"c": nn.Linear(4, 4)}), "d": nn.Embedding(5, 4)}
    return nn.ModuleDict({**parts, "embed": nn.Embedding(5, 4), "head": nn.Linear(4, 2)})


def saved(folder, config):
    graft = bind(model(), config, allow_unreached=True)
    return save_adapter(graft, folder, params=graft.init())


def changed(folder, change=lambda tensors: None, **fields):
    """Write other tensors or fields into the files of an adapter."""
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text()) | fields
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return inspect_adapter(folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_sound_file_has_its_facts_and_nothing_odd(name, tmp_path):
    config, ranks = CONFIGS[name]
    found = inspect_adapter(saved(tmp_path, config))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert (found.method, found.ranks, found.odd) == (config.method.name, ranks, ())
    assert found.parameters == sum(t.numel() for t in tensors.values())
    assert found.bytes == sum(t.nbytes for t in tensors.values()) and found.dtypes == ("float32",)
    targets = {"experts": ["a"], "tokens": [*BOTH, "d"]}.get(name, BOTH)
    assert sorted(found.targets) == targets and type(found.config) is type(config)


def test_pefts_own_file(tmp_path):
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    config = peft.LoraConfig(r=2, target_modules=["0", "1"])
    base.name_or_path = "some/base"
    peft.get_peft_model(base, config).save_pretrained(tmp_path, save_embedding_layers=False)
    found = inspect_adapter(tmp_path)
    assert (found.method, found.targets, found.ranks, found.base, found.odd) == (
        "LORA",
        ("0", "1"),
        (2,),
        "some/base",
        (),
    )
    assert str(found).splitlines()[1:] == [
        "method   LORA",
        "base     some/base",
        "modules  2: '0', '1'",
        "rank     2",
        "size     32 parameters, 128 bytes, float32",
    ]


ODD = {
    "a key of another form": (
        lambda tensors: tensors.update({"lora_unet_a.lora_down.weight": torch.zeros(2)}),
        {},
        "'lora_unet_a.lora_down.weight': no tensor of LORA",
    ),
    "a pair that is not one": (
        lambda tensors: tensors.pop("base_model.model.a.lora_B.weight"),
        {},
        "'a': only lora_A, where others have lora_A, lora_B",
    ),
    "another dtype": (
        lambda tensors: tensors.update({k: t.half() for k, t in tensors.items() if "lora_A" in k}),
        {},
        "tensors have several dtypes: float16, float32",
    ),
    "a target without tensors": (
        lambda tensors: None,
        {"target_modules": ["a", "c", "z"]},
        "no tensors for the targets 'z'",
    ),
    "tensors without a target": (lambda tensors: None, {"target_modules": ["a"]}, "'b.c': not among the config's"),
    "no expression": (lambda tensors: None, {"target_modules": "(a"}, "target_modules"),
    "another rank": (lambda tensors: None, {"r": 7}, "the config gives rank 7, pattern none, and the tensors have"),
    "a newer field": (lambda tensors: None, {"frobnicate": 1}, "unknown fields ['frobnicate']"),
    "a number": (
        lambda tensors: tensors.update({"base_model.model.a.lora_A.weight": torch.tensor(1.0)}),
        {},
        "config and tensors do not fit",
    ),
    "no values": (
        lambda tensors: tensors.update({"base_model.model.a.lora_A.weight": torch.zeros(0, 4)}),
        {},
        "'base_model.model.a.lora_A.weight': without values",
    ),
    "none of the method": (lambda tensors: tensors.clear(), {}, "no tensor of LORA"),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_odd_is_said(name, tmp_path):
    change, fields, words = ODD[name]
    found = changed(saved(tmp_path, LoraConfig(r=2, target_modules=BOTH)), change, **fields)
    assert [what for what in found.odd if words in what], found.odd
    assert f"odd      {found.odd[0]}" in str(found)


@pytest.mark.parametrize(
    ("fields", "method", "words"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "PROMPT_TUNING", "cannot be loaded here: peft_type is 'PROMPT_TUNING'"),
        ({"use_qalora": True}, "LORA", "cannot be loaded here: LoraConfig: use_qalora is True"),
        ({"r": "many"}, "LORA", "cannot be loaded here: "),
    ],
)
def test_what_has_no_config_here_is_told_all_the_same(fields, method, words, tmp_path):
    found = changed(saved(tmp_path, LoraConfig(r=2, target_modules=BOTH)), **fields)
    assert found.config is None and found.method == method and found.odd[0].startswith(words)
    assert found.parameters == 2 * 2 * 8 and not found.targets and "modules  none" in str(found)


def test_damaged_files_and_pickles_are_errors(tmp_path):
    folder = saved(tmp_path, LoraConfig(r=2, target_modules=BOTH))
    (folder / "adapter_model.bin").write_bytes(b"\x80never read")
    assert inspect_adapter(folder).odd == ("adapter_model.bin is there too, a pickle, which is never read",)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is cut off"):
        inspect_adapter(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="a pickle, which is never read here"):
        inspect_adapter(folder)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        inspect_adapter(tmp_path / "other")


def test_ranks_are_told_of_methods_whose_tensors_do_not_tell(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8))
    for config, ranks in (
        (GraloraConfig(r=4, target_modules=["0"]), (4,)),
        (HiraConfig(r=3, target_modules=["0"]), (3,)),
        (DeloraConfig(r=2, target_modules=["0"]), (2,)),
        (IA3Config(target_modules=["0"], feedforward_modules=[]), ()),
    ):
        graft = bind(model, config)
        save_adapter(graft, tmp_path, params=graft.init())
        assert inspect_adapter(tmp_path).ranks == ranks and not inspect_adapter(tmp_path).odd
