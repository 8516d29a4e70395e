"""OFT against its equation and against PEFT."""

import copy
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradgradcheck
from torch.func import grad, vmap
from transformers.pytorch_utils import Conv1D

from torchgraft.adapters import OFTConfig
from torchgraft.adapters._methods.shared.rotated import add_block_product
from torchgraft.functional import bind, merge, stack

TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.float64: {"rtol": 1e-11, "atol": 1e-11}}
OPTIONS = [
    {"oft_block_size": 4},
    {"r": 2, "oft_block_size": 0},
    {"oft_block_size": 4, "block_share": True},
    {"oft_block_size": 4, "use_cayley_neumann": False},
    {"oft_block_size": 4, "num_cayley_neumann_terms": 2},
    {"oft_block_size": 4, "num_cayley_neumann_terms": 3},
    {"oft_block_size": 4, "num_cayley_neumann_terms": 4},
    {"oft_block_size": 4, "num_cayley_neumann_terms": 7, "block_share": True},
    {"oft_block_size": 4, "coft": True, "eps": 0.3},
]


def randomised(params, dtype=torch.float64, scale=0.2):
    return {
        path: {leaf: scale * torch.randn_like(p, dtype=dtype) for leaf, p in leaves.items()}
        for path, leaves in params.items()
    }


