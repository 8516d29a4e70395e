"""LN tuning and trainable tokens: methods that replace tensors of the base, beside PEFT's."""

import copy
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from torchgraft.adapters import (
    LNTuningConfig,
    TrainableTokensConfig,
    extract_params,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_adapter,
    load_config,
    merge_and_unload,
    save_adapter,
    set_peft_model_state_dict,
)
from torchgraft.functional import bind, merge, route, stack


class Model(nn.Module):
    """Embeddings, a norm, and an output layer that may have the embeddings' matrix."""

    def __init__(self, tied=False):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 9, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def get_input_embeddings(self):
        return self.embed

    def forward(self, ids):
        return self.head(self.norm(self.embed(ids)))


IDS = torch.arange(9).view(3, 3)
CASES = {
    "norms": (LNTuningConfig, {"target_modules": ["norm"]}),
    "norms and a head": (LNTuningConfig, {"target_modules": ["norm"], "modules_to_save": ["head"]}),
    "tokens": (TrainableTokensConfig, {"token_indices": [5, 2], "target_modules": ["embed"]}),
}
EVERY = pytest.mark.parametrize(("config", "fields"), CASES.values(), ids=CASES)


def built(tied=False):
    torch.manual_seed(0)
    return Model(tied)


def moved(tree, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        path: {leaf: t + torch.randn(t.shape, generator=generator) for leaf, t in leaves.items()}
        for path, leaves in tree.items()
    }


def theirs(config, fields):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(built(), getattr(peft, config.__name__)(**copy.deepcopy(fields)))


def expected(tree, ids):
    """Return the output of a model whose tensors were set by hand."""
    model = built()
    with torch.no_grad():
        for path, leaves in tree.items():
            for leaf, value in leaves.items():
                if leaf == "trainable_tokens_delta":
                    model.get_submodule(path).weight[[5, 2]] = value
                else:
                    getattr(model.get_submodule(path), leaf).copy_(value)
    return model(ids)


@EVERY
def test_outputs_rows_and_merged_weights_are_those_of_a_model_with_such_tensors(config, fields):
    model = built()
    graft = bind(model, config(**fields))
    initial = graft.init()
    assert torch.equal(graft(initial, IDS), model(IDS))
    trees = [moved(initial, seed) for seed in range(2)]
    outputs = [expected(tree, IDS) for tree in trees]
    torch.testing.assert_close(graft(trees[0], IDS), outputs[0])
    torch.testing.assert_close(torch.vmap(graft, in_dims=(0, None))(stack(trees), IDS), torch.stack(outputs))
    routed = graft(route(stack(trees), torch.tensor([1, -1, 0])), IDS)
    torch.testing.assert_close(routed, torch.stack([outputs[1][0], model(IDS)[1], outputs[0][2]]))
    twin = built()
    twin.load_state_dict(merge(graft, trees[0]))
    torch.testing.assert_close(twin(IDS), outputs[0])
    grads = torch.func.grad(lambda tree: graft(tree, IDS).square().sum())(trees[0])
    assert all(g.abs().sum() > 0 for leaves in grads.values() for g in leaves.values())


@EVERY
def test_state_dicts_and_files_are_pefts_both_ways(config, fields, tmp_path):
    model = built()
    graft = bind(model, config(**fields))
    params = moved(graft.init())
    save_adapter(graft, tmp_path / "mine", params=params)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = peft.PeftModel.from_pretrained(built(), tmp_path / "mine")
    torch.testing.assert_close(other(IDS), graft(params, IDS))
    other.save_pretrained(tmp_path / "theirs")
    files = [load_file(tmp_path / whose / "adapter_model.safetensors") for whose in ("mine", "theirs")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    again = bind(model, load_config(tmp_path / "theirs"))
    torch.testing.assert_close(again(load_adapter(again, tmp_path / "theirs"), IDS), graft(params, IDS))
    loaded = copy.deepcopy(model)
    load_adapter(loaded, tmp_path / "theirs")
    torch.testing.assert_close(loaded(IDS), graft(params, IDS))


@EVERY
def test_in_place_is_functional_and_state_dicts_are_pefts(config, fields):
    model = built()
    injected = inject_adapter_in_model(config(**fields), copy.deepcopy(model))
    other = theirs(config, fields)
    state = get_peft_model_state_dict(injected)
    expected = {key.removeprefix("base_model.model."): t for key, t in peft.get_peft_model_state_dict(other).items()}
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
    changed = {key: tensor + 1.0 + torch.arange(tensor.numel()).view_as(tensor) for key, tensor in expected.items()}
    assert set_peft_model_state_dict(injected, changed) == ([], [])
    peft.set_peft_model_state_dict(other, {f"base_model.model.{key}": t for key, t in changed.items()})
    torch.testing.assert_close(injected(IDS), other(IDS))
    graft = bind(model, config(**fields))
    torch.testing.assert_close(graft(extract_params(injected), IDS), other(IDS))
    assert sum(p.numel() for p in injected.parameters() if p.requires_grad) == sum(t.numel() for t in state.values())
    y = injected(IDS)
    torch.testing.assert_close(merge_and_unload(injected)(IDS), y)


def test_fields_are_pefts():
    for config, fields in CASES.values():
        given, names = config(**fields).to_dict(), getattr(peft, config.__name__)(**fields).to_dict()
        assert given.keys() == names.keys()


def test_a_tied_output_layer_has_the_same_rows():
    model = built(tied=True)
    graft = bind(model, TrainableTokensConfig(token_indices=[5, 2]))
    params = moved(graft.init())
    assert list(params) == ["embed"]
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.embed.weight[[5, 2]] = params["embed"]["trainable_tokens_delta"]
    torch.testing.assert_close(graft(params, IDS), twin(IDS))


def test_errors_say_what_is_missing():
    for config, words in (
        (LNTuningConfig(target_modules=["drop"]), "names drop, a Dropout, which has no parameters"),
        (LNTuningConfig(target_modules=["nowhere"]), "nowhere"),
        (TrainableTokensConfig(target_modules=["0"]), "token_indices is \\[\\], expected the tokens to train"),
        (TrainableTokensConfig(token_indices=[9], target_modules=["embed"]), "rows are \\[9\\], expected indices"),
        (TrainableTokensConfig(token_indices=[1]), "does not say which are its input embeddings"),
    ):
        model = nn.ModuleDict({"embed": nn.Embedding(9, 2), "drop": nn.Dropout(), "0": nn.Embedding(3, 2)})
        with pytest.raises(ValueError, match=words):
            bind(model, config)
    with pytest.raises(ValueError, match="init_weights is False, expected True"):
        TrainableTokensConfig(token_indices=[1], init_weights=False)
