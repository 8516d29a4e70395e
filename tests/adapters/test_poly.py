"""Poly: each row of its own task, in both styles and PEFT's; samples of shares in training; one task alone."""

import copy
import re

import optree
import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchgraft.adapters as ours
from torchgraft.adapters import (
    LoraConfig,
    PolyConfig,
    adapter_rows,
    extract_params,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_adapter,
    load_config,
    save_adapter,
    set_peft_model_state_dict,
    split_tasks,
)
from torchgraft.functional import UnsupportedConfig, bind, merge, route, unstack, value_and_grad

PREFIX = "base_model.model."
FIELDS = {"r": 2, "n_tasks": 3, "n_skills": 4, "n_splits": 2, "init_weights": False, "target_modules": ["0", "2"]}
TASKS = torch.tensor([2, 0, 1, 2])
X = torch.randn(4, 5, 4, generator=torch.Generator().manual_seed(1))
LOGITS = "poly_router.module_logits"


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))


def planted():
    """Return PEFT's model with parameters away from the initial ones, and the same tree."""
    torch.manual_seed(7)
    theirs = peft.get_peft_model(base(), peft.PolyConfig(**FIELDS)).eval()
    state = {key: t + torch.randn_like(t) for key, t in peft.get_peft_model_state_dict(theirs).items()}
    peft.set_peft_model_state_dict(theirs, state)
    graft = bind(base().eval(), PolyConfig(**FIELDS))
    params = {path: {leaf: state[f"{PREFIX}{path}.{leaf}"] for leaf in graft.init()[path]} for path in ("0", "2")}
    return theirs, graft, params


def test_rows_of_tasks_are_pefts_and_so_are_their_gradients():
    theirs, graft, params = planted()
    single, _ = split_tasks(PolyConfig(**FIELDS), params)
    of_task = bind(graft.model, single)

    def loss(params):
        _, tasks = split_tasks(PolyConfig(**FIELDS), params)
        return of_task(route(tasks, TASKS), X).square().mean()

    value, grads = value_and_grad(loss)(params)
    expected = theirs.base_model(X, task_ids=TASKS).square().mean()
    expected.backward()
    torch.testing.assert_close(value, expected)
    own = {key.removeprefix(PREFIX).replace(".default", ""): p.grad for key, p in theirs.named_parameters()}
    for path, leaves in grads.items():
        torch.testing.assert_close(leaves, {leaf: own[f"{path}.{leaf}"] for leaf in leaves})
    torch.testing.assert_close(torch.func.grad(loss)(params), grads)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(-1, 2), min_size=1, max_size=6))
def test_each_row_is_its_tasks_alone_and_what_is_merged(rows):
    _, graft, params = planted()
    single, tasks = split_tasks(PolyConfig(**FIELDS), params)
    of_task = bind(graft.model, single)
    x = torch.randn(len(rows), 5, 4, generator=torch.Generator().manual_seed(2))
    y = of_task(route(tasks, rows), x)
    for row, task in enumerate(rows):
        twin = base()
        if task >= 0:
            tree = unstack(tasks)[task]
            torch.testing.assert_close(y[row], of_task(tree, x[row : row + 1])[0])
            twin.load_state_dict(merge(of_task, tree))
        torch.testing.assert_close(y[row], twin(x[row]))


def test_tasks_share_their_skills_and_copy_nothing():
    _, _, params = planted()
    _, tasks = split_tasks(PolyConfig(**FIELDS), params)
    assert tasks["0"][LOGITS].shape == (3, 1, 8)
    for leaf in ("poly_lora_A", "poly_lora_B"):
        assert tasks["0"][leaf].shape[0] == 3 and tasks["0"][leaf].data_ptr() == params["0"][leaf].data_ptr()


def test_training_draws_pefts_samples():
    theirs, _, params = planted()
    theirs.train()
    single, tasks = split_tasks(PolyConfig(**FIELDS), params)
    of_task = bind(base(), single)
    torch.manual_seed(3)
    expected = theirs.base_model(X, task_ids=TASKS)
    torch.manual_seed(3)
    torch.testing.assert_close(of_task(route(tasks, TASKS, batch_dim=0), X), expected)
    torch.manual_seed(3)
    one = theirs.base_model(X, task_ids=torch.full((4,), 1))
    torch.manual_seed(3)
    torch.testing.assert_close(of_task(unstack(tasks)[1], X), one)


def test_in_place_rows_of_tasks_are_pefts_in_training_too():
    theirs, _, params = planted()
    model = inject_adapter_in_model(PolyConfig(**FIELDS), base(), params=copy.deepcopy(params)).eval()
    y = adapter_rows(model, ["default"] * 4, task_ids=TASKS)(X)
    torch.testing.assert_close(y, theirs.base_model(X, task_ids=TASKS))
    for one in (y, theirs.base_model(X, task_ids=TASKS)):
        one.square().sum().backward()
    own = {key.removeprefix(PREFIX): p.grad for key, p in theirs.named_parameters() if p.requires_grad}
    torch.testing.assert_close({key: p.grad for key, p in model.named_parameters() if p.requires_grad}, own)
    model.train()
    torch.manual_seed(3)
    drawn = adapter_rows(model, ["default"] * 4, task_ids=TASKS, batch_dim=0)(X)
    torch.manual_seed(3)
    torch.testing.assert_close(drawn, theirs.train().base_model(X, task_ids=TASKS))


