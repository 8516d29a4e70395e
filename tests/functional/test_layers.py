"""Layer types of one's own: other names and layouts, adapted like torch's own in both styles."""

import copy

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchgraft import adapters
from torchgraft.adapters import IA3Config, LoraConfig
from torchgraft.functional import bind, merge, register_layer, route, stack, unstack


class Dense(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(inputs, outputs, dtype=torch.float64))
        self.offset = nn.Parameter(torch.randn(outputs, dtype=torch.float64))

    def forward(self, x):
        return x @ self.kernel + self.offset


class Bare(nn.Module):
    """Without a bias, and with a buffer for a weight."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.register_buffer("w", torch.randn(outputs, inputs, dtype=torch.float64))

    def forward(self, input):
        return F.linear(input, self.w)


class Table(nn.Module):
    def __init__(self, vocabulary, size, columns=False):
        super().__init__()
        self.columns = columns
        table = torch.randn(vocabulary, size, dtype=torch.float64)
        self.table = nn.Parameter(table.mT.contiguous() if columns else table)

    def forward(self, ids):
        return (self.table.mT if self.columns else self.table)[ids]


class Columns(Table):
    def __init__(self, vocabulary, size):
        super().__init__(vocabulary, size, True)


class Blur(nn.Module):
    stride, padding, padding_mode = 1, "same", "zeros"

    def __init__(self, inputs, outputs):
        super().__init__()
        self.filters = nn.Parameter(torch.randn(outputs, inputs, 3, 3, dtype=torch.float64))

    def forward(self, image):
        return F.conv2d(image, self.filters, padding="same")


register_layer(Dense, "linear", weight="kernel", bias="offset", transposed=True)
register_layer(Bare, "linear", weight="w", bias=None)
register_layer(Table, "embedding", weight="table", bias=None)
register_layer(Blur, "conv2d", weight="filters", bias=None)

IDS = torch.tensor([[0, 3], [1, 1], [4, 2]])
CASES = {
    "linear": (lambda: Dense(4, 4), lambda: torch.randn(3, 4, dtype=torch.float64)),
    "linear without bias": (lambda: Bare(4, 4), lambda: torch.randn(3, 5, 4, dtype=torch.float64)),
    "embedding": (lambda: Table(5, 4), lambda: IDS),
    "conv2d": (lambda: Blur(4, 4), lambda: torch.randn(3, 4, 5, 5, dtype=torch.float64)),
}


def filled(graft, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return optree.tree_map(lambda t: 0.5 * torch.randn(t.shape, generator=generator, dtype=t.dtype), graft.init())


def case(name):
    torch.manual_seed(0)
    layer, x = CASES[name]
    model = nn.Sequential(layer())
    return model, LoraConfig(r=2, target_modules=["0"]), x()


@pytest.mark.parametrize("name", CASES)
def test_functional(name):
    model, config, x = case(name)
    before = copy.deepcopy(model.state_dict())
    graft = bind(model, config)
    assert torch.equal(graft(graft.init(), x), model(x))
    trees = [filled(graft, seed) for seed in range(2)]
    twin = copy.deepcopy(model)
    expected = []
    for tree in trees:
        twin.load_state_dict(merge(graft, tree))
        expected.append(twin(x))
        torch.testing.assert_close(graft(tree, x), expected[-1])
        assert not torch.allclose(expected[-1], model(x))
    given = graft(route(stack(trees), torch.tensor([1, -1, 0])), x)
    torch.testing.assert_close(given, torch.stack([expected[1][0], model(x)[1], expected[0][2]]))
    given = torch.vmap(lambda tree: graft(tree, x))(stack(trees))
    torch.testing.assert_close(given, torch.stack(expected))
    torch._dynamo.reset()
    compiled = torch.compile(lambda tree: graft(tree, x), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(trees[0]), expected[0])
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert len(unstack(stack(trees))) == 2


@pytest.mark.parametrize("name", CASES)
def test_in_place(name, tmp_path):
    model, config, x = case(name)
    before, plain = copy.deepcopy(model), model(x)
    graft = bind(copy.deepcopy(model), config)
    tree = filled(graft)
    expected = graft(tree, x)
    adapters.inject_adapter_in_model(config, model, params=tree)
    torch.testing.assert_close(model(x), expected)
    assert torch.equal(adapters.get_base_model_state_dict(model)[next(iter(before.state_dict()))], before[0].weights())
    adapters.merge_adapter(model)
    torch.testing.assert_close(model[0].base_layer(x), expected)
    adapters.unmerge_adapter(model)
    with adapters.disable_adapter(model):
        assert torch.equal(model(x), plain)
    adapters.save_adapter(model, tmp_path)
    loaded = adapters.load_adapter(graft, tmp_path)
    torch.testing.assert_close(graft(loaded, x), expected)
    other = adapters.load_adapter(copy.deepcopy(before), tmp_path)
    torch.testing.assert_close(other(x), expected)
    merged = adapters.merge_and_unload(model)
    assert type(merged[0]) is type(before[0])
    torch.testing.assert_close(merged(x), expected)


for one, attribute in ((Dense, "kernel"), (Bare, "w"), (Table, "table"), (Blur, "filters")):
    one.weights = lambda self, attribute=attribute: getattr(self, attribute).data


def test_subclasses_and_other_methods_come_along():
    class Loud(Dense):
        def forward(self, x):
            return 2 * super().forward(x)

    model, x = nn.Sequential(Loud(4, 3)), torch.randn(2, 4, dtype=torch.float64)
    graft = bind(model, IA3Config(target_modules=["0"], feedforward_modules=[]))
    params = filled(graft)
    merged = copy.deepcopy(model)
    merged.load_state_dict(merge(graft, params))
    torch.testing.assert_close(graft(params, x), merged(x))
    assert list(bind(model, LoraConfig(target_modules="all-linear")).init()) == ["0"]


def test_an_embedding_with_columns():
    register_layer(Columns, "embedding", weight="table", bias=None, transposed=True)
    model = nn.Sequential(Columns(5, 4))
    graft = bind(model, LoraConfig(r=2, target_modules=["0"]))
    params = filled(graft)
    merged = copy.deepcopy(model)
    merged.load_state_dict(merge(graft, params))
    torch.testing.assert_close(graft(params, IDS), merged(IDS))


def test_nonsense_says_what_is_wrong():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))

    with pytest.raises(TypeError, match=r"register_layer: cls is 3, expected a class of torch\.nn\.Module"):
        register_layer(3, "linear")
    with pytest.raises(ValueError, match="kind is 'lstm', expected one of linear, embedding, conv1d"):
        register_layer(Own, "lstm")
    with pytest.raises(TypeError, match="weight is None and bias is 'bias', expected names of attributes"):
        register_layer(Own, "linear", weight=None)
    with pytest.raises(ValueError, match="transposed is True for the conv2d Own"):
        register_layer(Own, "conv2d", transposed=True)
    with pytest.raises(ValueError, match="Linear is known already as something else; register a subclass"):
        register_layer(nn.Linear, "linear")
    register_layer(Own, "linear")
    register_layer(Own, "linear")
    with pytest.raises(ValueError, match="Own is known already as something else"):
        register_layer(Own, "linear", transposed=True)
    model = nn.Sequential(Own())
    with pytest.raises(
        ValueError, match=r"0: Own is registered as linear, and its 'weight' has shape \(3,\), expected"
    ):
        bind(model, LoraConfig(target_modules=["0"]))
    model[0].weight = nn.Parameter(torch.zeros(3, 2))
    model[0].bias = torch.zeros(5)
    with pytest.raises(ValueError, match=r"and its 'bias' is \(5,\), expected shape \(3,\)"):
        bind(model, LoraConfig(target_modules=["0"]))
    del model[0].weight
    with pytest.raises(ValueError, match="and its 'weight' is NoneType"):
        bind(model, LoraConfig(target_modules=["0"]))
