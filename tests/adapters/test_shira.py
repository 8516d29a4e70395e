"""SHiRA against its equation and against PEFT: masks from seeds, functions and files, and what is kept and lost."""

import copy
import dataclasses

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from torchgraft.adapters import (
    ShiraConfig,
    cast_adapter_dtype,
    extract_config,
    extract_graft,
    extract_params,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_adapter,
    load_config,
    save_adapter,
    set_peft_model_state_dict,
)
from torchgraft.functional import bind, merge, value_and_grad

FIELDS = {"r": 2, "target_modules": ["0"]}
FILE = "adapter_model.safetensors"


def made(layer=lambda: nn.Linear(12, 8), dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(layer()).to(dtype)


def randomised(params, seed=1):
    torch.manual_seed(seed)
    return {path: {leaf: torch.randn_like(p) for leaf, p in leaves.items()} for path, leaves in params.items()}


def largest(layer, r, **_):
    """Return the mask of the largest entries, as a user of PEFT writes it."""
    count = r * sum(layer.weight.shape)
    places = layer.weight.abs().flatten().topk(count).indices
    return torch.zeros(layer.weight.numel()).scatter_(0, places, 1.0).view(layer.weight.shape)


def theirs_with_largest(model, **fields):
    config = peft.ShiraConfig(**{**FIELDS, "mask_type": "largest", "inference_mode": True, **fields})
    config.mask_fn, config.inference_mode = largest, False
    return peft.get_peft_model(copy.deepcopy(model), config)


@pytest.mark.parametrize("seed", [None, 0, 7])
@pytest.mark.parametrize("init", [True, False])
def test_masks_and_starts_are_pefts(seed, init):
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 12), nn.Linear(12, 8))
    fields = {"r": 2, "random_seed": seed, "init_weights": init, "target_modules": ["0", "1", "2"]}
    states = []
    for library, config in ((peft, peft.ShiraConfig(**fields)), (None, ShiraConfig(**fields))):
        torch.manual_seed(3)
        if library:
            states.append(peft.get_peft_model_state_dict(peft.inject_adapter_in_model(config, copy.deepcopy(model))))
        else:
            states.append(get_peft_model_state_dict(inject_adapter_in_model(config, copy.deepcopy(model))))
    theirs, mine = states
    assert mine.keys() == theirs.keys() and mine["0.shira_indices"].dtype == torch.int32
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12), (12,)])
def test_outputs_and_gradients_are_the_equation_and_no_weight_is_kept(shape, dtype):
    model, x = made(dtype=dtype), torch.randn(shape, dtype=dtype, requires_grad=True)
    graft = bind(model, ShiraConfig(**FIELDS))
    leaf = randomised(graft.init())["0"]["shira_weight"].to(dtype).requires_grad_()
    rows, columns = graft.sites[""]["0"].constants.shira_indices.long()
    weight = model[0].weight.detach().index_put((rows, columns), leaf, accumulate=True)
    expected = nn.functional.linear(x, weight, model[0].bias.detach())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = graft({"0": {"shira_weight": leaf}}, x)
    torch.testing.assert_close(y, expected)
    if len(shape) > 1:  # a vector takes torch's own functions
        assert not [
            t for t in kept if t.numel() >= 96 and t.data_ptr() not in (model[0].weight.data_ptr(), x.data_ptr())
        ]
    seed = torch.randn_like(y)
    given, wanted = (torch.autograd.grad((one * seed).sum(), (leaf, x)) for one in (y, expected))
    torch.testing.assert_close(given, wanted)


def test_the_base_gets_its_gradient_too():
    model, x = made(), torch.randn(5, 12).double()
    injected = inject_adapter_in_model(ShiraConfig(**FIELDS, init_weights=False), copy.deepcopy(model))
    layer = injected[0].base_layer
    layer.requires_grad_()
    injected(x).square().sum().backward()
    merged = merge(extract_graft(injected), extract_params(injected))
    weight, bias = (merged[f"0.{name}"].detach().requires_grad_() for name in ("weight", "bias"))
    nn.functional.linear(x, weight, bias).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, weight.grad)
    torch.testing.assert_close(layer.bias.grad, bias.grad)


