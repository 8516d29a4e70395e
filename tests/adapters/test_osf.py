"""OSF against its equation and against PEFT: gradients orthogonal to what stays, ranks, targets."""

import copy
import io

import peft
import pytest
import torch
from torch import nn
from torch.func import vmap

from torchgraft.adapters import (
    LoraConfig,
    OSFConfig,
    extract_params,
    inject_adapter_in_model,
    load_adapter,
    osf_gradients,
    save_adapter,
    set_requires_grad,
)
from torchgraft.adapters._peft.renamed_keys import insert_name
from torchgraft.functional import bind, grad, stack

FIELDS = {"effective_rank": 2, "target_modules": ["0", "2", "4"]}


def net(dtype=torch.float64):
    """A tall weight, a wide one and a square one."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 4)).to(dtype)


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def loss(graft):
    return lambda params: graft(params, X).square().sum()


def expected(model, grads, kept=2):
    """Return the gradients without their parts along the first singular vectors of the weights, in float64."""
    made = {}
    for path, leaves in grads.items():
        u, _, v = torch.linalg.svd(model.get_submodule(path).weight.float(), full_matrices=False)
        u, v = u[:, :kept].double(), v[:kept].double()
        made[path] = {
            "osf_svd_params.S_low": leaves["osf_svd_params.S_low"],
            "osf_svd_params.U_low": leaves["osf_svd_params.U_low"] - u @ u.T @ leaves["osf_svd_params.U_low"],
            "osf_svd_params.V_low": leaves["osf_svd_params.V_low"] - leaves["osf_svd_params.V_low"] @ v.T @ v,
        }
    return made


def close(given, wanted):
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-5)  # singular vectors are in single precision


def test_gradients_are_orthogonal_to_what_stays():
    graft = bind(net(), OSFConfig(**FIELDS))
    grads = grad(loss(graft))(graft.init())
    given = osf_gradients(graft, grads)
    close(given, expected(net(), grads))
    assert any((given[path][leaf] - grads[path][leaf]).abs().max() > 1e-3 for path in grads for leaf in grads[path])


def test_gradients_of_stacks_are_those_of_each():
    graft = bind(net(), OSFConfig(**{**FIELDS, "init_weights": False}))
    trees = [graft.init(torch.Generator().manual_seed(i)) for i in range(2)]
    each = [osf_gradients(graft, grad(loss(graft))(tree)) for tree in trees]
    close(vmap(lambda tree: osf_gradients(graft, grad(loss(graft))(tree)))(stack(trees)), stack(each))
    close(osf_gradients(graft, vmap(grad(loss(graft)))(stack(trees))), stack(each))


def test_adapters_of_other_methods_keep_their_gradients():
    graft = bind(net(), {"a": OSFConfig(**FIELDS), "b": LoraConfig(r=2, target_modules=["0"])})
    grads = grad(loss(graft))(graft.init())
    given = osf_gradients(graft, grads)
    close(given["a"], expected(net(), grads["a"]))
    assert given["b"] is grads["b"]


def test_what_is_no_gradient_of_osf_is_an_error():
    graft = bind(net(), OSFConfig(**FIELDS))
    with pytest.raises(KeyError, match="osf_gradients: grads lacks the site '0', expected a tree like the parameters"):
        osf_gradients(graft, {})
    with pytest.raises(TypeError, match="graft is of type Sequential, expected what bind returned"):
        osf_gradients(net(), {})
    with pytest.raises(ValueError, match="has no OSF adapter; bind an OSFConfig"):
        osf_gradients(bind(net(), LoraConfig(target_modules=["0"])), {})


@pytest.mark.parametrize("copied", [False, True])
def test_backward_in_place_leaves_pefts_gradients(copied):
    model = inject_adapter_in_model(OSFConfig(**FIELDS), net())
    model = copy.deepcopy(model) if copied else model
    other = peft.inject_adapter_in_model(peft.OSFConfig(**FIELDS), net())
    for one in (model, other):
        for _ in range(2):  # also what is added to gradients that are there
            one(X).square().sum().backward()
    given = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    wanted = {name: p.grad for name, p in other.named_parameters() if p.grad is not None}
    assert given.keys() == wanted.keys() and len(given) == 9
    close(given, wanted)


def test_other_dtypes_and_files_keep_the_hooks():
    model = inject_adapter_in_model(OSFConfig(**FIELDS), net()).float()
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for one in (model, torch.load(stored, weights_only=False)):
        one(X.float()).square().sum().backward()
        grad = one[0].osf_svd_params["default"]["U_low"].grad
        u = torch.linalg.svd(net()[0].weight)[0][:, :2].float()
        assert (u.T @ grad).abs().max() < 1e-5 < grad.abs().max()


def test_what_starts_frozen_has_projected_gradients_later():
    model = inject_adapter_in_model(OSFConfig(**FIELDS, inference_mode=True), net())
    set_requires_grad(model, "default", True)
    model(X).square().sum().backward()
    graft = bind(net(), OSFConfig(**FIELDS))
    wanted = expected(net(), grad(loss(graft))(graft.init()))
    close(model[0].osf_svd_params["default"]["U_low"].grad, wanted["0"]["osf_svd_params.U_low"])


def test_a_step_leaves_the_larger_triplets():
    model = net()
    graft = bind(model, OSFConfig(**FIELDS))
    params = graft.init()
    step = osf_gradients(graft, grad(loss(graft))(params))["0"]["osf_svd_params.U_low"]
    u = torch.linalg.svd(model[0].weight)[0][:, :2]
    assert (u.T @ (params["0"]["osf_svd_params.U_low"] - 0.1 * step)).abs().max() < 1e-5


def test_ranks_by_pattern_are_pefts_and_found_from_tensors(tmp_path):
    fields = {"effective_rank": 0.5, "rank_pattern": {"2": 3}, "target_modules": ["0", "2", "4"]}
    other = peft.get_peft_model(net(torch.float32), peft.OSFConfig(**fields))
    other.save_pretrained(tmp_path)
    graft = bind(net(torch.float32), OSFConfig(**fields))
    shapes = {path: leaves["osf_svd_params.S_low"].shape[0] for path, leaves in graft.init().items()}
    assert shapes == {"0": 2, "2": 1, "4": 2}
    loaded = load_adapter(graft, tmp_path)
    assert all(
        torch.equal(loaded[path][leaf], one) for path, tree in graft.init().items() for leaf, one in tree.items()
    )
    save_adapter(graft, tmp_path / "mine", params=loaded)
    model = inject_adapter_in_model(OSFConfig(**fields), net(torch.float32))
    assert extract_params(model)["2"].keys() == loaded["2"].keys()


def test_without_targets_all_linear_layers_are_adapted_as_in_peft():
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 4))
    assert list(bind(model, OSFConfig()).init()) == ["0", "2"]
    model.config = {"model_type": "bert"}  # for which LoRA has targets, and OSF has none
    other = peft.get_peft_model(copy.deepcopy(model), peft.OSFConfig())
    adapted = [
        name.removeprefix("base_model.model.")
        for name, m in other.named_modules()
        if type(m).__name__ == "Linear" and hasattr(m, "osf_svd_params")
    ]
    assert list(bind(model, OSFConfig()).init()) == adapted == ["0", "2"]


def test_keys_in_a_model_have_the_name_before_the_part():
    key = insert_name("base_model.model.0.osf_svd_params.U_low", "style", [OSFConfig])
    assert key == "0.osf_svd_params.style.U_low"
