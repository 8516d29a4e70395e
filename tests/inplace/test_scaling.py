"""A scaling factor that was written is what an adapter is saved with, extracted with, and loaded with."""

import copy

import peft
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
    extract_config,
    extract_graft,
    extract_params,
    inject_adapter_in_model,
    load_adapter,
    save_adapter,
    to_plain,
)
from torchgraft.functional import bind


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(6, 6), "v": nn.Linear(6, 6)}) for _ in range(2))
        self.attention, self.table = nn.MultiheadAttention(6, 2, batch_first=True), nn.Module()
        self.table.weights = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        for block in self.blocks:
            x = x + block["v"](torch.tanh(block["q"](x)))
        return self.attention(x, x, x, need_weights=False)[0] @ self.table.weights


X = torch.linspace(-1, 1, 18, dtype=torch.float64).view(1, 3, 6)
FIELDS = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True, "r": 3},
    "patterns": {"alpha_pattern": {"q": 3, "1.v": 5}, "rank_pattern": {"v": 4}},
    "dora": {"use_dora": True},
}
WRITES = {
    "all, halved": lambda path, scaling: scaling * 0.5,
    "all the same": lambda path, scaling: 0.7,
    "none": lambda path, scaling: scaling,
    "zero": lambda path, scaling: 0,
    "negative": lambda path, scaling: -scaling,
    "one": lambda path, scaling: scaling / 3 if path == "blocks.0.q" else scaling,
    "each": lambda path, scaling: scaling * len(path) / 7,
    "a tensor": lambda path, scaling: torch.tensor(0.25),
}


def injected(write=None, **fields):
    fields = {"r": 2, "target_modules": ["q", "v"], "init_lora_weights": False, **fields}
    model = inject_adapter_in_model(LoraConfig(**fields), Net().double())
    for path, layer in adapters._inplace.walk.layers(model).items():
        if write is not None:
            layer.scaling["default"] = write(path, layer.scaling["default"])
    return model


@pytest.mark.slow
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_a_written_factor_comes_back(fields, write, tmp_path):
    model = injected(write, **fields)
    expected = model(X)
    save_adapter(model, tmp_path / "model")
    torch.testing.assert_close(load_adapter(Net().double(), tmp_path / "model")(X), expected)
    theirs = peft.PeftModel.from_pretrained(Net().double(), tmp_path / "model")
    torch.testing.assert_close(theirs(X), expected)
    graft, params = extract_graft(model), extract_params(model)
    torch.testing.assert_close(graft(params, X), expected)
    save_adapter(graft, tmp_path / "graft", params=params)
    torch.testing.assert_close(load_adapter(Net().double(), tmp_path / "graft")(X), expected)
    torch.testing.assert_close(graft(load_adapter(graft, tmp_path / "model"), X), expected)
    for config in (extract_config(model), graft.configs[""]):
        torch.testing.assert_close(bind(Net().double(), config)(params, X), expected)
    torch.testing.assert_close(
        inject_adapter_in_model(extract_config(model), Net().double(), params=params)(X), expected
    )
    loaded = load_adapter(Net().double(), tmp_path / "model")
    for path, layer in adapters._inplace.walk.layers(model).items():
        assert loaded.get_submodule(path).scaling["default"] == float(layer.scaling["default"])


def test_an_attention_a_parameter_and_its_parts(tmp_path):
    fields = {"target_modules": ["attention"], "target_parameters": ["table.weights"]}
    for write in (WRITES["one"], WRITES["each"], lambda path, s: 3 * s if path == "attention" else s):
        model = injected(write, **fields)
        save_adapter(model, tmp_path)
        torch.testing.assert_close(load_adapter(Net().double(), tmp_path)(X), model(X))


