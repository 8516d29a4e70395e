"""LoRA from fine-tuned models: exact for changes of low rank, from modules and from shards on a disk."""

import copy
import json

import pytest
import safetensors.torch
import torch
from torch import nn

from tests.arithmetic.oracle import Experts, Layers
from torchgraft.adapters import extract_lora
from torchgraft.functional import bind, merge


def tuned_from(base, names, rank=2, seed=0):
    """A copy of a model with a change of a rank added to tensors, all of it float64."""
    generator = torch.Generator().manual_seed(seed)
    tuned = copy.deepcopy(base)
    for name, tensor in tuned.state_dict().items():
        if name in names:
            blocks = tensor if tensor.ndim == 3 and "weights" in name else tensor.flatten(1)
            b = torch.randn(*blocks.shape[:-1], rank, generator=generator, dtype=torch.float64)
            a = torch.randn(*blocks.shape[:-2], rank, blocks.shape[-1], generator=generator, dtype=torch.float64)
            tensor.add_((b @ a).view_as(tensor))
    return tuned


def assert_is(base, extracted, expected):
    config, params, _ = extracted
    state = merge(bind(base, config), params)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


WEIGHTS = [
    "up.weight", "down.weight", "table.weight", "conv.weight", "grid.weight", "attention.in_proj_weight",
    "attention.out_proj.weight",
]  # fmt: skip


def test_a_change_of_low_rank_is_found_on_each_kind_of_layer():
    base = Layers().double()
    tuned = tuned_from(base, WEIGHTS)
    for rank in (None, 2):
        extracted = extract_lora(base, tuned, rank, dtype=torch.float64)
        assert extracted[0].r == 2 and extracted[0].rank_pattern == {}
        assert extracted[2].relative < 1e-12
        assert_is(base, extracted, tuned)


def test_only_layers_that_changed_are_targets():
    base = Layers().double()
    config, params, _ = extract_lora(base, tuned_from(base, ["up.weight"]), dtype=torch.float64)
    assert config.target_modules == {"up"} and list(params) == ["up"]


def test_experts():
    base = Experts().double()
    tuned = tuned_from(base, ["weights"])
    extracted = extract_lora(base, tuned, dtype=torch.float64)
    assert extracted[0].target_parameters == ["weights"] and extracted[0].r == 2
    assert_is(base, extracted, tuned)