def test_rows_of_tasks_stand_beside_rows_of_other_adapters():
    theirs, _, params = planted()
    model = inject_adapter_in_model(PolyConfig(**FIELDS), base(), params=copy.deepcopy(params)).eval()
    inject_adapter_in_model(PolyConfig(**{**FIELDS, "n_tasks": 2}), model, "two")
    inject_adapter_in_model(LoraConfig(r=2, init_lora_weights=False, target_modules=["0"]), model, "lora")
    y = adapter_rows(model, ["default", "lora", "two", "__base__"], task_ids=[2, 9, 1, 9])(X)
    torch.testing.assert_close(y[0], theirs.base_model(X, task_ids=TASKS)[0])
    ours.set_adapter(model, "lora")
    torch.testing.assert_close(y[1], model(X)[1])
    torch.testing.assert_close(y[3], base()(X)[3])
    with pytest.raises(ValueError, match=re.escape("task_ids[2] is 2, and adapter 'two' has tasks 0 to 1")):
        adapter_rows(model, ["default", "lora", "two", "__base__"], task_ids=[2, 9, 2, 9])(X)


def test_a_peft_model_takes_task_ids():
    theirs, _, params = planted()
    model = ours.get_peft_model(base(), PolyConfig(**FIELDS)).eval()
    state = {f"{path}.{leaf}": tensor for path, leaves in params.items() for leaf, tensor in leaves.items()}
    assert set_peft_model_state_dict(model, state) == ([], [])
    torch.testing.assert_close(model(X, task_ids=TASKS), theirs.base_model(X, task_ids=TASKS))
    with model.disable_adapter():
        torch.testing.assert_close(model(X, task_ids=TASKS), base()(X))


def test_files_of_several_tasks_go_both_ways(tmp_path):
    theirs, graft, params = planted()
    save_adapter(graft, tmp_path / "mine", params=params)
    other = peft.PeftModel.from_pretrained(base(), tmp_path / "mine").eval()
    torch.testing.assert_close(other.base_model(X, task_ids=TASKS), theirs.base_model(X, task_ids=TASKS))
    other.save_pretrained(tmp_path / "theirs")
    again = bind(base(), load_config(tmp_path / "theirs"))
    loaded = load_adapter(again, tmp_path / "theirs")
    assert optree.tree_all(optree.tree_map(torch.equal, loaded, params))
    model = load_adapter(base(), tmp_path / "theirs").eval()
    y = adapter_rows(model, ["default"] * 4, task_ids=TASKS)(X)
    torch.testing.assert_close(y, theirs.base_model(X, task_ids=TASKS))
    assert get_peft_model_state_dict(model).keys() == {
        key.removeprefix(PREFIX) for key in peft.get_peft_model_state_dict(theirs)
    }


def test_calls_that_do_not_say_the_task_are_errors_that_say_what_to_give():
    _, graft, params = planted()
    words = r"0: this adapter is of 3 tasks, and nothing says which one .* split_tasks\(config, params\).* task_ids"
    for call in (lambda: graft(params, X), lambda: merge(graft, params)):
        with pytest.raises(UnsupportedConfig, match=words):
            call()
    model = inject_adapter_in_model(PolyConfig(**FIELDS), base())
    with pytest.raises(UnsupportedConfig, match=words):
        model(X)
    with pytest.raises(ValueError, match="'default' is of 3 tasks, and nothing says which one each row is of; give"):
        adapter_rows(model, ["default"] * 4)(X)
    with pytest.raises(ValueError, match=r"task_ids has shape \(3,\) and dtype torch.int64, expected one long number"):
        adapter_rows(model, ["default"] * 4, task_ids=[0, 1, 2])
    lora = inject_adapter_in_model(LoraConfig(target_modules=["0"]), base())
    with pytest.raises(ValueError, match=r"task_ids are given, and none of the adapters \['default'\] is of tasks"):
        adapter_rows(lora, ["default"] * 4, task_ids=TASKS)(X)


def test_split_tasks_refuses_what_is_no_tree_of_these_tasks():
    _, _, params = planted()
    with pytest.raises(TypeError, match="split_tasks: config is a LoraConfig, expected a PolyConfig"):
        split_tasks(LoraConfig(), params)
    words = r"0: poly_router.module_logits has shape \(3, 8\), expected \(2, n_splits\*n_skills\), a row for each"
    with pytest.raises(ValueError, match=words):
        split_tasks(PolyConfig(**{**FIELDS, "n_tasks": 2}), params)


def test_an_adapter_of_one_task_needs_no_task_ids():
    model = inject_adapter_in_model(PolyConfig(**{**FIELDS, "n_tasks": 1}), base()).eval()
    torch.testing.assert_close(adapter_rows(model, ["default"] * 4)(X), model(X))
    graft = bind(base().eval(), PolyConfig(**{**FIELDS, "n_tasks": 1}))
    torch.testing.assert_close(graft(extract_params(model), X), model(X))
