"""VB-LoRA against PEFT: draws, files of all logits and of the chosen vectors alone, training on either."""

import json

import peft
import pytest
import safetensors.torch
import torch
from torch import nn

from torchgraft.adapters import (
    VBLoRAConfig,
    extract_params,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_adapter,
    load_config,
    merge_adapter,
    save_adapter,
    set_adapter,
    set_peft_model_state_dict,
)
from torchgraft.functional import UnsupportedCall, bind, route, stack, value_and_grad

FIELDS = {"r": 3, "num_vectors": 9, "vector_length": 4, "topk": 3, "target_modules": ["0", "2"]}
PACKED = {**FIELDS, "save_only_topk_weights": True}
X = torch.randn(6, 8, generator=torch.Generator().manual_seed(5))


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 4)).to(dtype)


def away(params, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        path: {leaf: t + torch.randn(t.shape, generator=generator).to(t) for leaf, t in leaves.items()}
        for path, leaves in params.items()
    }


def made(dtype=torch.float32, **fields):
    graft = bind(net(dtype), VBLoRAConfig(**{**FIELDS, **fields}))
    return graft, away(graft.init(torch.Generator().manual_seed(0), dtype=dtype))


def test_draws_are_pefts_and_the_last_bank_stays():
    torch.manual_seed(3)
    theirs = peft.get_peft_model(net(), peft.VBLoRAConfig(**FIELDS))
    torch.manual_seed(3)
    model = inject_adapter_in_model(VBLoRAConfig(**FIELDS), net())
    expected = {
        key.removeprefix("base_model.model."): one for key, one in peft.get_peft_model_state_dict(theirs).items()
    }
    state = get_peft_model_state_dict(model)
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
    assert model[0].vblora_vector_bank is model[2].vblora_vector_bank
    assert sum(p.requires_grad for p in model.parameters()) == sum(p.requires_grad for p in theirs.parameters()) == 5


@pytest.mark.parametrize("topk", [1, 3])
def test_files_of_chosen_vectors_are_pefts_both_ways(topk, tmp_path):
    graft, params = made(**{**PACKED, "topk": topk})
    save_adapter(graft, tmp_path / "mine", params=params)
    y = graft(params, X)
    theirs = peft.PeftModel.from_pretrained(net(), tmp_path / "mine")
    torch.testing.assert_close(theirs(X), y)
    model = inject_adapter_in_model(graft.configs[""], net(), params=params)
    packed = get_peft_model_state_dict(model)
    file = safetensors.torch.load_file(tmp_path / "mine" / "adapter_model.safetensors")
    assert sorted(key.removeprefix("base_model.model.") for key in file) == sorted(packed)
    assert packed["0.vblora_logits_A_topk_indices"].dtype == torch.uint8
    assert packed["0.vblora_logits_B_topk_weights"].shape == (3, 3, topk - 1)
    theirs.save_pretrained(tmp_path / "theirs")
    written = safetensors.torch.load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert {key: (t.shape, t.dtype) for key, t in written.items()} == {k: (t.shape, t.dtype) for k, t in file.items()}
    for folder in ("mine", "theirs"):
        again = bind(net().eval(), load_config(tmp_path / folder))
        torch.testing.assert_close(again(load_adapter(again, tmp_path / folder, check_finite=True), X), y)
        loaded = load_adapter(net(), tmp_path / folder)
        torch.testing.assert_close(loaded.eval()(X), y)
        merge_adapter(loaded)
        torch.testing.assert_close(loaded(X), y)


@pytest.mark.parametrize("count", [(255, torch.uint8), (256, torch.int16), (40000, torch.int32)])
def test_indices_have_pefts_dtypes(count):
    vectors, dtype = count
    model = inject_adapter_in_model(VBLoRAConfig(**{**PACKED, "num_vectors": vectors, "vector_length": 4}), net())
    state = get_peft_model_state_dict(model)
    assert state["0.vblora_logits_A_topk_indices"].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dicts_of_chosen_vectors(dtype):
    graft, params = made(dtype, **PACKED)
    state = get_peft_model_state_dict(inject_adapter_in_model(graft.configs[""], net(dtype), params=params))
    model = inject_adapter_in_model(graft.configs[""], net(dtype), state_dict=state)
    assert set_peft_model_state_dict(model, state) == ([], [])
    step = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(model.eval()(X.to(dtype)), graft(params, X.to(dtype)), rtol=step, atol=step)