def test_small_changes_of_half_precision_weights_are_not_lost():
    model, x = made(dtype=torch.bfloat16), torch.ones(1, 12, dtype=torch.bfloat16)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.fill_(-12.0)
    graft = bind(model, ShiraConfig(**FIELDS))
    params = {"0": {"shira_weight": torch.full_like(graft.init()["0"]["shira_weight"], 1e-3)}}
    count = torch.bincount(graft.sites[""]["0"].constants.shira_indices[0], minlength=8)
    torch.testing.assert_close(graft(params, x)[0].float(), count * 1e-3, rtol=0.01, atol=0)


def test_groups_and_kernels_are_matrices():
    model = made(lambda: nn.Conv2d(4, 6, (2, 3), groups=2, padding=1))
    graft = bind(model, ShiraConfig(**FIELDS))
    params, x = randomised(graft.init()), torch.randn(3, 4, 6, 7).double()
    assert params["0"]["shira_weight"].shape == (2 * (6 + 12),)
    rows, columns = graft.sites[""]["0"].constants.shira_indices.long()
    delta = torch.zeros(6, 12).double().index_put((rows, columns), params["0"]["shira_weight"].double())
    expected = model[0].weight.detach() + delta.view(6, 2, 2, 3)
    torch.testing.assert_close(graft(params, x), torch.func.functional_call(model, {"0.weight": expected}, (x,)))


# -- masks of one's own ----------------------------------------------------------------------------------------------


def test_a_mask_function_of_pefts_gives_pefts_mask(tmp_path):
    model, x = made(dtype=torch.float32), torch.randn(3, 12)
    theirs = theirs_with_largest(model, init_weights=False)
    theirs.save_pretrained(tmp_path / "theirs")
    graft = bind(model, ShiraConfig(**FIELDS, mask_type="largest", mask_fn=largest))
    params = load_adapter(graft, tmp_path / "theirs")
    torch.testing.assert_close(graft(params, x), theirs(x))
    save_adapter(graft, tmp_path / "mine", params=params)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "mine")
    torch.testing.assert_close(again(x), theirs(x))
    files = [load_file(tmp_path / whose / FILE) for whose in ("mine", "theirs")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][key], files[1][key]) for key in files[0])


@pytest.mark.parametrize("floats", [False, True])
def test_a_files_mask_is_taken_into_a_model_without_its_function(tmp_path, floats):
    model, x = made(dtype=torch.float32), torch.randn(3, 12)
    theirs = theirs_with_largest(model, init_weights=False)
    theirs.save_pretrained(tmp_path)
    if floats:  # as PEFT writes indices on Windows
        save_file({key: t.float() for key, t in load_file(tmp_path / FILE).items()}, tmp_path / FILE)
    mine = copy.deepcopy(model)
    load_adapter(mine, tmp_path, dtype=torch.float64)
    assert mine[0].shira_indices["default"].dtype == torch.int32
    torch.testing.assert_close(mine(x), theirs(x))
    graft = extract_graft(mine)
    torch.testing.assert_close(graft(extract_params(mine), x), theirs(x))
    other = bind(model, load_config(tmp_path))
    with pytest.raises(
        ValueError, match=r"shira_indices' is not what this graft has made .* load_adapter\(model, path\)"
    ):
        load_adapter(other, tmp_path)


def test_a_mask_that_nobody_knows_is_an_error_wherever_it_is_needed():
    model, config = made(), ShiraConfig(**FIELDS, mask_type="largest")
    graft, params = bind(model, config), {"0": {"shira_weight": torch.ones(40)}}
    words = (
        "ShiraConfig: mask_type is 'largest' at 0, and neither mask_fn nor a file says what the mask is; set mask_fn"
    )
    for attempt in (
        graft.init,
        lambda: graft(params, torch.ones(1, 12).double()),
        lambda: merge(graft, params),
        lambda: inject_adapter_in_model(config, copy.deepcopy(model)),
    ):
        with pytest.raises(ValueError, match=words):
            attempt()


