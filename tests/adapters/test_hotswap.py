"""Hot swapping: the numbers of another adapter, without a new compilation; outputs are PEFT's, and files are right."""

import copy
import warnings

import peft
import peft.utils.hotswap as theirs
import pytest
import torch
from torch import nn

from torchgraft.adapters import (
    LoHaConfig,
    LoraConfig,
    PeftModel,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_adapter,
    merge_adapter,
    save_adapter,
    unmerge_adapter,
)
from torchgraft.adapters._peft import hotswap as ours

pytestmark = pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1")
KINDS = {
    "linear": (lambda: nn.Linear(6, 6), (3, 6)),
    "conv2d": (lambda: nn.Conv2d(6, 6, 3, padding=1), (2, 6, 4, 4)),
    "conv2d in groups": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=2), (2, 6, 4, 4)),
}


def net(kind="linear"):
    torch.manual_seed(0)
    make, _ = KINDS[kind]
    return nn.Sequential(make(), nn.Tanh(), make())


def inputs(kind="linear"):
    return torch.randn(KINDS[kind][1], generator=torch.Generator().manual_seed(1))


def saved(folder, kind="linear", seed=2, **fields):
    """An adapter in files, with random numbers."""
    fields = {"r": 2, "lora_alpha": 8, "target_modules": ["0", "2"], "init_lora_weights": False, **fields}
    torch.manual_seed(seed)
    model = inject_adapter_in_model(LoraConfig(**fields), net(kind))
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.ndim == 1:
            nn.init.normal_(parameter)
    return save_adapter(model, folder / f"{seed}")


def loaded(folder, kind="linear"):
    return load_adapter(net(kind), folder)


SWAPS = {
    "another rank and factor": {"r": 4, "lora_alpha": 6},
    "a smaller rank": {"r": 1},
    "rank-stabilised": {"use_rslora": True, "r": 4},
    "patterns": {"rank_pattern": {"0": 4}, "alpha_pattern": {"2": 3}},
    "fewer modules": {"target_modules": ["2"]},
    "a bias": {"lora_bias": True, "init_lora_weights": True},
}
GROUPED = {"rank_pattern": {"0": 6}, "r": 4, "alpha_pattern": {"2": 3}}


CASES = [
    *(pytest.param("linear", fields, id=name) for name, fields in SWAPS.items()),
    pytest.param("conv2d", SWAPS["patterns"], id="a convolution"),
    pytest.param("conv2d in groups", GROUPED, id="a convolution in groups"),
]


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_a_swapped_adapter_computes_and_is_saved_as_itself(fields, kind, prepared, tmp_path):
    bias = {"lora_bias": True} if "lora_bias" in fields else {}
    first = saved(tmp_path, kind, seed=2, **bias)
    second, x = saved(tmp_path, kind, seed=3, **fields), inputs(kind)
    model, expected = loaded(first, kind), loaded(second, kind)(x)
    if prepared:
        before = model(x)
        ours.prepare_model_for_compiled_hotswap(model, target_rank=6)
        torch.testing.assert_close(model(x), before)
        parameters = list(model.parameters())
    ours.hotswap_adapter(model, second, "default")
    torch.testing.assert_close(model(x), expected)
    assert not prepared or all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    save_adapter(model, tmp_path / "again")
    torch.testing.assert_close(load_adapter(net(kind), tmp_path / "again")(x), expected)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(net(kind), tmp_path / "again")(x), expected)
    if "groups" not in kind:
        merge_adapter(model)
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        unmerge_adapter(model)
    ours.hotswap_adapter(model, first, "default")
    torch.testing.assert_close(model(x), loaded(first, kind)(x))


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_are_pefts(kind, tmp_path):
    first, second, x = saved(tmp_path, kind), saved(tmp_path, kind, seed=3, r=4, lora_alpha=6), inputs(kind)
    model, other = PeftModel.from_pretrained(net(kind), first), peft.PeftModel.from_pretrained(net(kind), first)
    for lib, one in ((ours, model), (theirs, other)):
        lib.prepare_model_for_compiled_hotswap(one, target_rank=6, config=one.peft_config)
        lib.hotswap_adapter(one, str(second), "default", torch_device="cpu")
    torch.testing.assert_close(model(x), other(x))
    assert model.peft_config["default"].r == other.peft_config["default"].r == 6
    state, config = peft.utils.load_peft_weights(first, device="cpu"), LoraConfig.from_pretrained(first)
    state = {key.replace(".weight", ".default.weight"): tensor for key, tensor in state.items()}
    for lib, one in ((ours, model), (theirs, other)):
        lib.hotswap_adapter_from_state_dict(one, state, "default", config)
    torch.testing.assert_close(model(x), other(x))