def test_weights_that_add_up_to_more_than_one_by_rounding_are_no_nan():
    graft, params = made(**{**PACKED, "topk": 2})
    model = inject_adapter_in_model(graft.configs[""], net(), params=params)
    state = get_peft_model_state_dict(model)
    key = "0.vblora_logits_A_topk_weights"
    state[key] = torch.full_like(state[key], 1 + torch.finfo(torch.float32).eps)
    set_peft_model_state_dict(model, state)
    assert model.eval()(X).isfinite().all()


DAMAGES = {
    "no weights": (
        lambda s: s.pop("0.vblora_logits_A_topk_weights"),
        "A_topk_indices' without '0.vblora_logits_A_topk_w",
    ),
    "no indices": (
        lambda s: s.pop("0.vblora_logits_A_topk_indices"),
        "A_topk_weights' without '0.vblora_logits_A_topk_i",
    ),
    "outside": (
        lambda s: s["0.vblora_logits_A_topk_indices"].fill_(9),
        "has indices outside 0 to 8, for num_vectors=9",
    ),
    "no shares": (lambda s: s["0.vblora_logits_A_topk_weights"].fill_(2.0), "has weights that are no shares of 1"),
    "nan": (lambda s: s["0.vblora_logits_A_topk_weights"].fill_(float("nan")), "has weights that are no shares of 1"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_chosen_vectors_that_are_wrong_are_errors(damage, tmp_path):
    change, words = DAMAGES[damage]
    graft, params = made(**PACKED)
    model = inject_adapter_in_model(graft.configs[""], net(), params=params)
    state = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    change(state)
    with pytest.raises(ValueError, match=words):
        set_peft_model_state_dict(model, state)
    save_adapter(model, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    change(named := {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()})
    safetensors.torch.save_file(
        {key if key.startswith("base") else f"base_model.model.{key}": tensor for key, tensor in named.items()}, file
    )
    with pytest.raises(ValueError, match=words.replace("'0.", "'base_model.model.0.")):
        load_adapter(net(), tmp_path)


def test_another_topk_than_the_files_is_an_error(tmp_path):
    graft, params = made(**PACKED)
    save_adapter(graft, tmp_path, params=params)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**fields, "topk": 2}))
    with pytest.raises(ValueError, match=r"has shape \(3, 2, 3\) and its weights .*topk=2"):
        load_adapter(net(), tmp_path)


def test_chosen_vectors_alone_cannot_be_trained_on(tmp_path):
    graft, params = made(**PACKED)
    save_adapter(graft, tmp_path, params=params)
    loaded = load_adapter(graft, tmp_path)
    graft.model.train()
    with pytest.raises(UnsupportedCall, match="0: vblora_logits_A is infinite but for the chosen vectors"):
        graft(loaded, X)
    with pytest.raises(UnsupportedCall, match="0: vblora_logits_A is infinite"):
        graft(route(stack([loaded, params]), torch.tensor([0, 1, 0, 1, 0, 1])), X)
    graft.model.eval()
    torch.testing.assert_close(graft(loaded, X), graft(params, X))


def test_a_second_adapter_leaves_the_first_ones_bank():
    graft, params = made()
    model = inject_adapter_in_model(graft.configs[""], net(), params=params)
    inject_adapter_in_model(VBLoRAConfig(**FIELDS), model, "other")
    set_adapter(model, "default")
    torch.testing.assert_close(model(X), graft(params, X))
    assert set(extract_params(model)["*"]) == {"vblora_vector_bank"}


def test_gradients_reach_the_bank_and_the_chosen_logits_alone():
    graft, params = made(torch.float64)
    _, grads = value_and_grad(lambda tree: graft(tree, X.double()).square().sum())(params)
    chosen = torch.zeros_like(params["0"]["vblora_logits_A"]).scatter(
        -1, params["0"]["vblora_logits_A"].topk(3).indices, 1
    )
    assert torch.equal(grads["0"]["vblora_logits_A"] != 0, chosen.bool())
    assert grads["*"]["vblora_vector_bank"].abs().sum() > 0
