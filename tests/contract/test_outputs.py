"""What every method computes: the base's output at first, then its formula's, for all dtypes and layouts."""

import copy

import optree
import pytest
import torch
import torch.utils._pytree as pytree
from torch.func import grad, vmap

from torchgraft.adapters import inject_adapter_in_model
from torchgraft.functional import Graft, Unsupported, bind, functional_call, merge, stack
from torchgraft.functional.extending import shared_shapes

from .cases import KINDS, METHODS, Case, case, close, same
from .sites import SITES, Conv1D, kind, on

DTYPES = (torch.float64, torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identity_at_init(name, site, dtype):
    one = case(name, site, dtype)
    rounding = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(one.graft(one.initial, one.x), one.model(one.x), rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_identity_at_init_bit_for_bit(name, site, dtype):
    one = case(name, site, dtype)
    expected = one.model(one.x)
    assert torch.equal(one.graft(one.initial, one.x), expected)
    assert torch.equal(one.graft.view(one.initial)(one.x), expected)
    injected = inject_adapter_in_model(one.config, copy.deepcopy(one.frozen))
    assert torch.equal(injected(one.x), one.frozen(one.x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_output_is_the_formulas(name, site, dtype):
    one = case(name, site, dtype)
    y, expected = one.graft(one.params, one.x), one.oracle(one.params, one.x)
    assert y.dtype == dtype
    close(y.double(), expected, dtype)
    close(one.graft.view(one.params)(one.x), y, dtype)
    assert not torch.allclose(expected, one.model(one.x).double(), atol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_merged_weights_are_the_formulas(name, site, dtype):
    one = case(name, site, dtype)
    state, expected = merge(one.graft, one.params), one.dense(one.params)
    assert list(state) == list(one.model.state_dict()) and {t.dtype for t in state.values()} == {dtype}
    close({key: tensor.double() for key, tensor in state.items()}, expected, dtype)
    twin = copy.deepcopy(one.model)
    twin.load_state_dict(state)
    close(twin(one.x), one.graft(one.params, one.x), dtype)


def test_model_is_what_it_was(name, site):
    one = Case(name, site, torch.float64)
    before = {key: value.clone() for key, value in one.model.state_dict().items()}
    objects = [id(x) for m in one.model.modules() for x in (m, *vars(m).values())]
    merge(one.graft, one.params)
    one.loss(optree.tree_map(lambda t: t.clone().requires_grad_(), one.params), one.x).backward()
    assert all(torch.equal(before[key], value) for key, value in one.model.state_dict().items())
    assert objects == [id(x) for m in one.model.modules() for x in (m, *vars(m).values())]
    assert all(p.requires_grad and p.grad is None for p in one.model.parameters())


def laid_out(one):
    """Return the input in other layouts of memory: axes in another order, cut out of a larger one, and expanded."""
    for x in layouts(one.x):
        if isinstance(one.model.first, Conv1D) and x.reshape(-1, x.shape[-1]).data_ptr() != x.data_ptr():
            continue  # it takes only what can be viewed as a matrix
        yield x


def layouts(x):
    order = (*range(1, x.ndim), 0)
    yield x.permute(order).contiguous().permute(x.ndim - 1, *range(x.ndim - 1))
    yield x.transpose(-1, -2).contiguous().transpose(-1, -2)
    yield torch.cat([x, x], 0)[::2]
    yield torch.cat([x, x], -1)[..., : x.shape[-1]]
    yield x[:1].expand(3, *x.shape[1:])
    if x.ndim == 4:
        yield x.to(memory_format=torch.channels_last)


def test_layouts_of_memory_change_nothing(name, site):
    one = case(name, site, torch.float32)
    for x in laid_out(one):
        close(one.graft(one.params, x), one.graft(one.params, x.contiguous()), torch.float32)
    transposed = copy.deepcopy(one.model)
    for parameter in transposed.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.transpose(0, 1).contiguous().transpose(0, 1)
    params = optree.tree_map(lambda t: torch.stack([t, t], -1)[..., 0], one.params)
    graft = Graft(transposed, one.graft.binding)  # what is made from the weights may have other signs
    close(graft(params, one.x), one.graft(one.params, one.x), torch.float32)


def test_layouts_of_memory_keep_the_identity_bit_for_bit(name, site):
    one = case(name, site, torch.float32)
    for x in laid_out(one):
        assert torch.equal(one.graft(one.initial, x), one.model(x)), (x.shape, x.stride())


def test_init_is_deterministic_and_has_the_shapes_it_says(name, site):
    one = case(name, site)
    again = one.graft.init(torch.Generator().manual_seed(0))
    assert same(again, one.initial)
    shared = shared_shapes(one.config, one.graft.sites[""])
    for path, leaves in one.initial.items():
        site = one.graft.sites[""].get(path)
        expected = shared if site is None else one.config.method.shapes(one.config, site)
        assert {leaf: tuple(t.shape) for leaf, t in leaves.items()} == expected
        assert all(type(t) is torch.Tensor and t.dtype == torch.float64 for t in leaves.values())
    half = bind(copy.deepcopy(one.model).bfloat16(), one.config).init()
    assert {t.dtype for t in optree.tree_leaves(half)} == {torch.float32}


def test_leaf_order_is_the_same_everywhere(name, site):
    one = case(name, site)
    assert [id(t) for t in optree.tree_leaves(one.params)] == [id(t) for t in pytree.tree_leaves(one.params)]
    assert [id(t) for t in optree.tree_leaves(one.initial)] == [id(t) for t in pytree.tree_leaves(one.initial)]


def test_base_as_data(name, site):
    one = case(name, site)
    base = {key: torch.randn_like(value) for key, value in one.model.named_parameters()}
    twin = copy.deepcopy(one.model)
    twin.load_state_dict(base, strict=False)  # tied tensors have one name here
    again = Graft(twin, one.graft.binding)  # constants made from the weights are those of the model that was bound
    expected = again(one.params, one.x)
    close(functional_call(one.graft, (base, one.params), (one.x,)), expected)
    bases = stack([base, {key: 2 * value for key, value in base.items()}])
    both = vmap(lambda b: functional_call(one.graft, (b, one.params), (one.x,)))(bases)
    close(both[0], expected)
    grads = grad(lambda b: functional_call(one.graft, (b, one.params), (one.x,)).square().sum())(base)
    assert all(g.abs().sum() > 0 for g in grads.values())


def test_other_kinds_of_layer_are_refused(name):
    row = METHODS[name]
    others = [site for site in SITES if site not in KINDS[name]]
    if not hasattr(row.config, "target_parameters"):
        others = [site for site in others if "target_parameters" not in SITES[site].targets([])]
    for site in others:
        with pytest.raises(Unsupported, match="first"):
            bind(SITES[site].build(), on(row.config, site))
    assert {kind(site) for site in others}.isdisjoint(map(kind, KINDS[name]))


def test_an_empty_batch_is_empty_and_has_zero_gradients(name, site):
    one = case(name, site)
    leaves = optree.tree_map(lambda t: t.clone().requires_grad_(), one.params)
    x = one.x[:0]
    y = one.graft(leaves, x)
    assert y.shape == one.model(x).shape and y.dtype == one.dtype
    flat = optree.tree_leaves(leaves)
    for gradient in torch.autograd.grad(y.sum(), flat, allow_unused=True, materialize_grads=True):
        assert not gradient.any()