def test_one_compilation_for_adapters_of_other_ranks_and_factors(tmp_path):
    folders = [saved(tmp_path, seed=seed, r=r, lora_alpha=a) for seed, r, a in ((2, 2, 8), (3, 4, 6), (4, 6, 1))]
    x, compilations = inputs(), []

    def backend(graph, examples):
        compilations.append(graph)
        return graph.forward

    model = loaded(folders[0])
    ours.prepare_model_for_compiled_hotswap(model, target_rank=6)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.inference_mode():
        for folder in (*folders, *reversed(folders)):
            ours.hotswap_adapter(compiled, folder, "default")
            torch.testing.assert_close(compiled(x), loaded(folder)(x))
            assert len(compilations) == 1
        for layer in (model[0], model[2]):
            layer.set_scale("default", 0.5)
        torch.testing.assert_close(compiled(x), model(x))
    assert len(compilations) == 1
    torch._dynamo.reset()


def test_factors_of_a_swapped_adapter_are_what_scale_is_relative_to(tmp_path):
    first, second = saved(tmp_path), saved(tmp_path, seed=3, r=4, lora_alpha=6)
    model = loaded(first)
    ours.prepare_model_for_compiled_hotswap(model, target_rank=4)
    ours.hotswap_adapter(model, second, "default")
    model[0].set_scale("default", 2)
    assert model[0].scaling["default"] == 3
    model[0].unscale_layer()
    assert model[0].scaling["default"] == 1.5
    assert model.peft_config["default"].lora_alpha == 6


def test_another_adapter_stays_and_gradients_stay_on(tmp_path):
    first, second, x = saved(tmp_path), saved(tmp_path, seed=3), inputs()
    model = loaded(first)
    model = load_adapter(model, first, "other")
    ours.hotswap_adapter(model, second, "default")
    torch.testing.assert_close(model(x), loaded(first)(x))
    from torchgraft.adapters import set_adapter

    set_adapter(model, "default")
    torch.testing.assert_close(model(x), loaded(second)(x))
    model(x).sum().backward()
    assert model[0].lora_A["default"].weight.grad.any()


def unchanged(model, call, error, match):
    """The call is this error, and the model is what it was before."""
    before, x = copy.deepcopy(model.peft_config["default"]), inputs()
    y = model(x)
    state = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    with pytest.raises(error, match=match):
        call()
    assert model.peft_config["default"] == before and torch.equal(model(x), y)
    assert all(torch.equal(tensor, state[key]) for key, tensor in get_peft_model_state_dict(model).items())


