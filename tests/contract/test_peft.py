"""Every method beside PEFT's: seeds, state dicts, files and outputs; files and trees of trees here."""

import copy
import dataclasses
import warnings

import optree
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from torchgraft.adapters import (
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_adapter,
    load_config,
    save_adapter,
    set_peft_model_state_dict,
)
from torchgraft.adapters._config.fields import as_json
from torchgraft.functional import bind

from .cases import case, close, same
from .methods import METHODS
from .sites import Conv1D

WRITTEN = ("auto_mapping", "fan_in_fan_out", "inference_mode", "peft_version")
"""Fields that say of a file where it came from."""
PREFIX = "base_model.model."
SHARED = (
    "base_model.frod_",
    *(f"base_model.{method}_{matrix}" for method in ("pvera", "randlora", "vera") for matrix in "AB"),
)
"""What keys of constants that modules share start with."""
AGAIN = (".randlora_A", ".randlora_B")
"""What PEFT's state dicts have once more for each module; see docs/differences.md."""

pytestmark = [
    # PEFT takes the bias of `lora_B` for a part of a sharded weight.
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* LoRA tensor.* have invalid shape"),
    pytest.mark.filterwarnings("ignore:Specified to not (save|load) (projection tensors P|tinylora_P)"),
]


def skip_without_peft(row):
    if row.peft is None:
        pytest.skip("PEFT has no such method")


def config_of_peft(row, config, **more):
    """Return PEFT's config with the fields that differ here from the defaults."""
    skip_without_peft(row)
    defaults, cls = type(config)(), getattr(peft, type(config).__name__)
    fields = {name: value for name, value in vars(config).items() if value != getattr(defaults, name)}
    names = {field.name for field in dataclasses.fields(cls)}
    fields = {name: value for name, value in {**fields, **row.peft, **more}.items() if name in names}
    return cls(**copy.deepcopy(fields))


def theirs(one, seed=7):
    """Return PEFT's model with PEFT's adapter, from the same weights."""
    config = config_of_peft(
        one.row, one.config, **({"fan_in_fan_out": True} if isinstance(one.model.first, Conv1D) else {})
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        return peft.get_peft_model(copy.deepcopy(one.model), config, autocast_adapter_dtype=False).eval()


def mine(one, seed=7):
    torch.manual_seed(seed)
    return inject_adapter_in_model(one.config, copy.deepcopy(one.model))


def state_of(model):
    """Return PEFT's state dict without the prefix of its wrapper."""
    return once({key.removeprefix(PREFIX): tensor for key, tensor in peft.get_peft_model_state_dict(model).items()})


def once(state):
    """Return a state dict without what is there once more."""
    return {key: tensor for key, tensor in state.items() if key.startswith(SHARED) or not key.endswith(AGAIN)}


def test_fields_and_their_defaults_are_pefts(name):
    mine, expected = (
        METHODS[name].config.to_dict(),
        as_json(config_of_peft(METHODS[name], METHODS[name].config).to_dict()),
    )
    assert mine.keys() == expected.keys()
    assert {field: (mine[field], expected[field]) for field in mine if mine[field] != expected[field]} == {}


def test_state_dicts_and_seeds_are_pefts(name, site):
    one = case(name, site, torch.float32)
    state, expected = get_peft_model_state_dict(mine(one)), state_of(theirs(one))
    assert {key: (t.shape, t.dtype) for key, t in state.items()} == {
        key: (t.shape, t.dtype) for key, t in expected.items()
    }
    close(dict(state), expected, torch.float32)


def test_seeds_are_pefts_bit_for_bit(name, site):
    one = case(name, site, torch.float32)
    assert same(dict(sorted(get_peft_model_state_dict(mine(one)).items())), dict(sorted(state_of(theirs(one)).items())))


def test_outputs_are_pefts_with_either_ones_parameters(name, site):
    one = case(name, site, torch.float32)
    model, other = mine(one), theirs(one)
    fixed = {key for key, t in state_of(other).items() if key.startswith(SHARED) or not t.is_floating_point()}
    state = {key: t if key in fixed else t + 0.3 * torch.randn_like(t) for key, t in state_of(other).items()}
    assert set_peft_model_state_dict(model, state) == ([], [])
    peft.set_peft_model_state_dict(
        other, {key if key.startswith("base_model.") else PREFIX + key: t for key, t in state.items()}
    )
    close(model(one.x), one.row.call(other, one.x), torch.float32)
    assert same(dict(sorted(get_peft_model_state_dict(model).items())), dict(sorted(state_of(other).items())))


def test_files_go_to_peft_and_back(name, site, tmp_path):
    one = case(name, site, torch.float32)
    skip_without_peft(one.row)
    save_adapter(one.graft, tmp_path / "mine", params=one.params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = peft.PeftModel.from_pretrained(
            copy.deepcopy(one.model), tmp_path / "mine", autocast_adapter_dtype=False
        ).eval()
        close(one.graft(one.params, one.x), one.row.call(other, one.x), torch.float32)
        other.save_pretrained(tmp_path / "theirs")
    files = [once(load_file(tmp_path / whose / "adapter_model.safetensors")) for whose in ("mine", "theirs")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    graft = bind(one.model, load_config(tmp_path / "theirs"))
    assert same(load_adapter(graft, tmp_path / "theirs"), one.params)
    close(graft(one.params, one.x), one.graft(one.params, one.x), torch.float32)


def test_saved_and_loaded_is_the_same_bit_for_bit(name, site, tmp_path):
    one = case(name, site)
    save_adapter(one.graft, tmp_path, params=one.params)
    config = load_config(tmp_path)
    assert config == dataclasses.replace(one.config, **{name: getattr(config, name) for name in WRITTEN})
    graft = bind(one.model, config)
    assert same(load_adapter(graft, tmp_path), one.params)
    assert torch.equal(graft(one.params, one.x), one.graft(one.params, one.x))


def test_trees_of_safetensors(name, site, tmp_path):
    one = case(name, site)
    paths, leaves, treedef = optree.tree_flatten_with_path(one.params)
    save_file({".".join(path): leaf for path, leaf in zip(paths, leaves, strict=True)}, tmp_path / "a.safetensors")
    loaded = load_file(tmp_path / "a.safetensors")
    assert same(optree.tree_unflatten(treedef, [loaded[".".join(path)] for path in paths]), one.params)
