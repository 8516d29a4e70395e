"""Several adapters on one model, against PEFT: whatever is called, flags, active adapters and outputs stay equal."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from peft.functional import delete_adapter, set_adapter, set_requires_grad

from torchgraft import adapters

from .models import inject, inject_peft, inputs, layers, net, parameters, peft_state, quiet, randomise, trained

BOTH = ["first", "second"]
CALLS = ["inject", "set_adapter", "set_requires_grad", "delete", "enable"]
METHODS = [("LORA", "linear"), ("IA3", "linear"), ("OFT", "linear"), ("OFT", "embedding")]
SIZE = {"LORA": ("r", [1, 3]), "IA3": ("init_ia3_weights", [True]), "OFT": ("oft_block_size", [2, 4])}


class Pair:
    """A model with torchgraft's adapters beside one with PEFT's."""

    def __init__(self, method, kind):
        self.method, self.mine, self.theirs, self.names = method, net(kind), net(kind), []

    def inject(self, name, **fields):
        for model, do in ((self.mine, inject), (self.theirs, inject_peft)):
            torch.manual_seed(len(self.names))
            do(model, self.method, name, **fields)
            randomise(model)
        self.theirs.eval()
        self.names.append(name)

    def set_adapter(self, names, inference_mode):
        adapters.set_adapter(self.mine, names, inference_mode)
        set_adapter(self.theirs, names, inference_mode)

    def set_requires_grad(self, names, requires_grad):
        adapters.set_requires_grad(self.mine, names, requires_grad)
        set_requires_grad(self.theirs, names, requires_grad)

    def delete(self, name):
        with quiet("(?i)adapter .* was active"):
            left = adapters.delete_adapter(self.mine, name)
            assert (left or []) == (delete_adapter(self.theirs, name, prefix=f"{self.method.lower()}_") or [])
        self.names.remove(name)

    def enable(self, enabled):
        (adapters.enable_adapter_layers if enabled else adapters.disable_adapter_layers)(self.mine)
        for layer in layers(self.theirs):
            layer.enable_adapters(enabled)

    def check(self):
        assert parameters(self.mine).keys() == parameters(self.theirs).keys()
        assert trained(self.mine) == trained(self.theirs)
        for mine, theirs in zip(layers(self.mine), layers(self.theirs), strict=True):
            assert mine.active_adapters == theirs.active_adapters
            assert mine.disable_adapters == theirs.disable_adapters
        x = inputs(self.mine.kind)
        assert torch.allclose(self.mine(x), self.theirs(x), rtol=0, atol=1e-10)
        for name in self.names:
            state, expected = (
                adapters.get_peft_model_state_dict(self.mine, adapter_name=name),
                peft_state(self.theirs, name),
            )
            assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "kind"), METHODS)
@settings(max_examples=20)
@given(data=st.data())
def test_any_sequence_of_calls_does_what_pefts_do(method, kind, data):
    pair = Pair(method, kind)
    field, sizes = SIZE[method]
    # PEFT chooses for each layer anew what is active after a deletion and whether an injected layer is switched off.
    everywhere = data.draw(st.booleans(), "same targets for all")
    targets = [BOTH] if everywhere else [BOTH, ["first"], ["second"]]
    for step in range(data.draw(st.integers(1, 6))):
        calls = CALLS[: 5 if everywhere else 3] if len(pair.names) > 1 else ["inject"]
        free = [name for name in "cabd" if name not in pair.names]
        call = data.draw(st.sampled_from(calls if free else calls[1:]), f"call {step}")
        if call == "inject":
            size = data.draw(st.sampled_from(sizes))
            where, frozen = data.draw(st.sampled_from(targets)), data.draw(st.booleans())
            pair.inject(free[0], **{field: size}, target_modules=where, inference_mode=frozen)
        elif call == "delete":
            pair.delete(data.draw(st.sampled_from(pair.names)))
        elif call == "enable":
            pair.enable(data.draw(st.booleans()))
        else:
            names = data.draw(st.lists(st.sampled_from(pair.names), unique=True, min_size=1))
            flag = data.draw(st.booleans())
            getattr(pair, call)(names[0] if len(names) == 1 and data.draw(st.booleans()) else names, flag)
        pair.check()
