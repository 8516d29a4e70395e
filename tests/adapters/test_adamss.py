"""AdaMSS against its equation and against PEFT: clusters, biases, ranks, files, and the budget step by step."""

import copy
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.func import grad, vmap
from transformers.trainer_callback import CallbackHandler, TrainerControl, TrainerState

from torchgraft.adapters import (
    AdamssConfig,
    adamss_state,
    allocate_subspaces,
    as_peft,
    extract_params,
    freeze_subspaces,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    load_adapter,
    save_adapter,
)
from torchgraft.functional import bind, merge, stack

FIELDS = {"r": 6, "num_subspaces": 3, "subspace_rank": 2, "target_modules": ["0", "2"]}
BUDGET = {"use_asa": True, "asa_target_subspaces": 3, "init_warmup": 2, "final_warmup": 9, "mask_interval": 2}
X = torch.randn(5, 10, generator=torch.Generator().manual_seed(1))


def net(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 16, bias=bias), nn.Tanh(), nn.Linear(16, 12, bias=bias))


def theirs(model, seed=3, **fields):
    torch.manual_seed(seed)
    config = peft.AdamssConfig(**{**FIELDS, **fields})
    return peft.get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=False)


def moved(tree, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        path: {leaf: t + 0.3 * torch.randn(t.shape, generator=generator) for leaf, t in leaves.items()}
        for path, leaves in tree.items()
    }


def close(given, wanted):
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("fields", [{}, {"use_dynamic_rank": True, "svd_threshold": 0.3}, {"r": 100}])
def test_seeds_clusters_and_outputs_are_pefts(tmp_path, fields, bias):
    model = net(bias)
    other = theirs(model, init_weights=None, **fields).eval()
    torch.manual_seed(3)
    mine = inject_adapter_in_model(AdamssConfig(**{**FIELDS, "init_weights": None, **fields}), copy.deepcopy(model))
    state = {key.removeprefix("base_model.model."): t for key, t in peft.get_peft_model_state_dict(other).items()}
    close(dict(get_peft_model_state_dict(mine)), state)
    close(mine(X), other(X))
    layer, pefts = mine[0], other.base_model.model[0]
    assert (
        layer.num_subspaces == pefts.num_subspaces and len(layer.adamss_B["default"]) == pefts.num_subspaces["default"]
    )
    assert layer.adamss_B["default"][0].shape == pefts.adamss_B["default"][0].shape
    assert torch.equal(layer.scatter_index["default"], pefts.scatter_index["default"])
    other.save_pretrained(tmp_path / "theirs")
    save_adapter(mine, tmp_path / "mine")
    files = [load_file(tmp_path / whose / "adapter_model.safetensors") for whose in ("mine", "theirs")]
    close(*files)
    close(load_adapter(copy.deepcopy(model), tmp_path / "theirs")(X), other(X))


@pytest.mark.parametrize("bias", [True, False])
def test_weights_and_biases_are_the_equations(bias):
    model = net(bias)
    graft = bind(model, AdamssConfig(**FIELDS))
    params = moved(graft.init())
    state, exact = merge(graft, params), {}
    for path, site in graft.sites[""].items():
        layer, v = model.get_submodule(path), site.constants.adamss_newB.double()
        exact[f"{path}.weight"] = layer.weight.detach().double().clone()
        if bias:
            exact[f"{path}.bias"] = layer.bias.detach().double().clone()
        for i, rows in enumerate(site.constants.rows()):
            delta = params[path][f"adamss_B.{i}"].double() @ params[path][f"adamss_A.{i}"].double() @ v
            exact[f"{path}.weight"][rows] += delta[:, : layer.in_features]
            if bias:
                exact[f"{path}.bias"][rows] += delta[:, -1]
    close({key: tensor.double() for key, tensor in state.items()}, exact)
    close(graft(params, X), torch.func.functional_call(model.double(), exact, X.double()).float())


def test_each_row_is_in_one_cluster_and_starts_in_its_own_part():
    graft = bind(net(), AdamssConfig(**FIELDS))
    params = graft.init()
    for path, site in graft.sites[""].items():
        assert sorted(torch.cat(site.constants.rows()).tolist()) == list(range(site.out_features))
        assert all(
            len(rows) and site.constants.sizes[i][0] == len(rows) for i, rows in enumerate(site.constants.rows())
        )
        for i, rows in enumerate(site.constants.rows()):
            a, part = params[path][f"adamss_A.{i}"], site.constants.left[rows]
            close(a @ a.T, torch.eye(len(a)))
            close(part.T @ torch.linalg.pinv(part.T) @ a.T, a.T)