def rotation(config, leaf, width):
    """`R` as a full matrix, entry by entry."""
    size = round((1 + (1 + 8 * leaf.shape[1]) ** 0.5) / 2)
    blocks = []
    for row in leaf:
        q = torch.zeros(size, size, dtype=leaf.dtype)
        q[tuple(torch.triu_indices(size, size, 1))] = row
        q = q - q.T
        if config.coft:
            radius = config.eps / len(leaf) ** 0.5
            q = q * min(1.0, radius / q.norm().item())
        eye = torch.eye(size, dtype=leaf.dtype)
        if not config.use_cayley_neumann:
            blocks.append((eye - q) @ torch.linalg.inv(eye + q))
            continue
        last = {2: 1, 3: 3, 4: 3}.get(config.num_cayley_neumann_terms, config.num_cayley_neumann_terms - 1)
        r = eye + sum((2 * torch.linalg.matrix_power(q, n) for n in range(1, last)), torch.zeros_like(q))
        blocks.append(r + (2 if last == 1 else 1) * torch.linalg.matrix_power(q, last))
    return torch.block_diag(*blocks * (width // size // len(blocks)))


SITES = {
    "linear": (lambda: nn.Linear(8, 3), (2, 8)),
    "linear (4-d input)": (lambda: nn.Linear(8, 3, bias=False), (2, 3, 2, 8)),
    "Conv1D": (lambda: Conv1D(3, 8), (2, 5, 8)),
    "pointwise": (lambda: nn.Conv2d(8, 3, 1, stride=2, padding=1), (2, 8, 3, 3)),
    "pointwise, unbatched": (lambda: nn.Conv2d(8, 3, 1), (8, 3, 3)),
    "conv2d": (lambda: nn.Conv2d(2, 3, (2, 4), padding=1, dilation=(2, 1)), (2, 2, 5, 5)),
}


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_forward_and_merged_weight_are_the_equation(options, site):
    make, shape = SITES[site]
    model = nn.Sequential(make().double())
    config = OFTConfig(target_modules=["0"], **options)
    graft = bind(model, config)
    params, x = randomised(graft.init()), torch.randn(shape, dtype=torch.float64)
    module = model[0]
    weight = module.weight.T if site == "Conv1D" else module.weight
    r = rotation(config, params["0"]["oft_R"], weight[0].numel())
    rotated = (weight.flatten(1) @ r.T).view(weight.shape)
    if weight.ndim == 2:
        oracle = F.linear(x, rotated, module.bias)
    else:
        oracle = F.conv2d(x, rotated, module.bias, module.stride, module.padding, module.dilation)
    torch.testing.assert_close(graft(params, x), oracle, rtol=0, atol=1e-11)
    torch.testing.assert_close(
        torch.func.functional_call(model, merge(graft, params), (x,)), oracle, rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_embedding_rotates_its_output(options):
    model = nn.Sequential(nn.Embedding(5, 8).double())
    config = OFTConfig(target_modules=["0"], **options)
    graft = bind(model, config)
    params, ids = randomised(graft.init()), torch.tensor([[0, 4], [2, 2]])
    oracle = model(ids) @ rotation(config, params["0"]["oft_embedding_R"], 8)
    torch.testing.assert_close(graft(params, ids), oracle, rtol=0, atol=1e-11)
    torch.testing.assert_close(torch.func.functional_call(model, merge(graft, params), (ids,)), oracle)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 8)
        self.pointwise = nn.Conv2d(8, 12, 1)
        self.kernel = nn.Conv2d(1, 4, 2)
        self.head = nn.Linear(12, 4, bias=False)

    def forward(self, ids):
        y = self.pointwise(self.table(ids)[:, :, None].movedim(-1, 1)).tanh()
        return self.head(y.movedim(1, -1)[:, :, 0])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_outputs_and_merged_weights_are_those_of_peft(options, dtype):
    model, ids = Net().to(dtype), torch.tensor([[0, 4], [2, 1]])
    names = ["table", "pointwise", "kernel", "head"]
    graft = bind(model, OFTConfig(target_modules=names, **options), allow_unreached=True)
    params = randomised(graft.init(), dtype)
    twin = peft.inject_adapter_in_model(peft.OFTConfig(target_modules=names, **options), copy.deepcopy(model))
    for path, leaves in params.items():
        for leaf, value in leaves.items():
            own = getattr(twin.get_submodule(path), leaf)["default"].weight
            assert own.shape == value.shape
            own.data.copy_(value)
    # PEFT rounds the radius of the projection to float32
    tolerance = TOLERANCE[torch.float32] if "coft" in options else TOLERANCE[dtype]
    torch.testing.assert_close(graft(params, ids), twin(ids), **tolerance)
    state = merge(graft, params)
    for path in params:
        layer = twin.get_submodule(path)
        layer.merge()
        torch.testing.assert_close(state[f"{path}.weight"], layer.get_base_layer().weight.data, **tolerance)


def test_a_kernel_that_peft_does_not_leave_alone_is_left_alone_here():
    model, x = nn.Sequential(nn.Conv2d(2, 3, 2)), torch.randn(1, 2, 5, 5)
    kwargs = {"oft_block_size": 4, "target_modules": ["0"]}
    twin = peft.inject_adapter_in_model(peft.OFTConfig(**kwargs), copy.deepcopy(model))
    graft = bind(model, OFTConfig(**kwargs))
    assert not torch.allclose(twin(x), model(x), atol=0.1)
    assert torch.equal(graft(graft.init(), x), model(x))


@pytest.mark.parametrize(("width", "given"), [(12, 5), (12, 32), (13, 4), (12, 8), (10, 7), (48, 14)])
@pytest.mark.parametrize("name", ["r", "oft_block_size"])
def test_sizes_that_do_not_divide_are_adjusted_as_in_peft(name, width, given):
    kwargs = {"r": 0, "oft_block_size": 0, name: given, "target_modules": ["0"]}
    model = nn.Sequential(nn.Linear(width, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = peft.inject_adapter_in_model(peft.OFTConfig(**kwargs), copy.deepcopy(model))[0]
    if layer.oft_block_size["default"] == 1:
        with (
            pytest.warns(UserWarning, match="OFTConfig"),
            pytest.raises(ValueError, match="makes blocks of 1 at 0, which has"),
        ):
            bind(model, OFTConfig(**kwargs))
        return
    with pytest.warns(UserWarning, match=f"OFTConfig: {name} is {given} at 0, which does not divide its {width} coor"):
        graft = bind(model, OFTConfig(**kwargs))
    assert graft.init()["0"]["oft_R"].shape == layer.oft_R["default"].weight.shape


def test_init_of_random_rotations_is_that_of_peft():
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8))
    kwargs = {"oft_block_size": 4, "target_modules": ["0", "1"], "init_weights": False}
    torch.manual_seed(3)
    twin = peft.inject_adapter_in_model(peft.OFTConfig(**kwargs), copy.deepcopy(model))
    params = bind(model, OFTConfig(**kwargs)).init(torch.Generator().manual_seed(3))
    for path, leaves in params.items():
        assert torch.equal(leaves["oft_R"], twin.get_submodule(path).oft_R["default"].weight)


@pytest.mark.parametrize("exact", [False, True])
def test_identity_at_init_bit_for_bit_in_half_precision(exact):
    model = nn.Sequential(nn.Conv2d(2, 8, 2), nn.Conv2d(8, 8, 1), nn.Linear(4, 8)).bfloat16()
    graft = bind(model, OFTConfig(oft_block_size=4, use_cayley_neumann=not exact, target_modules=["0", "1", "2"]))
    x = torch.randn(2, 2, 5, 5, dtype=torch.bfloat16)
    y = graft(graft.init(), x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, model(x))
    half = graft.init(dtype=torch.bfloat16)
    assert torch.equal(graft(half, x), y)


def test_dropout_makes_whole_blocks_the_identity():
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(3, 8)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(8))
        model[0].bias.zero_()
    for share in (False, True):
        config = OFTConfig(oft_block_size=2, module_dropout=0.5, block_share=share, target_modules=["0"])
        graft = bind(model.train(), config)
        params = randomised(graft.init(), torch.float32, 1.0)
        full = (x @ rotation(config, params["0"]["oft_R"], 8)).unflatten(1, (4, 2))
        ids = torch.arange(40)
        y = vmap(lambda i, graft=graft, params=params: graft(params, x + 0 * i), randomness="different")(ids)
        blocks = y.unflatten(-1, (4, 2)).transpose(1, 2)
        dropped = (blocks == x.unflatten(1, (4, 2)).transpose(0, 1)).flatten(2).all(2)
        turned = torch.isclose(blocks, full.transpose(0, 1), atol=1e-5).flatten(2).all(2)
        assert torch.equal(dropped, ~turned)
        assert 0.3 < dropped.float().mean() < 0.7
        same = vmap(lambda i, graft=graft, params=params: graft(params, x + 0 * i), randomness="same")(ids)
        assert torch.equal(same, same[:1].expand_as(same))
        model.eval()
        torch.testing.assert_close(graft(params, x), full.flatten(1))


def test_projection_has_gradients_at_zero_and_changes_no_parameter():
    model, x = nn.Sequential(nn.Linear(8, 3)).double(), torch.randn(2, 8, dtype=torch.float64)
    graft = bind(model, OFTConfig(oft_block_size=4, coft=True, target_modules=["0"]))
    zero = {path: {leaf: p.double() for leaf, p in leaves.items()} for path, leaves in graft.init().items()}
    gradient = grad(lambda params: graft(params, x).sum())(zero)["0"]["oft_R"]
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0
    params = randomised(zero)
    before = params["0"]["oft_R"].clone()
    graft(params, x)
    assert torch.equal(params["0"]["oft_R"], before)


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[3], OPTIONS[7], OPTIONS[8]], ids=str)
def test_second_derivatives_and_gradients_of_stacks(options):
    model, x = nn.Sequential(nn.Conv2d(2, 8, 2), nn.Linear(4, 8)).double(), torch.randn(1, 2, 3, 5).double()
    graft = bind(model, OFTConfig(target_modules=["0", "1"], **options))
    trees = [randomised(graft.init()) for _ in range(2)]

    def loss(params):
        return graft(params, x).sin().sum()

    together = vmap(grad(loss))(stack(trees))
    for path in trees[0]:
        alone = torch.stack([grad(loss)(tree)[path]["oft_R"] for tree in trees])
        torch.testing.assert_close(together[path]["oft_R"], alone)
    leaves = [trees[0][path]["oft_R"].requires_grad_() for path in ("0", "1")]
    assert gradgradcheck(lambda a, b: loss({"0": {"oft_R": a}, "1": {"oft_R": b}}), leaves)