class Small(nn.Module):
    """Names as a checkpoint of a language model has them."""

    def __init__(self, tied=False):
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 6)
        self.layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(6, 8), "down": nn.Linear(8, 6)}) for _ in range(2)])
        self.norm = nn.LayerNorm(6)
        self.lm_head = nn.Linear(6, 11, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight


def write(model, folder, shards=2, **fields):
    """Write a model's tensors as shards with an index, as transformers does; a tied one once."""
    seen, state = set(), {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen:
            state[name] = tensor
        seen.add(tensor.data_ptr())
    folder.mkdir()
    names, placed = list(state), {}
    for i in range(shards):
        own, file = names[i::shards], f"model-{i + 1:05}-of-{shards:05}.safetensors"
        safetensors.torch.save_file({name: state[name] for name in own}, folder / file)
        placed |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


SMALL = ["embed_tokens.weight", "layers.0.up.weight", "layers.1.down.weight", "lm_head.weight"]


def test_shards_are_as_good_as_modules(tmp_path):
    base = Small().double()
    tuned = tuned_from(base, SMALL)
    before, after = write(base, tmp_path / "base"), write(tuned, tmp_path / "tuned", shards=3)
    for given in ((before, after), (base, after), (before, tuned), (base.state_dict(), str(after))):
        extracted = extract_lora(*given, dtype=torch.float64)
        assert extracted[0].target_modules == {"embed_tokens", "layers.0.up", "layers.1.down", "lm_head"}
        assert_is(base, extracted, tuned)


def test_one_tensor_is_in_memory_at_a_time(tmp_path, monkeypatch):
    base = Small().double()
    before, after = write(base, tmp_path / "a"), write(tuned_from(base, SMALL), tmp_path / "b")
    from torchgraft.adapters._files.disk.shards import Shards

    read, alive = Shards.read, []

    def counting(self, name):
        import weakref

        tensor = read(self, name)
        alive[:] = [one for one in alive if one() is not None]
        alive.append(weakref.ref(tensor))
        assert len(alive) <= 4  # this tensor and the one before, of two models
        return tensor

    monkeypatch.setattr(Shards, "read", counting)
    extract_lora(before, after)


@pytest.mark.parametrize("kind", ["modules", "files"])
def test_what_lora_is_not_for_is_refused_saved_or_left(tmp_path, kind):
    base = Small().double()
    tuned = tuned_from(base, ["layers.0.up.weight"])
    with torch.no_grad():
        tuned.norm.weight.add_(1)
    given = (base, tuned) if kind == "modules" else (write(base, tmp_path / "a"), write(tuned, tmp_path / "b"))
    with pytest.raises(ValueError, match=r"'norm.weight' changed too.*pass rest='save'.*or rest='leave'"):
        extract_lora(*given)
    saved = extract_lora(*given, rest="save", dtype=torch.float64)
    assert saved[0].modules_to_save == ["norm"] and sorted(saved[1]["norm"]) == ["bias", "weight"]
    assert_is(base, saved, tuned)
    config, params, report = extract_lora(*given, rest="leave")
    assert not config.modules_to_save and list(params) == ["layers.0.up"]
    assert report.left_out == {"norm.weight": pytest.approx(6**0.5)} and "norm.weight" in str(report)


@pytest.mark.parametrize("kind", ["modules", "files"])
def test_an_embedding_that_is_the_output_layer_too_is_no_lora(tmp_path, kind):
    base = Small(tied=True).double()
    tuned = tuned_from(base, ["embed_tokens.weight", "layers.0.up.weight"])
    given = (base, tuned) if kind == "modules" else (write(base, tmp_path / "a"), write(tuned, tmp_path / "b"))
    with pytest.raises(ValueError, match=r"'embed_tokens.weight'.*changed too"):
        extract_lora(*given)


def test_rank_and_energy():
    base = Small().double()
    tuned = tuned_from(base, ["layers.0.up.weight"], rank=5)
    change = tuned.layers[0]["up"].weight - base.layers[0]["up"].weight
    s = torch.linalg.svdvals(change.detach())
    config, _, report = extract_lora(base, tuned, 2, dtype=torch.float64)
    assert config.r == 2
    assert report.modules["layers.0.up"].error == pytest.approx(float(s[2:].norm()))
    config, _, report = extract_lora(base, tuned, energy=0.9)
    share = s.square().cumsum(0) / s.square().sum()
    assert config.r == int((share < 0.9).sum()) + 1 and report.relative**2 <= 0.1


def test_gpt2s_weights_are_in_out(tmp_path):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    base = nn.ModuleDict({"c_fc": conv1d(7, 5), "head": nn.Linear(5, 3)}).double()
    tuned = tuned_from(base, ["c_fc.weight"])
    fields = {"model_type": "gpt2"}
    extracted = extract_lora(
        write(base, tmp_path / "a", **fields), write(tuned, tmp_path / "b", **fields), dtype=torch.float64
    )
    assert extracted[1]["c_fc"]["lora_A"].shape == (2, 5)
    assert_is(base, extracted, tuned)


def test_errors(tmp_path):
    base = Small()
    with pytest.raises(ValueError, match=r"no layer's weight changed; are base and tuned one model\?"):
        extract_lora(base, base)
    with pytest.raises(ValueError, match=r"tuned lacks 'norm.bias', which the other model has; it has 'norm.weight'"):
        extract_lora(base.norm.state_dict(prefix="norm."), {"norm.weight": torch.ones(6)})
    with pytest.raises(ValueError, match=r"w is \(2, 2\) in base and \(3, 2\) in tuned"):
        extract_lora({"w": torch.ones(2, 2)}, {"w": torch.ones(3, 2)})
    with pytest.raises(ValueError, match=r"rank is 2 and energy 0.5; give one of the two"):
        extract_lora(base, base, 2, energy=0.5)
    with pytest.raises(TypeError, match=r"base is of type int, expected a module, a state dict, or a path"):
        extract_lora(3, base)
    with pytest.raises(FileNotFoundError, match=r"no such file or directory; nothing is downloaded"):
        extract_lora(tmp_path / "none", base)
    folder = write(base, tmp_path / "a")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002.safetensors: is missing, a shard"):
        extract_lora(folder, base)


@pytest.mark.parametrize("kind", ["modules", "files"])
def test_biases_of_layers_are_trained_ones(tmp_path, kind):
    base = Small().double()
    tuned = tuned_from(base, ["layers.0.up.weight", "lm_head.weight"])
    with torch.no_grad():
        tuned.layers[0]["up"].bias.add_(1)
        tuned.layers[1]["down"].bias.add_(1)
    given = (base, tuned) if kind == "modules" else (write(base, tmp_path / "a"), write(tuned, tmp_path / "b"))
    saved = extract_lora(*given, rest="save", dtype=torch.float64)
    assert saved[0].bias == "lora_only" and saved[0].modules_to_save == ["layers.1.down"]
    assert_is(base, saved, tuned)


def test_numbers_that_stand_for_others_are_no_weights():
    old = {"up.weight": torch.ones(4, 4, dtype=torch.uint8)}
    with pytest.raises(ValueError, match="up.weight is torch.uint8 and changed.*dequantized"):
        extract_lora(old, {"up.weight": old["up.weight"] + 1})
    old = {"up.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}
    with pytest.raises(ValueError, match="up.weight is torch.float8_e4m3fn and changed"):
        extract_lora(old, {"up.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn)})


def test_another_dtype_alone_is_no_change():
    base = Small()
    tuned = copy.deepcopy(base).double()
    with torch.no_grad():
        tuned.layers[0]["up"].weight.add_(1)
    config, _, _ = extract_lora(base, tuned)
    assert config.target_modules == {"layers.0.up"} and config.r == 1
