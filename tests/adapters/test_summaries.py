"""The table of what adapters cost: right as data, readable as text."""

import pytest
import torch
from torch import nn

from torchgraft.adapters import (
    IA3Config,
    LoraConfig,
    disable_adapter,
    inject_adapter_in_model,
    merge_adapter,
    set_adapter,
    summary,
)
from torchgraft.functional import bind, stack


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 4)])
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight
        self.out = nn.Linear(3, 2)


def test_rows_of_an_injected_model():
    model = Tied()
    base = sum(p.numel() for p in model.parameters())
    config = LoraConfig(r=2, target_modules=["layers.0", "layers.1"], rank_pattern={"layers.1": 3})
    inject_adapter_in_model(config, model, "a")
    inject_adapter_in_model(IA3Config(target_modules=["layers.0"], modules_to_save=["out"]), model, "b")
    table = summary(model)
    a, b = table.rows
    assert table.base_parameters == base == 8 * 10 + 8 * 9 + 4 * 9 + 8
    assert (a.name, a.method, a.sites, a.ranks, a.state) == ("a", "LORA", 2, (2, 3), "")
    assert a.parameters == 2 * (8 + 8) + 3 * (8 + 4) and a.bytes == 4 * a.parameters
    assert a.share == pytest.approx(a.parameters / base)
    assert (b.name, b.sites, b.ranks, b.state) == ("b", 1, (), "active")
    assert b.parameters == b.trainable == 8 + 8, "modules to save are counted"
    set_adapter(model, "a")
    merge_adapter(model)
    assert [row.state for row in summary(model).rows] == ["active, merged", ""]
    with disable_adapter(model):
        assert [row.state for row in summary(model).rows] == ["active, disabled", "disabled"]


def test_rows_of_a_graft_and_a_half_precision_base():
    model = nn.Sequential(nn.Linear(4, 4, bias=False)).bfloat16()
    graft = bind(model, {"x": LoraConfig(r=2, target_modules=["0"]), "y": IA3Config(target_modules=["0"])})
    params = graft.init()
    x, y = summary(graft, params).rows
    assert (x.name, x.bytes, y.name, y.bytes) == ("x", 64, "y", 16)
    assert summary(graft, {"y": params["y"]}).rows == (y,)
    assert summary(graft, params).base_bytes == 32
    only = bind(model, LoraConfig(r=2, target_modules=["0"]))
    assert "(unnamed)" in str(summary(only, only.init(dtype=torch.bfloat16)))


def test_text_is_aligned():
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["layers.0"]), Tied(), "a-long-name")
    lines = str(summary(model)).splitlines()
    assert [line.split()[0] for line in lines] == ["adapter", "a-long-name", "(base)"]
    assert (
        len({line.index(word) + len(word) for line, word in zip(lines, ["parameters", " 32", "196"], strict=True)}) == 1
    )


def test_wrong_calls_say_what_to_give():
    graft = bind(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"]))
    with pytest.raises(TypeError, match=r"holds no parameters; give them: summary\(graft, params\)"):
        summary(graft)
    with pytest.raises(TypeError, match="whose adapters have their own"):
        summary(nn.Linear(2, 2), {})


def test_a_stack_has_a_row_for_each_adapter_and_says_what_padding_takes():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    configs = [LoraConfig(r=1, target_modules=["0"]), LoraConfig(r=8, target_modules=["0", "1"])]
    graft = bind(model, configs, names=["poems", "code"])
    table = summary(graft, graft.init())
    poems, code = table.rows
    assert (poems.name, poems.sites, poems.ranks, poems.parameters) == ("poems", 1, (1,), 4 + 6)
    assert (code.name, code.sites, code.ranks, code.bytes) == ("code", 2, (8,), 4 * 8 * (4 + 6 + 6 + 2))
    assert table.padding_bytes == 2 * code.bytes - poems.bytes - code.bytes
    assert [line.split()[0] for line in str(table).splitlines()] == ["adapter", "poems", "code", "(padding)", "(base)"]
    one = bind(model, configs[0])
    alike = summary(one, stack([one.init(), one.init()]))
    assert [(row.name, row.parameters) for row in alike.rows] == [("0", 10), ("1", 10)] and not alike.padding_bytes
    named = bind(model, {"a": configs[0]})
    assert [row.name for row in summary(named, stack([named.init(), named.init()])).rows] == ["0.a", "1.a"]
    with pytest.raises(ValueError, match=r"has shape \(2, 4\), expected \(1, 4\)"):
        summary(one, {"0": {"lora_A": torch.zeros(2, 4), "lora_B": torch.zeros(6, 2)}})