# -- the budget ------------------------------------------------------------------------------------------------------


def loss(graft):
    return lambda params, scale: (graft(params, X) * scale).square().sum()


def trained(graft, params, config, steps=12, scale=1.0):
    """Return parameters and state after some steps of Adam-like updates, and the number of clusters after each."""
    state, counts = adamss_state(config, params), []
    for step in range(steps):
        grads = grad(loss(graft))(params, scale)
        after = {path: {leaf: p - 0.01 * grads[path][leaf] for leaf, p in params[path].items()} for path in params}
        params = freeze_subspaces(params, after, state)
        state = allocate_subspaces(config, params, grads, state, step)
        counts.append(sum(sum(kept.values()) for kept in state["kept"].values()))
    return params, state, torch.stack(counts)


def expected_kept(config, history):
    """Return the kept clusters after some steps, from `(params, grads)` of each, number by number in float64."""
    names = [(path, leaf) for path, leaves in history[0][0].items() for leaf in leaves]
    kept = {(path, leaf[9:]) for path, leaf in names}
    total, average, deviation = len(kept), dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    for step, (params, grads) in enumerate(history):
        if not config.init_warmup <= step <= config.final_warmup:
            continue
        for path, leaf in names:
            now = (params[path][leaf].double() * grads[path][leaf].double()).abs()
            b, a = config.asa_uncertainty_beta, config.asa_importance_beta
            deviation[path, leaf] = b * deviation[path, leaf] + (1 - b) * (now - average[path, leaf]).abs()
            average[path, leaf] = a * average[path, leaf] + (1 - a) * now
        if step % config.mask_interval:
            continue
        left = (config.final_warmup - step) / (config.final_warmup - config.init_warmup)
        count = int(config.asa_target_subspaces + (total - config.asa_target_subspaces) * left**3)
        score = {
            one: sum(
                (average[one[0], f"adamss_{x}.{one[1]}"] * deviation[one[0], f"adamss_{x}.{one[1]}"]).mean()
                for x in "AB"
            )
            for one in kept
        }
        kept = set(sorted(kept, key=lambda one: -score[one])[:count])
        average, deviation = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    return kept


def test_the_budget_is_the_equations_and_frozen_clusters_stay_where_they_are():
    config = AdamssConfig(**FIELDS, **BUDGET)
    graft = bind(net(), config)
    params, state = moved(graft.init()), None
    state, history, frozen = adamss_state(config, params), [], {}
    for step in range(12):
        grads = grad(loss(graft))(params, 1.0)
        after = {path: {leaf: p - 0.01 * grads[path][leaf] for leaf, p in params[path].items()} for path in params}
        params = freeze_subspaces(params, after, state)
        history.append((params, grads))
        state = allocate_subspaces(config, params, grads, state, step)
        kept = {(path, i) for path, numbers in state["kept"].items() for i, own in numbers.items() if own}
        assert kept == expected_kept(config, history), step
        for (path, leaf), value in frozen.items():
            assert torch.equal(params[path][leaf], value)
        for path, leaves in params.items():
            frozen |= {(path, leaf): leaves[leaf] for leaf in leaves if (path, leaf[9:]) not in kept}
    assert len(kept) == 3 and len(frozen) == 6


def test_a_stack_has_a_budget_for_each():
    config = AdamssConfig(**FIELDS, **BUDGET)
    graft = bind(net(), config)
    trees, scales = [moved(graft.init(), seed) for seed in range(3)], torch.tensor([1.0, 0.5, 2.0])
    each = [trained(graft, tree, config, scale=scale) for tree, scale in zip(trees, scales, strict=True)]
    given = vmap(lambda tree, scale: trained(graft, tree, config, scale=scale))(stack(trees), scales)
    close(given[0], stack([params for params, *_ in each]))
    assert torch.equal(given[2], torch.stack([counts for *_, counts in each]))
    assert given[2][:, -1].tolist() == [3, 3, 3]


def steps_in_place(model, tuner, config, steps):
    """Train with plain steps; return which clusters are trained after each step."""
    found = []
    for step in range(steps):
        model(X).square().sum().backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.01 * p.grad
        tuner.update_and_allocate(step)
        model.zero_grad()
        names = {name for name, p in model.named_parameters() if p.requires_grad}
        found.append({name for name in names if "adamss_A" in name})
    return found


