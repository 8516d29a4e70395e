"""Plain LoRA made of one that started in another way: the same outputs on the untouched base, here and in PEFT."""

import copy
import re

import peft
import pytest
import torch

from torchgraft import adapters
from torchgraft.adapters import IA3Config, LoraConfig, load_adapter, save_adapter, to_plain
from torchgraft.adapters._calibration.initial import Statistics
from torchgraft.functional import bind, merge

from .test_initial import SITES, away, config, net

GRADIENTS = Statistics(
    "lora_ga",
    {
        "first": {"gradient": torch.randn(10, 12, generator=torch.Generator().manual_seed(5))},
        "second": {"gradient": torch.randn(8, 10, generator=torch.Generator().manual_seed(6))},
    },
)
EIGENS = Statistics(
    "corda",
    {
        "first": {"U": torch.randn(10, 4), "S": torch.rand(4) + 0.1, "V": torch.randn(12, 4)},
        "second": {"U": torch.randn(8, 4), "S": torch.rand(4) + 0.1, "V": torch.randn(10, 4)},
    },
)
STARTS = {
    "pissa": {},
    "pissa_niter_2": {},
    "olora": {},
    "mica": {},
    "orthogonal": {},
    "corda": {"statistics": EIGENS},
    "lora_ga": {"statistics": GRADIENTS},
}
starts = pytest.mark.parametrize("name", STARTS)


def trained(name, dtype=torch.float64, **fields):
    graft = bind(net(dtype=dtype), config(name, **STARTS[name], **fields))
    return graft, away(graft.init())


@starts
@pytest.mark.parametrize("fields", [{}, {"rank_pattern": {"second": 2}, "alpha_pattern": {"first": 5}}], ids=str)
@pytest.mark.parametrize("rslora", [False, True])
def test_computes_the_same_on_the_untouched_base(name, fields, rslora):
    if name == "corda":  # its statistics are of one rank
        fields = {key: value for key, value in fields.items() if key != "rank_pattern"}
    graft, tree = trained(name, use_rslora=rslora, **fields)
    x = torch.randn(5, 12, dtype=torch.float64)
    plain, params = to_plain(graft, tree)
    assert plain.init_lora_weights is True and plain.statistics is None
    assert plain.r == (4 if name in ("mica", "orthogonal") else 8)
    torch.testing.assert_close(bind(net(dtype=torch.float64), plain)(params, x), graft(tree, x))
    torch.testing.assert_close(merge(bind(net(dtype=torch.float64), plain), params), merge(graft, tree))


def test_is_pefts_conversion():
    graft, tree = trained("pissa")
    start = graft.init()
    plain, params = to_plain(graft, tree)
    for path in SITES:
        a, b = params[path]["lora_A"], params[path]["lora_B"]
        assert torch.equal(a, torch.cat([tree[path]["lora_A"], start[path]["lora_A"]]))
        assert torch.equal(b, torch.cat([tree[path]["lora_B"], -start[path]["lora_B"]], 1))
    assert (plain.r, plain.lora_alpha) == (8, 12)


def test_named_adapters_and_what_has_no_plain_form():
    loftq, ia3 = config("loftq", lora_alpha=4), IA3Config(target_modules=SITES)
    named = bind(net(), {"a": config("pissa"), "b": loftq, "c": ia3})
    trees = named.init()
    assert to_plain(named, trees["a"], "a")[0].r == 8
    for name, words in (
        ("b", "for the quantised base and has no plain form"),
        ("c", "the adapter is IA3, which has no plain form"),
        ("d", "adapter_name is 'd'; this graft was bound with ['a', 'b', 'c']"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            to_plain(named, trees.get(name, {}), name)


@starts
@pytest.mark.filterwarnings("ignore:.*_config` is not specified")
def test_plain_files_are_pefts_on_the_untouched_base(name, tmp_path):
    graft, tree = trained(name, torch.float32)
    x = torch.randn(5, 12)
    save_adapter(graft, tmp_path / "graft", params=tree, plain=True)
    model = adapters.inject_adapter_in_model(graft.configs[""], net(), params=tree)
    save_adapter(model, tmp_path / "model", plain=True)
    for folder in ("graft", "model"):
        theirs = peft.PeftModel.from_pretrained(net(), tmp_path / folder).eval()
        torch.testing.assert_close(theirs(x), graft(tree, x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(load_adapter(net(), tmp_path / folder)(x), graft(tree, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_2", "olora"])
@pytest.mark.filterwarnings("ignore:Adapter .* was active")
def test_pefts_converted_files_are_ours(name, tmp_path):
    start = peft.LoraConfig(r=4, lora_alpha=6, target_modules=SITES, init_lora_weights=name)
    theirs = peft.get_peft_model(net(), start)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(5, 12)
    expected = theirs(x)
    theirs.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    torch.testing.assert_close(load_adapter(net(), tmp_path / "end")(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["corda", "lora_ga"])
def test_files_without_what_data_chose_are_said_to_be_so(name, tmp_path):
    graft, tree = trained(name, torch.float32)
    with pytest.warns(UserWarning, match="pass plain=True for files that fit the original base"):
        save_adapter(graft, tmp_path, params=tree)
    x = torch.randn(5, 12)
    torch.testing.assert_close(graft(load_adapter(graft, tmp_path), x), graft(tree, x))
    with pytest.raises(ValueError, match=re.escape("No file holds them: save with save_adapter(..., plain=True)")):
        load_adapter(net(), tmp_path)
    model = adapters.inject_adapter_in_model(graft.configs[""], net(), params=tree)
    with pytest.warns(UserWarning, match="pass plain=True"):
        save_adapter(model, tmp_path / "model")
    assert copy.deepcopy(model).peft_config["default"].statistics is graft.configs[""].statistics


def test_a_plain_lora_stays_as_it_is():
    graft = bind(net(), LoraConfig(r=2, target_modules=SITES))
    tree = graft.init()
    plain, params = to_plain(graft, tree)
    assert plain == graft.configs[""] and all(params[p][n] is t for p in tree for n, t in tree[p].items())
