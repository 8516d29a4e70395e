"""Writes to dicts are noticed, whatever wrote."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from torchgraft.functional._versions import DictContents, count_writes

WRITES = {
    "attribute": lambda m: setattr(m, "scale", 2.0),
    "removed attribute": lambda m: delattr(m, "scale"),
    "own dict": lambda m: vars(m).update(scale=2.0),
    "mode": lambda m: m.eval(),
    "parameter": lambda m: setattr(m, "weight", nn.Parameter(torch.ones(1, 1))),
    "registry": lambda m: m._parameters.__setitem__("weight", nn.Parameter(torch.ones(1, 1))),
    "hook": lambda m: m.register_forward_hook(print),
    "other registry": lambda m: setattr(m, "_forward_hooks", OrderedDict({0: print})),
    "forward": lambda m: setattr(m, "forward", print),
    "cleared": lambda m: m._parameters.clear(),
}


@pytest.mark.parametrize("write", WRITES)
def test_each_write_is_noticed_and_its_undoing_too(write):
    module = nn.Linear(1, 1, bias=False)
    nn.init.ones_(module.weight)
    module.scale = 1.0
    dicts = [vars(module), module._parameters, module._forward_hooks]
    before, contents = count_writes(dicts), DictContents(dicts)
    assert contents.same() and count_writes(dicts) == before
    saved = [one.copy() for one in dicts]
    WRITES[write](module)
    assert count_writes(dicts) > before
    assert not contents.same() and not contents.same()
    for one, old in zip(dicts, saved, strict=True):
        one.clear()
        one.update(old)
    assert contents.same() and contents.same()