def test_the_budget_in_place_is_pefts_but_for_the_last_one_within_it():
    fields = {**BUDGET, "init_weights": None}
    config = AdamssConfig(**FIELDS, **fields)
    torch.manual_seed(3)
    mine, other = get_peft_model(net(), config), theirs(net(), **fields)
    ours, pefts = (steps_in_place(model, model.base_model, config, 12) for model in (mine, other))
    assert [len(names) for names in ours] == [6, 6, 6, 6, 4, 4, 3, 3, 3, 3, 3, 3]
    assert ours[:4] == pefts[:4] and ours[4] > pefts[4] and len(pefts[4]) == 3  # of scores above the fourth, itself out


def test_the_tree_of_the_model_is_trained_as_the_function_is():
    config = AdamssConfig(**FIELDS, **BUDGET, init_weights=None)
    torch.manual_seed(3)
    model = get_peft_model(net(), config)
    graft = bind(net(), config)
    params = copy.deepcopy(extract_params(model.base_model.model))
    params = {path: {leaf: p.detach() for leaf, p in leaves.items()} for path, leaves in params.items()}
    steps_in_place(model, model.base_model, config, 12)
    close(extract_params(model.base_model.model), trained(graft, params, config)[0])


def test_errors_say_what_is_missing(monkeypatch):
    config = AdamssConfig(**FIELDS, **BUDGET)
    graft = bind(net(), config)
    params = graft.init()
    state = adamss_state(config, params)
    with pytest.raises(ValueError, match="use_asa is False, so there is no budget; set use_asa=True"):
        allocate_subspaces(AdamssConfig(**FIELDS), params, params, state, 0)
    with pytest.raises(ValueError, match="step is True|step is 1.5, expected a Python integer, 0 or more"):
        allocate_subspaces(config, params, params, state, 1.5)
    with pytest.raises(TypeError, match="state is dict|state is .*, expected what adamss_state or the last call"):
        allocate_subspaces(config, params, params, params, 1)
    with pytest.raises(
        ValueError, match=r"adamss_A.0 has shape \(2, 2, 6\), expected a matrix; for a stack of adapters"
    ):
        allocate_subspaces(config, *[stack([params, params])] * 2, adamss_state(config, stack([params, params])), 1)
    with pytest.raises(
        KeyError, match=r"params\['0'\] has \['lora_A'\], expected 'adamss_A.0', 'adamss_B.0' and so on"
    ):
        adamss_state(config, {"0": {"lora_A": X}})
    with pytest.raises(TypeError, match="params is of type Tensor, expected one AdaMSS adapter's tree"):
        adamss_state(config, X)
    with pytest.raises(
        ValueError, match="the weight of 0 is on the meta device, and its values say which rows are clus"
    ):
        bind(nn.Sequential(nn.Linear(4, 4, device="meta")), AdamssConfig(target_modules=["0"]))
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ImportError, match="K-means, as PEFT does, which is not installed; install scikit-learn"):
        bind(net(), config)


def test_the_tuner_is_found_under_pefts_name():
    with as_peft():
        model = peft_model()
    assert type(model.base_model).__name__ == "AdamssModel"
    model.base_model.update_and_allocate(0)  # without use_asa there is nothing to do, as in PEFT
    assert all(p.requires_grad for name, p in model.named_parameters() if "adamss_" in name)


def peft_model():
    from peft import AdamssConfig, get_peft_model

    return get_peft_model(net(), AdamssConfig(**FIELDS))


def test_a_trainer_calls_the_budget_through_pefts_callback():
    with as_peft():
        from peft.tuners.adamss.asa_callback import AdamssAsaCallback
    torch.manual_seed(3)
    mine, other = (get_peft_model(net(), AdamssConfig(**FIELDS, **BUDGET, init_weights=None)) for _ in range(2))
    load_parameters(other, mine)
    handler = CallbackHandler([AdamssAsaCallback()], mine, None, None, None)
    state, control = TrainerState(), TrainerControl()
    handler.on_train_begin(None, state, control)

    class Tuner:
        def update_and_allocate(self, step):
            state.global_step = step
            handler.on_optimizer_step(None, state, control)
            handler.on_step_end(None, state, control)

    config = mine.peft_config["default"]
    called = steps_in_place(mine, Tuner(), config, 12)
    assert called == steps_in_place(other, other.base_model, config, 12) and len(called[-1]) == 3
    with pytest.raises(AttributeError, match="AdamssAsaCallback has no attribute 'of'"):
        AdamssAsaCallback().of  # noqa: B018


def load_parameters(model, other):
    with torch.no_grad():
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.copy_(q)