def test_errors_say_what_to_write():
    with pytest.raises(
        ValueError, match="OFTConfig: r is 8 and oft_block_size is 32, expected one positive and the oth"
    ):
        OFTConfig(r=8)
    with pytest.raises(ValueError, match="r is 0 and oft_block_size is 0"):
        OFTConfig(oft_block_size=0)
    with pytest.raises(ValueError, match="num_cayley_neumann_terms is 1, expected 2 or more"):
        OFTConfig(num_cayley_neumann_terms=1)
    with pytest.raises(ValueError, match="OFTConfig: 0 is a convolution with 2 groups, expected 1"):
        bind(nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)), OFTConfig(oft_block_size=2, target_modules=["0"]))


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 0, 6), (2, 3, 6)])
def test_a_product_of_blocks_is_that_of_the_diagonal_matrix(blocks, shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    d = torch.randn(blocks, 2, 2, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(add_block_product(x, d), x + x @ torch.block_diag(*d.expand(3, 2, 2)))
    torch.testing.assert_close(torch.func.jvp(add_block_product, (x, d), (x, d))[0], add_block_product(x, d))
    assert torch.autograd.gradcheck(add_block_product, (x, d))
    assert torch.autograd.gradgradcheck(add_block_product, (x, d))
    flat = x.detach().movedim(-1, 0).contiguous().movedim(0, -1)
    assert torch.equal(add_block_product(flat, torch.zeros_like(d)), flat)
