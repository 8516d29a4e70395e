"""What calls see of changes of the model, and grafts of models that are said to stay as they are."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from torchgraft.adapters import LoraConfig
from torchgraft.functional import bind


class Scaled(nn.Module):
    """A layer and a tensor of one element."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.layer(x) * self.scale


class Counting(Scaled):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def bound(model, **fields):
    graft = bind(model, LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False, **fields))
    return graft, graft.init(torch.Generator().manual_seed(0)), torch.randn(4, 3)


def test_an_equal_tensor_of_one_element_is_another_one():
    model = Scaled()
    graft, params, x = bound(model)
    y = graft(params, x)
    model.scale = nn.Parameter(torch.ones(1))
    torch.testing.assert_close(graft(params, x), y)
    model.scale.data.fill_(3.0)
    torch.testing.assert_close(graft(params, x), 3 * y)


@pytest.mark.parametrize("register", ["register_full_backward_pre_hook", "register_full_backward_hook"])
def test_each_new_and_each_removed_backward_hook_is_seen(register):
    model, seen = Scaled(), []
    graft, params, x = bound(model)
    leaves = [x.requires_grad_(), *(leaf.requires_grad_() for leaf in params["layer"].values())]

    def backward():
        seen.clear()
        torch.autograd.grad(graft(params, x).sum(), leaves)
        return sorted(seen)

    assert backward() == []
    first = getattr(model, register)(lambda *args: seen.append(1))
    assert backward() == [1]
    getattr(model, register)(lambda *args: seen.append(2))
    assert backward() == [1, 2]
    first.remove()
    assert backward() == [2]


def test_registries_that_are_replaced_and_modules_that_move_are_seen():
    model = nn.Sequential(Scaled(), nn.Sequential(), nn.Sequential())
    graft = bind(model, LoraConfig(r=2, target_modules=["0.layer"], init_lora_weights=False))
    params, x = graft.init(), torch.randn(4, 3)
    y = graft(params, x)
    model[0].register_forward_hook(lambda module, args, y: y + 1)
    torch.testing.assert_close(graft(params, x), y + 1)
    model[0]._forward_hooks = OrderedDict()
    torch.testing.assert_close(graft(params, x), y)
    model[1].add_module("0", nn.ReLU())
    torch.testing.assert_close(graft(params, x), y.relu())
    model[2]._modules["0"] = model[1]._modules.pop("0")
    model[2].register_forward_pre_hook(lambda module, args: (args[0] - 1,))
    torch.testing.assert_close(graft(params, x), (y - 1).relu())


def test_a_graft_of_an_unchanging_model_sees_written_values_and_gives_the_same():
    model = Scaled()
    graft, params, x = bound(model, lora_dropout=0.5)
    fixed = graft.in_mode(training=False).unchanging()
    for _ in range(5):
        torch.testing.assert_close(fixed(params, x), graft.in_mode(training=False)(params, x), rtol=0, atol=0)
    with torch.no_grad():
        model.layer.weight.mul_(2)
    model.scale.data.fill_(3.0)
    torch.testing.assert_close(fixed(params, x), graft.in_mode(training=False)(params, x), rtol=0, atol=0)


def test_a_broken_promise_is_an_error_where_it_is_noticed():
    model = Scaled()
    graft, params, x = bound(model)
    fixed = graft.unchanging()
    fixed(params, x)
    model.eval()
    with pytest.raises(RuntimeError, match=r"was in training mode then and is in evaluation mode.*call unchanging\(\)"):
        fixed(params, x)
    graft, params, x = bound(Counting())
    graft(params, x)
    with pytest.raises(RuntimeError, match="forward of this Counting writes to attributes of its modules"):
        graft.unchanging()(params, x)


def test_views_of_an_unchanging_graft_and_training_through_it():
    model = Scaled()
    graft, params, x = bound(model)
    fixed, leaves = graft.unchanging(), [leaf.requires_grad_() for leaf in params["layer"].values()]
    torch.testing.assert_close(fixed.view(params)(x), graft(params, x))
    for _ in range(3):
        expected = torch.autograd.grad(graft(params, x).square().sum(), leaves)
        torch.testing.assert_close(torch.autograd.grad(fixed(params, x).square().sum(), leaves), expected)
    once = torch.utils.checkpoint.checkpoint(lambda x: fixed(params, x), x, use_reentrant=False)
    fixed(params, 2 * x)
    again = torch.autograd.grad(once.square().sum(), leaves)
    torch.testing.assert_close(again, expected)
