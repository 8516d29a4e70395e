"""TinyLoRA against its equation and against PEFT: ties, seeds, ranks, what files hold, second adapters."""

import peft
import pytest
import safetensors.torch
import torch
from torch import nn

from torchgraft.adapters import (
    TinyLoraConfig,
    extract_params,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_adapter,
    load_config,
    save_adapter,
    set_adapter,
)
from torchgraft.functional import bind, merge

pytestmark = [
    pytest.mark.filterwarnings("ignore:Specified to not (save|load) (projection tensors P|tinylora_P)"),
    pytest.mark.filterwarnings("ignore:Found missing adapter keys .*tinylora_P"),
]
FIELDS = {"r": 2, "u": 5, "init_weights": "uniform", "target_modules": ["0", "1", "3", "5"]}
IDS = torch.arange(9).view(3, 3)


def net(dtype=torch.float32):
    torch.manual_seed(0)
    layers = [nn.Embedding(9, 8), nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 1)]
    return nn.Sequential(*layers).to(dtype)


def made(**fields):
    graft = bind(net(), TinyLoraConfig(**{**FIELDS, **fields}))
    params = graft.init(torch.Generator().manual_seed(0))
    return graft, {"*": {name: v + i + 1 for i, (name, v) in enumerate(params["*"].items())}}


def theirs(seed=3, **fields):
    torch.manual_seed(seed)
    return peft.get_peft_model(net(), peft.TinyLoraConfig(**{**FIELDS, **fields}))


@pytest.mark.parametrize("save", [True, False])
@pytest.mark.parametrize("tying", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_ties_seeds_and_numbers_are_pefts(tying, save):
    fields = {"weight_tying": tying, "save_projection": save, "projection_seed": 5}
    other = theirs(**fields)
    torch.manual_seed(3)
    model = inject_adapter_in_model(TinyLoraConfig(**{**FIELDS, **fields}), net())
    expected = {key.removeprefix("base_model.model."): t for key, t in peft.get_peft_model_state_dict(other).items()}
    state = get_peft_model_state_dict(model)
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
    torch.testing.assert_close(model(IDS), other(IDS))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (
        trained == sum(p.numel() for p in other.parameters() if p.requires_grad) == 5 * len(extract_params(model)["*"])
    )


def test_ranks_are_at_most_a_weights_smaller_size():
    graft, _ = made(r=6)
    ranks = {path: len(site.constants.tinylora_A) for path, site in graft.sites[""].items()}
    assert ranks == {"0": 6, "1": 6, "3": 4, "5": 1}
    model = inject_adapter_in_model(TinyLoraConfig(**{**FIELDS, "r": 6}), net())
    assert [model[i].r["default"] for i in (0, 1, 3, 5)] == [6, 6, 4, 1] and model[1].u["default"] == 5


def test_a_merged_weight_stays_between_the_first_singular_vectors():
    graft, params = made()
    state, weight = merge(graft, params), net()[1].weight.detach().double()
    u, _, v = torch.linalg.svd(weight)
    delta = state["1.weight"].double() - weight
    inside = u[:, :2] @ u[:, :2].T @ delta @ v[:2].T @ v[:2]
    torch.testing.assert_close(inside, delta, rtol=1e-4, atol=1e-5)
    assert delta.norm() > 0.1


@pytest.mark.parametrize("save", [True, False])
def test_files_go_to_peft_and_back(save, tmp_path):
    graft, params = made(save_projection=save, weight_tying=0.5)
    save_adapter(graft, tmp_path / "mine", params=params)
    y = graft(params, IDS)
    other = peft.PeftModel.from_pretrained(net(), tmp_path / "mine")
    torch.testing.assert_close(other(IDS), y)
    other.save_pretrained(tmp_path / "theirs")
    files = [safetensors.torch.load_file(tmp_path / one / "adapter_model.safetensors") for one in ("mine", "theirs")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    assert any(key.endswith("tinylora_P") for key in files[0]) == save
    again = bind(net(), load_config(tmp_path / "theirs"))
    torch.testing.assert_close(again(load_adapter(again, tmp_path / "theirs"), IDS), y)
    torch.testing.assert_close(load_adapter(net(), tmp_path / "theirs")(IDS), y)


def test_a_model_takes_the_files_frozen_tensors_and_a_graft_refuses_others(tmp_path):
    graft, params = made()
    save_adapter(graft, tmp_path, params=params)
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    flipped = {key: -t if ".1.tinylora_A" in key or ".1.tinylora_B" in key else t for key, t in tensors.items()}
    flipped["base_model.model.3.tinylora_P"] = 2 * flipped["base_model.model.3.tinylora_P"]
    safetensors.torch.save_file(flipped, file)
    expected = peft.PeftModel.from_pretrained(net(), tmp_path)(IDS)
    model = load_adapter(net(), tmp_path)
    torch.testing.assert_close(model(IDS), expected)
    assert not torch.allclose(expected, graft(params, IDS))
    assert not model[1].tinylora_A["default"].requires_grad
    with pytest.raises(ValueError, match="tinylora_A' is not what this graft has made of the base's weights"):
        load_adapter(graft, tmp_path)


def test_a_file_of_vectors_of_another_size_is_an_error(tmp_path):
    graft, params = made()
    save_adapter(graft, tmp_path, params=params)
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"u": 5', '"u": 1000000'))
    with pytest.raises(ValueError, match=r"u is 1000000, and tinylora_v.0 has shape \(5,\), expected \(u,\)"):
        load_adapter(net(), tmp_path)


def test_a_second_adapter_has_its_own_projections():
    model = inject_adapter_in_model(TinyLoraConfig(**FIELDS), net())
    own = TinyLoraConfig(**{**FIELDS, "target_modules": ["3", "5"]})
    inject_adapter_in_model(own, model, "other")
    set_adapter(model, "other")
    alone = bind(net(), own)
    torch.testing.assert_close(alone(extract_params(model, "other"), IDS), model(IDS))


def test_dropout_of_an_embedding_is_on_the_rows_of_b():
    graft, params = made(tinylora_dropout=0.5, target_modules=["0"])
    other = theirs(tinylora_dropout=0.5, target_modules=["0"])
    with torch.no_grad():
        other.base_model.tinylora_v["default"]["0"].copy_(params["*"]["tinylora_v.0"])
    torch.manual_seed(8)
    expected = other.train()(IDS)
    torch.manual_seed(8)
    graft.model.train()
    torch.testing.assert_close(graft(params, IDS), expected)