@pytest.mark.parametrize(
    ("mask_fn", "words"),
    [
        (
            lambda layer, r: torch.ones(3, 3),
            r"mask_fn gave a tensor of shape \(3, 3\) at 0, expected a tensor of shape",
        ),
        (lambda layer, r: None, r"mask_fn gave a NoneType at 0, expected a tensor of shape \(8, 12\)"),
        (
            lambda layer, r: torch.ones_like(layer.weight),
            "gave a mask of 96 ones at 0 .* = 40 ones and zeros elsewhere",
        ),
        (
            lambda layer, r: 0.5 * largest(layer, r),
            r"a mask of 0 ones at 0 \(and 40 entries that are not 0\), expected",
        ),
    ],
)
def test_masks_that_do_not_fit_are_errors(mask_fn, words):
    with pytest.raises(ValueError, match=words):
        bind(made(), ShiraConfig(**FIELDS, mask_type="own", mask_fn=mask_fn))


# -- in place --------------------------------------------------------------------------------------------------------


def test_indices_stay_integers_and_no_parameter():
    mine = inject_adapter_in_model(ShiraConfig(**FIELDS), made(dtype=torch.float32))
    before = mine[0].shira_indices["default"].clone()
    for change in (
        lambda: mine.half(),
        lambda: cast_adapter_dtype(mine, "default"),
        lambda: mine.requires_grad_(False),
    ):
        change()
        assert torch.equal(mine[0].shira_indices["default"], before)
    state = get_peft_model_state_dict(mine)
    assert set_peft_model_state_dict(mine, state, low_cpu_mem_usage=True) == ([], [])
    assert torch.equal(mine[0].shira_indices["default"], before) and before.dtype == torch.int32
    assert set(extract_params(mine)["0"]) == {"shira_weight"}
    assert [name for name, _ in mine.named_parameters() if "shira" in name] == ["0.shira_weight.default"]
    assert [name for name, _ in mine.named_buffers()] == ["0.shira_indices.default"]
    again = copy.deepcopy(mine)
    again.load_state_dict(mine.state_dict(), assign=True)
    x = torch.ones(1, 12).half()
    assert torch.equal(again(x), mine(x))


def test_written_scaling_counts_and_no_file_has_it(tmp_path):
    model, x = made(), torch.randn(3, 12).double()
    mine = inject_adapter_in_model(ShiraConfig(**FIELDS, init_weights=False), copy.deepcopy(model))
    whole = mine(x) - model(x)
    mine[0].scaling["default"] = 0.25
    torch.testing.assert_close(mine(x) - model(x), whole / 4)
    for attempt in (lambda: save_adapter(mine, tmp_path), lambda: extract_config(mine)):
        with pytest.raises(ValueError, match=r"scaling of 0 was written to 0\.25, which no config of SHiRA has"):
            attempt()


def test_configs_recall_functions_of_the_same_name():
    own = ShiraConfig(**FIELDS, mask_type="largest", mask_fn=largest)
    stored = dataclasses.replace(own, mask_fn=None)
    assert stored.recall(own).mask_fn is largest and "mask_fn" not in own.to_dict()
    assert dataclasses.replace(stored, mask_type="other").recall(own).mask_fn is None


def test_it_trains():
    model, x = made(dtype=torch.float32), torch.randn(32, 12)
    graft = bind(model, ShiraConfig(**FIELDS))
    goal, params = graft(randomised(graft.init()), x), graft.init()

    def loss(params):
        return (graft(params, x) - goal).square().mean()

    first = loss(params).item()
    for _ in range(100):
        _, grads = value_and_grad(loss)(params)
        params = {"0": {"shira_weight": params["0"]["shira_weight"] - 1.0 * grads["0"]["shira_weight"]}}
    assert loss(params) < first / 100