def test_adapters_that_do_not_go_together(tmp_path):
    first = saved(tmp_path)
    model, x = loaded(first), inputs()
    cases = [
        ({"use_dora": True}, ValueError, "has use_dora=False, and the new one True"),
        ({"lora_dropout": 0.1}, ValueError, "has lora_dropout=0.0, and the new one 0.1"),
        ({"lora_bias": True, "init_lora_weights": True}, ValueError, "has lora_bias=False"),
    ]
    for seed, (fields, error, match) in enumerate(cases, start=10):
        folder = saved(tmp_path, seed=seed, **fields)
        unchanged(model, lambda folder=folder: ours.hotswap_adapter(model, folder, "default"), error, match)
        with pytest.raises(ValueError, match=f"one adapter {match}"):
            ours.check_hotswap_configs_compatible(model.peft_config["default"], LoraConfig(**fields))
    state = {"0.lora_A.default.weight": torch.zeros(2, 6), "1.lora_A.default.weight": torch.zeros(2, 6)}

    def swap(state, config=None):
        return lambda: ours.hotswap_adapter_from_state_dict(model, state, "default", config or LoraConfig(r=2))

    unchanged(model, swap(state), RuntimeError, r"no place for '1.lora_A.default.weight'")
    del state["1.lora_A.default.weight"]
    unchanged(model, swap(state), RuntimeError, r"0: the new adapter lacks '0.lora_B.weight', and has 'lora_A'")
    state["0.lora_B.default.weight"] = torch.zeros(5, 2)
    unchanged(model, swap(state), RuntimeError, r"0: lora_B has shape \(5, 2\), which does not fit \(6, 2\)")
    state["0.lora_B.default.weight"] = torch.zeros(6, 2)
    unchanged(
        model, swap(state, LoraConfig(r=3)), ValueError, "0: the new tensors have rank 2, and their config says 3"
    )
    unchanged(model, swap(state, LoHaConfig()), ValueError, "hot swapping is for LoRA, and .* has a LoHaConfig")
    unchanged(model, swap(state, LoraConfig(init_lora_weights="pissa")), ValueError, "'pissa', .* plain=True")
    merge_adapter(model)
    unchanged(model, swap(state), ValueError, r"adapter 'default' is merged \(0 and others\); call unmerge_adapter")
    torch.testing.assert_close(model(x), loaded(first)(x), rtol=1e-5, atol=1e-5)


def test_what_would_stay_from_the_old_adapter_is_an_error(tmp_path):
    model, second = net(), saved(tmp_path, target_modules=["0"])
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"]), model)
    unchanged(
        model, lambda: ours.hotswap_adapter(model, second, "default"), RuntimeError, "lacks '2.weight', '2.bias', which"
    )
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0", "2"], use_dora=True), net())
    second = saved(tmp_path, seed=5, target_modules=["0"], use_dora=True)
    unchanged(model, lambda: ours.hotswap_adapter(model, second, "default"), RuntimeError, "2: .*magnitudes of zero")


def test_dora_is_swapped_on_the_same_modules(tmp_path):
    first, second, x = saved(tmp_path, use_dora=True), saved(tmp_path, seed=3, use_dora=True, r=4), inputs()
    model = loaded(first)
    ours.prepare_model_for_compiled_hotswap(model, target_rank=5)
    ours.hotswap_adapter(model, second, "default")
    torch.testing.assert_close(model(x), loaded(second)(x))


def test_models_that_cannot_be_prepared(tmp_path):
    with pytest.raises(ValueError, match="the model has no LoRA adapter; inject or load the first one before"):
        ours.prepare_model_for_compiled_hotswap(net(), target_rank=4)
    model = loaded(saved(tmp_path))
    unchanged(
        model,
        lambda: ours.prepare_model_for_compiled_hotswap(model, target_rank=1),
        ValueError,
        "0: target_rank is 1, and adapter 'default' has rank 2; give the largest rank",
    )
    with pytest.raises(ValueError, match="compiled already and would be compiled again"):
        ours.prepare_model_for_compiled_hotswap(torch.compile(model), target_rank=4)
    with pytest.warns(UserWarning, match="compiled already"):
        ours.prepare_model_for_compiled_hotswap(torch.compile(model), check_compiled="warn")
    with pytest.raises(ValueError, match="check_compiled is 'no', expected 'error', 'warn' or 'ignore'"):
        ours.prepare_model_for_compiled_hotswap(model, check_compiled="no")
    grouped = loaded(saved(tmp_path, "conv2d in groups", seed=6), "conv2d in groups")
    with pytest.raises(ValueError, match="0: rank 5 is no multiple of the 2 groups"):
        ours.prepare_model_for_compiled_hotswap(grouped, target_rank=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attention = nn.Sequential(nn.MultiheadAttention(6, 2))
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), attention)
    with pytest.raises(ValueError, match="is on a site of kind attention and has rank 2, which cannot become 4"):
        ours.prepare_model_for_compiled_hotswap(attention, target_rank=4)
    ours.prepare_model_for_compiled_hotswap(attention, target_rank=2)
