"""Two methods on one layer work together, or an error leaves the model as it was."""

import itertools

import pytest
import torch
from torch import nn

from torchgraft import adapters
from torchgraft.adapters import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    OFTConfig,
    VeraConfig,
    adapter_names,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_adapter,
    save_adapter,
    set_adapter,
)
from torchgraft.adapters._inplace.layer.tuner_layer import BaseTunerLayer
from torchgraft.functional import bind

CONFIGS = {
    "lora": lambda: LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False),
    "dora": lambda: LoraConfig(r=2, target_modules=["0", "2"], use_dora=True, init_lora_weights=False),
    "ia3": lambda: IA3Config(target_modules=["0", "2"], feedforward_modules=["2"], init_ia3_weights=False),
    "adalora": lambda: AdaLoraConfig(
        init_r=2, target_r=2, total_step=5, target_modules=["0", "2"], init_lora_weights=False
    ),
    "oft": lambda: OFTConfig(oft_block_size=2, target_modules=["0", "2"], init_weights=False),
    "vera": lambda: VeraConfig(r=2, target_modules=["0", "2"], init_weights=False),
}
PAIRS = list(itertools.permutations(CONFIGS, 2))
CLASH = [pair for pair in PAIRS if "adalora" in pair and set(pair) & {"lora", "dora"}]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()


X = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)


def state(model):
    """All there is to a model: modules, parameters and flags by name, and its adapters."""
    modules = {name: (id(module), repr(module), module.training) for name, module in model.named_modules()}
    tensors = {name: (id(p), p.requires_grad, p._version) for name, p in model.named_parameters()}
    layers = {
        path: (list(layer.entries), list(layer.active_adapters), list(layer.merged_adapters), layer.disable_adapters)
        for path, layer in adapters._inplace.walk.layers(model).items()
    }
    return modules, tensors, layers, adapter_names(model), list(getattr(model, "peft_config", ["none"]))


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [pair for pair in PAIRS if pair not in CLASH])
def test_two_methods_share_a_layer(first, second, tmp_path):
    model, alone = net(), {}
    for name, kind in (("a", first), ("b", second)):
        inject_adapter_in_model(CONFIGS[kind](), model, name)
    for name in ("a", "b"):
        set_adapter(model, name)
        trained = [key for key, p in model.named_parameters() if p.requires_grad]
        assert trained and all(f".{name}" in key for key in trained)
        alone[name] = model(X)
        save_adapter(model, tmp_path, name)
        torch.testing.assert_close(load_adapter(net(), tmp_path / name)(X), alone[name])
        assert all(f".{name}" not in key for key in get_peft_model_state_dict(model, adapter_name=name))
    set_adapter(model, ["a", "b"])
    both = model(X)
    adapters.merge_adapter(model)
    torch.testing.assert_close(model(X), both)
    adapters.unmerge_adapter(model)
    torch.testing.assert_close(model(X), both)
    set_adapter(model, "b")
    adapters.delete_adapter(model, "a")
    assert torch.equal(model(X), alone["b"]) and adapter_names(model) == ["b"]
    assert not [key for key, _ in model.named_parameters() if ".a" in key]
    inject_adapter_in_model(CONFIGS[first](), model, "a")
    set_adapter(model, "b")
    assert torch.equal(model(X), alone["b"])


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(("first", "second"), CLASH)
def test_names_that_clash_are_an_error_that_changes_nothing(first, second, merged):
    model = net()
    inject_adapter_in_model(CONFIGS[first](), model, "a")
    if merged:
        adapters.merge_adapter(model)
    before, y = state(model), model(X)
    with pytest.raises(ValueError, match=r"0: adapter 'a' is (ADA)?LORA, and (ADA)?LORA has another kind of 'lora_A'"):
        inject_adapter_in_model(CONFIGS[second](), model, "b")
    assert state(model) == before
    assert torch.equal(model(X), y)
    bind(net(), {"a": CONFIGS[first](), "b": CONFIGS[second]()})
    if merged:
        adapters.unmerge_adapter(model)
    adapters.delete_adapter(model, "a")
    inject_adapter_in_model(CONFIGS[second](), model, "b")
    assert adapter_names(model) == ["b"]
    fresh = inject_adapter_in_model(CONFIGS[second](), net(), "b")
    assert (
        get_peft_model_state_dict(model, adapter_name="b").keys()
        == get_peft_model_state_dict(fresh, adapter_name="b").keys()
    )


@pytest.mark.parametrize("when", ["first", "second", "merged", "disabled"])
@pytest.mark.parametrize("late", [False, True])
def test_whatever_fails_leaves_the_model_as_it_was(when, late, monkeypatch):
    model = nn.Sequential(*net(), nn.Linear(4, 4).double(), nn.Embedding(5, 4))
    more = {"modules_to_save": ["3"], "trainable_token_indices": {"4": [1]}, "target_modules": ["0", "2"]}
    if when != "first":
        inject_adapter_in_model(LoraConfig(r=2, bias="lora_only", **more), model, "a")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(1)
    if when == "merged":
        adapters.merge_adapter(model)
    elif when == "disabled":
        adapters.disable_adapter_layers(model)
    before, y = state(model), model[:4](X)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls = []

    def fail(self, *args):
        calls.append(self)
        if len(calls) == (3 if late else 2):
            raise RuntimeError("in between")
        return original(self, *args)

    cls, method = (BaseTunerLayer, "activate") if late else (BaseTunerLayer, "add")
    original = getattr(cls, method)
    if late:
        cls, method = (adapters._inplace.beside.tokens.TrainableTokensWrapper, "activate")
        original, calls = getattr(cls, method), [None, None]
    monkeypatch.setattr(cls, method, fail)
    with pytest.raises(RuntimeError, match="in between"):
        inject_adapter_in_model(LoraConfig(r=2, **more), model, "b")
    monkeypatch.undo()
    after = state(model)
    if when == "merged":  # its weights were taken out and put in again
        before, after = ({0: one[0], 2: one[2:], 3: {k: v[:2] for k, v in one[1].items()}} for one in (before, after))
    assert after == before
    assert torch.equal(model[:4](X), y)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name])
    inject_adapter_in_model(LoraConfig(r=2, **more), model, "b")
    assert adapter_names(model)[-1] == "b"
