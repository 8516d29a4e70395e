"""Tensors of the base that an adapter replaces: a head as a whole, beside the adapter's sites."""

import copy
import pickle

import optree
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, jvp, vmap

from torchgraft.adapters import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    adalora_state,
    allocate,
    extract_graft,
    extract_params,
    inject_adapter_in_model,
    orthogonality,
    prune,
)
from torchgraft.functional import bind, functional_call, merge, route, stack, unstack, value_and_grad

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
HEAD = {"r": 2, "target_modules": ["body"], "modules_to_save": ["head"]}


class Head(nn.Sequential):
    def forward(self, x):
        return self[2](self[1](self[0](x)).mT).flatten(1)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.head = Head(nn.Linear(4, 5), nn.LayerNorm(5), nn.Conv1d(5, 2, 1))

    def forward(self, x):
        return self.head(self.body(x).tanh())


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.body = nn.Linear(4, 4)
        self.out = nn.Linear(4, 6, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        return self.out(self.body(self.embed(ids)))


class Reader(nn.Module):
    """Computes with the head's weight instead of calling it."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return nn.functional.linear(self.body(x), self.head.weight)


def moved(tree, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return optree.tree_map(lambda t: t + 0.3 * torch.randn(t.shape, generator=generator, dtype=t.dtype), tree)


@pytest.fixture
def model():
    return Model().double()


@pytest.fixture
def x():
    return torch.randn(3, 7, 4, dtype=torch.float64)


def reference(model, params, x):
    """The model's own forward with the leaves loaded into it, and LoRA by its formula."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for path, leaves in params.items():
            for leaf, tensor in leaves.items():
                if path.startswith("head"):
                    twin.get_parameter(f"{path}.{leaf}").copy_(tensor)
        lora = params["body"]
        twin.body.weight += 4 * lora["lora_B"] @ lora["lora_A"]
    return twin(x)


def test_leaves_are_copies_of_the_bases_tensors(model, x):
    graft = bind(model, LoraConfig(**HEAD))
    params = graft.init()
    assert {path: list(leaves) for path, leaves in params.items()} == {
        "body": ["lora_A", "lora_B"],
        "head.0": ["bias", "weight"],
        "head.1": ["bias", "weight"],
        "head.2": ["bias", "weight"],
    }
    weight = params["head.0"]["weight"]
    assert torch.equal(weight, model.head[0].weight) and weight.data_ptr() != model.head[0].weight.data_ptr()
    assert not weight.requires_grad
    assert torch.equal(graft(params, x), model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_has_wide_leaves_and_the_bases_bits(dtype):
    model = Model().to(dtype)
    graft, x = bind(model, LoraConfig(**HEAD)), torch.randn(3, 7, 4, dtype=dtype)
    params = graft.init()
    assert params["head.0"]["weight"].dtype == torch.float32
    y = graft(params, x)
    assert y.dtype == dtype and torch.equal(y, model(x))
    assert graft.init(dtype=torch.float64)["head.0"]["weight"].dtype == torch.float64


def test_output_merge_and_view_are_the_models_with_those_tensors(model, x):
    graft = bind(model, LoraConfig(**HEAD))
    params = moved(graft.init())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = reference(model, params, x)
    torch.testing.assert_close(graft(params, x), expected, **CLOSE)
    assert not torch.allclose(model(x), expected, atol=1e-2)
    torch.testing.assert_close(graft.view(params)(x), expected, **CLOSE)
    twin = copy.deepcopy(model)
    twin.load_state_dict(merge(graft, params))
    torch.testing.assert_close(twin(x), expected, **CLOSE)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(graft(graft.init(), x), model(x))


def test_a_view_is_copied_and_pickled(model, x):
    graft = bind(model, LoraConfig(**HEAD))
    params = moved(graft.init())
    view = graft.view(params)
    assert isinstance(view.head[0], nn.Linear)
    for other in (copy.deepcopy(view), pickle.loads(pickle.dumps(view))):
        torch.testing.assert_close(other(x), view(x))


def test_gradients_and_transforms(model, x):
    graft = bind(model, LoraConfig(**HEAD))
    trees = [moved(graft.init(), seed) for seed in range(3)]

    def loss(params, x):
        return graft(params, x).square().mean()

    leaves = optree.tree_map(lambda t: t.clone().requires_grad_(), trees[0])
    expected = torch.autograd.grad(loss(leaves, x), optree.tree_leaves(leaves))
    for given in (grad(loss)(trees[0], x), value_and_grad(loss)(trees[0], x)[1]):
        torch.testing.assert_close(optree.tree_leaves(given), list(expected), **CLOSE)
    assert all(g.abs().max() > 0 for g in expected)
    _, tangent = jvp(lambda p: loss(p, x), (trees[0],), (trees[1],))
    by_hand = sum((g * t).sum() for g, t in zip(expected, optree.tree_leaves(trees[1]), strict=True))
    torch.testing.assert_close(tangent, by_hand, **CLOSE)
    many = stack(trees)
    torch.testing.assert_close(vmap(graft, (0, None))(many, x), torch.stack([graft(t, x) for t in trees]), **CLOSE)
    each = unstack(vmap(grad(loss), (0, None))(many, x))
    torch.testing.assert_close(each[2], grad(loss)(trees[2], x), **CLOSE)


def test_compiles_once(model, x):
    torch._dynamo.reset()
    graft = bind(model, LoraConfig(**HEAD))
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda p, x: graft(p, x), backend=counter, fullgraph=True)
    for seed in range(3):
        params = moved(graft.init(), seed)
        torch.testing.assert_close(compiled(params, x), graft(params, x), **CLOSE)
    assert counter.frame_count == 1
    assert torch.equal(graft(graft.init(), x), model(x))


@pytest.mark.parametrize("rows", [[2, 0, 1], [1, 1, 1], [0, -1, 2], [-1, -1, -1], [1, 1, 0, 0, 2, 2], None])
def test_rows_have_their_own(model, x, rows):
    graft = bind(model, LoraConfig(**HEAD))
    trees = [moved(graft.init(), seed) for seed in range(3)]
    x = x.repeat(2, 1, 1)[: len(rows or trees)]
    index = list(range(3)) if rows is None else rows
    expected = torch.cat([(model if i < 0 else lambda x, i=i: graft(trees[i], x))(x[[j]]) for j, i in enumerate(index)])
    many = stack(trees)
    y = graft(route(many, None if rows is None else torch.tensor(rows)), x)
    torch.testing.assert_close(y, expected, **CLOSE)
    base = model(x)
    assert all(torch.equal(y[j], base[j]) for j, i in enumerate(index) if i < 0)
    if rows is not None:

        def loss(many):
            return graft(route(many, torch.tensor(rows)), x).square().sum()

        total = lambda many: sum(  # noqa: E731
            (model(x[[j]]) if i < 0 else graft(unstack(many)[i], x[[j]])).square().sum() for j, i in enumerate(rows)
        )
        if max(rows) >= 0:
            torch.testing.assert_close(grad(loss)(many), grad(total)(many), **CLOSE)


@pytest.mark.slow
def test_a_routed_view_and_a_compiled_route(model, x):
    torch._dynamo.reset()
    graft = bind(model, LoraConfig(**HEAD))
    many = stack([moved(graft.init(), seed) for seed in range(2)])
    rows = torch.tensor([1, -1, 0])
    expected = graft(route(many, rows), x)
    torch.testing.assert_close(graft.view(route(many, rows))(x), expected, **CLOSE)
    compiled = torch.compile(lambda many, rows, x: graft(route(many, rows), x), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(many, rows, x), expected, **CLOSE)


def test_routed_beside_a_plain_and_another_routed_adapter(model, x):
    graft = bind(model, {"a": LoraConfig(**HEAD), "b": LoraConfig(r=1, target_modules=["body"])})
    trees = [moved(graft.init(), seed) for seed in range(2)]
    a, b = (stack([tree[name] for tree in trees]) for name in "ab")
    rows, other = torch.tensor([1, 0, 1]), torch.tensor([0, -1, 1])
    y = graft({"a": route(a, rows), "b": trees[0]["b"]}, x)
    expected = [graft({"a": trees[i]["a"], "b": trees[0]["b"]}, x[[j]]) for j, i in enumerate(rows)]
    torch.testing.assert_close(y, torch.cat(expected), **CLOSE)
    y = graft({"a": route(a, rows), "b": route(b, other)}, x)
    expected = [
        graft({"a": trees[i]["a"]} | ({"b": trees[k]["b"]} if k >= 0 else {}), x[[j]])
        for j, (i, k) in enumerate(zip(rows.tolist(), other.tolist(), strict=True))
    ]
    torch.testing.assert_close(y, torch.cat(expected), **CLOSE)


def test_a_stack_of_several_ranks(model, x):
    configs = [LoraConfig(**{**HEAD, "r": r}) for r in (1, 3)]
    graft = bind(model, configs)
    trees = [moved(graft.member(i).init(), i) for i in range(2)]
    many = graft.stack(trees)
    torch.testing.assert_close(graft.unstack(many), trees)
    expected = torch.cat([graft.member(i)(trees[i], x[[j]]) for j, i in enumerate([1, 0, 1])])
    torch.testing.assert_close(graft(route(many, torch.tensor([1, 0, 1])), x), expected, **CLOSE)
    y = vmap(lambda i, tree: graft.at(i)(tree, x))(torch.arange(2), many)
    torch.testing.assert_close(y[1], graft.member(1)(trees[1], x), **CLOSE)
    with pytest.raises(ValueError, match=r"configs\[1\].modules_to_save is None and configs\[0\]"):
        bind(model, [configs[0], LoraConfig(r=2, target_modules=["body"])])


def test_base_params_give_way_to_the_adapter(model, x):
    graft = bind(model, LoraConfig(**HEAD))
    params = moved(graft.init())
    base = {"head.0.weight": torch.zeros(5, 4, dtype=torch.float64), "body.bias": model.body.bias + 1}
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.body.bias += 1
    torch.testing.assert_close(functional_call(graft, (base, params), (x,)), reference(twin, params, x), **CLOSE)


# -- several adapters ---------------------------------------------------------------------------------------------


def test_a_named_adapter_that_is_off_leaves_the_bases_tensors(model, x):
    graft = bind(model, {"a": LoraConfig(**HEAD), "b": IA3Config(target_modules=["body"], feedforward_modules=[])})
    params = moved(graft.init())
    assert torch.equal(graft({}, x), model(x))
    alone = bind(model, LoraConfig(**HEAD))
    torch.testing.assert_close(graft({"a": params["a"]}, x), alone(params["a"], x), **CLOSE)
    assert "head.0" not in params["b"]


def test_two_adapters_of_one_tensor_in_one_call_are_an_error_that_names_both(model, x):
    graft = bind(model, {"a": LoraConfig(**HEAD), "b": LoraConfig(**{**HEAD, "modules_to_save": ["head.0"]})})
    params = moved(graft.init())
    for name in "ab":
        graft({name: params[name]}, x)
    message = "params has adapters 'a' and 'b', which both replace head.0.weight, and only one can; leave one of them"
    for call in (lambda: graft(params, x), lambda: merge(graft, params), lambda: graft.view(params)):
        with pytest.raises(ValueError, match=message):
            call()


# -- tied tensors and other places --------------------------------------------------------------------------------


def test_a_copy_of_a_tied_module_leaves_the_other_module_alone():
    model, ids = Tied().double(), torch.arange(6)
    graft = bind(model, LoraConfig(r=2, target_modules=["body"], modules_to_save=["out"]))
    params = moved(graft.init())
    twin = copy.deepcopy(model)
    twin.out.weight = nn.Parameter(params["out"]["weight"])
    with torch.no_grad():
        twin.body.weight += 4 * params["body"]["lora_B"] @ params["body"]["lora_A"]
    torch.testing.assert_close(graft(params, ids), twin(ids), **CLOSE)
    with pytest.raises(ValueError, match=r"out.weight: is tied to embed.weight, which would change with it; .*view"):
        merge(graft, params)
    both = bind(model, LoraConfig(r=2, target_modules=["body"], modules_to_save=["out", "embed"])).init()
    assert both["out"]["weight"].data_ptr() != both["embed"]["weight"].data_ptr()


def test_parents_that_read_the_weight_see_the_leaf(x):
    model = Reader().double()
    graft = bind(model, LoraConfig(**HEAD))
    params = moved(graft.init())
    twin = copy.deepcopy(model)
    twin.load_state_dict(merge(graft, params))
    torch.testing.assert_close(graft(params, x), twin(x), **CLOSE)
    with pytest.raises(RuntimeError, match=r"head: the model reads the weight of this module instead of calling it"):
        graft(route(stack([params, params]), torch.tensor([0, 1, 0])), x)


def test_a_module_that_cannot_run_in_groups_says_so():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    config = LoraConfig(target_modules=["0"], modules_to_save=["1"])
    graft = bind(model, config)
    many, x = stack([graft.init(), graft.init()]), torch.randn(2, 4)
    with pytest.raises(ValueError, match=r"1: an adapter replaces tensors of this BatchNorm1d, which normalises over"):
        graft(route(many, batch_dim=0), x)
    with pytest.raises(ValueError, match="route: rows meet in the output.*batch statistics"):
        graft(route(many), x)
    model.eval()
    torch.testing.assert_close(graft(route(many), x), model(x))


def test_buffers_of_a_saved_module_are_no_leaves():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    graft = bind(model, LoraConfig(target_modules=["0"], modules_to_save=["1"]))
    assert set(graft.init()["1"]) == {"weight", "bias"}
    _, buffers = functional_call(graft, graft.init(), (torch.randn(3, 4),), return_buffers=True)
    assert buffers["1.num_batches_tracked"] == 1 and model[1].num_batches_tracked == 0


# -- what is refused ----------------------------------------------------------------------------------------------


def refusals():
    def lora(saved):
        return LoraConfig(target_modules=["0"], modules_to_save=saved)

    linear = nn.Linear(4, 4)
    yield "missing", nn.Sequential(linear), lora(["x"]), r"LoraConfig: modules_to_save has 'x', which is no module"
    pair = nn.Sequential(linear, nn.Sequential(nn.Linear(4, 4)))
    yield "nested", pair, lora(["1", "1.0"]), r"modules_to_save names 1.0, which is a part of 1; name one of them"
    normed = nn.Sequential(linear, nn.Embedding(3, 2, max_norm=1.0))
    yield "max_norm", normed, lora(["1"]), r"1: an Embedding with max_norm rewrites its weight in each forward"
    whole = nn.Sequential(linear, nn.Linear(4, 4))
    whole[1].weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    yield "integers", whole, lora(["1"]), r"1.weight: has dtype torch.int8, which cannot be trained"
    kept = nn.Sequential(linear, nn.Linear(4, 4))
    kept.kept = (kept[1].weight,)
    yield "tuple", kept, lora(["1"]), r"1.weight: the model keeps this tensor in a tuple"


@pytest.mark.parametrize(
    ("name", "model", "config", "message"), list(refusals()), ids=lambda x: x if isinstance(x, str) else ""
)
def test_what_cannot_be_replaced_is_refused_at_bind(name, model, config, message):
    with pytest.raises(ValueError, match=message):
        bind(model, config)


def test_trees_that_do_not_fit(model, x):
    graft = bind(model, LoraConfig(**HEAD))
    params = graft.init()
    with pytest.raises(KeyError, match=r"params lacks site 'head.0'"):
        graft({path: leaves for path, leaves in params.items() if path != "head.0"}, x)
    with pytest.raises(ValueError, match=r"params\['head.1'\]\['bias'\] has shape \(2,\), expected \(5,\)"):
        graft({**params, "head.1": {**params["head.1"], "bias": torch.zeros(2)}}, x)


def test_a_tensor_that_changed_after_bind(model, x):
    graft = bind(model, LoraConfig(**HEAD))
    params = moved(graft.init())
    expected = reference(model, params, x)
    model.head[0] = nn.Linear(4, 5).double()
    torch.testing.assert_close(graft(params, x), expected, **CLOSE)
    model.head[0] = nn.Linear(4, 6).double()
    with pytest.raises(ValueError, match=r"head.0.weight: was replaced after bind by a tensor of shape \(6, 4\)"):
        graft(params, x)


# -- in place -----------------------------------------------------------------------------------------------------


def test_planted_and_extracted(model, x):
    config = LoraConfig(**HEAD)
    graft = bind(model, config)
    params = moved(graft.init())
    injected = inject_adapter_in_model(config, copy.deepcopy(model), params=params)
    torch.testing.assert_close(injected(x), graft(params, x), **CLOSE)
    assert injected.head.modules_to_save["default"][0].weight.data_ptr() == params["head.0"]["weight"].data_ptr()
    extracted = extract_params(injected)
    torch.testing.assert_close(extracted, params, rtol=0, atol=0)
    torch.testing.assert_close(extract_graft(injected)(extracted, x), graft(params, x), **CLOSE)
    assert torch.equal(graft(extracted, x), graft(params, x))
    with pytest.raises(KeyError, match=r"params lacks site 'head.0'"):
        inject_adapter_in_model(config, copy.deepcopy(model), params={"body": params["body"]})


def test_planted_leaves_get_the_dtype_of_the_module():
    model, config = Model().bfloat16(), LoraConfig(**HEAD)
    graft, x = bind(model, config), torch.randn(3, 7, 4, dtype=torch.bfloat16)
    injected = inject_adapter_in_model(config, copy.deepcopy(model), params=graft.init())
    assert injected.head.modules_to_save["default"][0].weight.dtype == torch.bfloat16
    assert injected.body.lora_A["default"].weight.dtype == torch.float32
    torch.testing.assert_close(injected(x), graft(extract_params(injected), x))


# -- biases -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_are_leaves(model, x, bias):
    graft = bind(model, LoraConfig(r=2, target_modules=["body"], bias=bias))
    params = graft.init()
    assert torch.equal(graft(params, x), model(x))
    with_bias = ["body"] if bias == "lora_only" else ["body", "head.0", "head.1", "head.2"]
    assert [path for path, leaves in params.items() if "bias" in leaves] == with_bias
    trees = [moved(params, seed) for seed in range(2)]
    twin = copy.deepcopy(model)
    for path in with_bias:
        twin.get_submodule(path).bias = nn.Parameter(trees[0][path]["bias"])
    with torch.no_grad():
        twin.body.weight += 4 * trees[0]["body"]["lora_B"] @ trees[0]["body"]["lora_A"]
    expected = twin(x)
    torch.testing.assert_close(graft(trees[0], x), expected, **CLOSE)
    merged = merge(graft, trees[0])
    torch.testing.assert_close(merged["body.bias"], trees[0]["body"]["bias"], **CLOSE)
    twin.load_state_dict(merged)
    torch.testing.assert_close(twin(x), expected, **CLOSE)
    y = graft(route(stack(trees), torch.tensor([1, -1, 0])), x)
    torch.testing.assert_close(y, torch.cat([graft(trees[1], x[:1]), model(x[1:2]), graft(trees[0], x[2:])]), **CLOSE)


def test_a_stack_whose_configs_target_other_modules_has_no_biases_of_targets(model):
    configs = [LoraConfig(target_modules=[where], bias="lora_only") for where in ("body", "head.0")]
    with pytest.raises(ValueError, match=r"bind: only one of configs\[0\] and configs\[1\] replaces tensors of 'body'"):
        bind(model, configs)
    graft = bind(model, [LoraConfig(target_modules=[where], bias="all", r=2) for where in ("body", "head.0")])
    trees = [moved(graft.member(i).init(), i) for i in range(2)]
    x = torch.randn(2, 7, 4, dtype=torch.float64)
    y = graft(route(graft.stack(trees), torch.tensor([1, 0])), x)
    expected = torch.cat([graft.member(i)(trees[i], x[[j]]) for j, i in enumerate([1, 0])])
    torch.testing.assert_close(y, expected, **CLOSE)
    torch.testing.assert_close(graft.unstack(graft.stack(trees)), trees, rtol=0, atol=0)


def test_adaloras_budget_leaves_replaced_tensors_alone(model, x):
    config = AdaLoraConfig(
        init_r=3, target_r=1, total_step=2, target_modules=["body"], modules_to_save=["head.0"], bias="all"
    )
    graft = bind(model, config)
    params = moved(graft.init())
    grads = grad(lambda p: graft(p, x).square().sum() + orthogonality(config, p))(params)
    state = adalora_state(config, params)
    assert list(state["kept"]) == ["body"]
    for step in range(3):
        params, state = allocate(config, params, grads, state, step)
    assert params["body"]["lora_E"].count_nonzero() == 1 and params.keys() == grads.keys()
    torch.testing.assert_close(params["head.0"], moved(graft.init())["head.0"])
    small, pruned = prune(config, params, state)
    torch.testing.assert_close(bind(model, small)(pruned, x), graft(params, x), **CLOSE)


def test_a_class_of_the_users_may_be_called_again_and_again():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.by = nn.Parameter(torch.ones(4, dtype=torch.float64))

        def forward(self, x):
            return x * self.by

    model = nn.Sequential()
    model.add_module("body", nn.Linear(4, 4).double())
    model.add_module("head", Scale())
    graft = bind(model, LoraConfig(**HEAD))
    params, x = graft.init(), torch.randn(2, 4, dtype=torch.float64)
    params["head"]["by"] = torch.full((4,), 2.0, dtype=torch.float64)
    for _ in range(3):
        torch.testing.assert_close(graft(params, x), 2 * model(x))