def test_the_config_is_not_touched_and_nothing_is_written_where_nothing_was():
    model = injected(None, alpha_pattern={"q": 3})
    assert extract_config(model) == model.peft_config["default"]
    model.blocks[0]["q"].scaling["default"] = 9.0
    assert model.peft_config["default"].alpha_pattern == {"q": 3}
    assert extract_config(model).alpha_pattern == {r"^blocks\.0\.q": 18, r"^blocks\.1\.q": 3}
    model.blocks[0]["q"].scaling["default"] = 1.5
    assert extract_config(model) == model.peft_config["default"]
    model = injected(WRITES["all, halved"])
    assert (extract_config(model).lora_alpha, extract_config(model).alpha_pattern) == (4, {})


@pytest.mark.parametrize("value", [torch.ones(2), float("nan"), torch.tensor(float("inf"))], ids=str)
def test_what_no_config_has(value, tmp_path):
    model = injected(lambda path, scaling: value)
    with pytest.raises(ValueError, match=r"scaling of blocks.0.q was written to .*, which no config has; write one"):
        save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_adalora_has_one_factor(tmp_path):
    config = AdaLoraConfig(target_modules=["q", "v"], init_r=3, target_r=2, total_step=5, init_lora_weights=False)
    model = inject_adapter_in_model(config, Net().double())
    for block in model.blocks:
        for layer in block.values():
            layer.scaling["default"] *= 0.5
    save_adapter(model, tmp_path)
    assert extract_config(model).lora_alpha == 4
    torch.testing.assert_close(load_adapter(Net().double(), tmp_path)(X), model(X))
    layer.scaling["default"] *= 0.5
    with pytest.raises(ValueError, match=r"scaling was written to \[2.0, 4.0\].*write the same positive"):
        save_adapter(model, tmp_path)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_initialisations_made_with_the_old_factor_are_saved_plain(start, tmp_path):
    model = injected(None, init_lora_weights=start)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    save_adapter(model, tmp_path / "raw")
    for block in model.blocks:
        block["q"].scaling["default"] *= 0.5
    expected = model(X)
    with pytest.raises(ValueError, match=f"init_lora_weights is '{start}', made with .*plain=True"):
        save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"to_plain\(extract_graft\(model\), extract_params\(model\)\)"):
        extract_config(model)
    save_adapter(model, tmp_path / "adapter", plain=True)
    torch.testing.assert_close(load_adapter(Net().double(), tmp_path / "adapter")(X), expected)
    graft = extract_graft(model)
    config, params = to_plain(graft, extract_params(model))
    torch.testing.assert_close(bind(Net().double(), config)(params, X), expected)


def test_a_tied_module_with_a_factor_of_its_own_is_refused(tmp_path):
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    model[1].weight = model[0].weight
    config = LoraConfig(r=2, target_modules=["0"], ensure_weight_tying=True, init_lora_weights=False)
    other, ids = copy.deepcopy(model), torch.arange(5)
    inject_adapter_in_model(config, model)
    model[0].scaling["default"] *= 0.5
    with pytest.raises(ValueError, match=r"1: scaling of adapter 'default' is 4.0, and 2.0 at 0, to which it is tied"):
        save_adapter(model, tmp_path)
    model[1].scaling["default"] *= 0.5
    save_adapter(model, tmp_path)
    torch.testing.assert_close(load_adapter(other, tmp_path)(ids), model(ids))


@pytest.mark.parametrize("config", [IA3Config(), OFTConfig(oft_block_size=2), VeraConfig(r=2), LoraConfig()])
def test_no_other_number_can_be_written(config):
    config.target_modules = ["q"]
    layer = inject_adapter_in_model(config, Net()).blocks[0]["q"]
    writable = {name for name, value in config.form.values.items() if value.set is not None}
    assert writable == ({"scaling"} if isinstance(config, LoraConfig) else set())
    for name in config.form.values.keys() - writable:
        with pytest.raises(TypeError, match=f"blocks.0.q: {name} of adapter 'default' is fixed"):
            getattr(layer, name)["default"] = 1
