"""PEFT's config objects become ours by their own dict."""

import dataclasses

import peft
import pytest

from torchgraft import adapters

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
