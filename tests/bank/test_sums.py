"""What waits for a step: sums of gradients with their norms, divided and clipped by the kernels that step."""

import random
from typing import Any

import pytest
import torch

from torchgraft.adapters import Bank, adamw, sgd
from torchgraft.adapters._bank.layout import Layout
from torchgraft.adapters._bank.state import State, accumulate
from torchgraft.functional import bind

from .alone import lora, model

SHAPES = {"0": {"a": (4, 3), "b": (2, 4)}, "1": {"c": (5,)}}
RANKS = [1, 2, 4, 1, 2]


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_sums_and_norms_are_those_of_all_gradients_since_they_began(dtype: torch.dtype, experts: int) -> None:
    draw = random.Random(0)
    layout = Layout.of({**SHAPES, "0": {"a": (experts * 4, 3), "b": (2, 4)}}, dtype, {"0": {"a": experts}})
    state = State.empty(5, layout.size, dtype, torch.device("cpu"))
    expected = torch.zeros(5, layout.size, dtype=torch.float64)
    for _ in range(30):
        slots = draw.sample(range(5), draw.randint(1, 5))
        fresh = [slot for slot in slots if draw.random() < 0.4]
        r = draw.choice([r for r in (1, 2, 4) if r >= max(RANKS[slot] for slot in slots)])
        each = torch.randn(len(slots), experts, r, 3).to(dtype)
        gradients = {"0": {"a": each.flatten(1, 2), "b": torch.randn(len(slots), 2, r).to(dtype)}}
        if draw.random() < 0.7:
            gradients["1"] = {"c": torch.randn(len(slots), 5).to(dtype)}
        for i, slot in enumerate(slots):
            each[i, :, RANKS[slot] :] = 0
            gradients["0"]["b"][i, :, RANKS[slot] :] = 0
            row = torch.zeros(layout.size, dtype=torch.float64)
            layout.write(row, {path: {n: leaf[i] for n, leaf in leaves.items()} for path, leaves in gradients.items()})
            expected[slot] = ((0 if slot in fresh else expected[slot]) + row).to(dtype).double()
        accumulate(state, slots, gradients, layout, None, fresh)
        torch.testing.assert_close(state.sums.double(), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(state.norms.double(), expected.norm(dim=1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_norm_that_is_not_finite_stays_so_until_the_sum_begins_anew(value: float) -> None:
    layout = Layout.of(SHAPES, torch.float32)
    state = State.empty(2, layout.size, torch.float32, torch.device("cpu"))
    for gradient in (torch.full((1, 4, 3), value), torch.ones(1, 1, 3)):
        accumulate(state, [1], {"0": {"a": gradient}}, layout, None)
        assert not state.norms[1].isfinite()
    accumulate(state, [1], {"0": {"a": torch.ones(1, 4, 3)}}, layout, None, fresh=[1])
    torch.testing.assert_close(state.norms, torch.tensor([0.0, 12**0.5]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [adamw, sgd])
@pytest.mark.parametrize("size", [1.0, 1e-18, 1e18])
def test_kernels_divide_and_clip_as_multiplying_before_does(make: Any, dtype: torch.dtype, size: float) -> None:
    peer = torch.optim.AdamW if make is adamw else torch.optim.SGD
    bank = Bank(bind(model().to(dtype), lora(2)), slots=3, optimizer=make(lr=0.5))
    for name in "abc":
        bank.add(name, lora(2))
    x, tokens = torch.randn(6, 5).to(dtype) * size, torch.tensor([2.0, 3.0, 5.0, 1.0, 4.0, 2.0])
    given, hyper = [*"abcabc"], {"a": {}, "b": {"max_norm": 0.25}, "c": {"max_norm": 0.25, "lr": 0.1}}
    before = {name: bank.tensors(name) for name in "abc"}
    with bank.rows(given, tokens=tokens) as adapted:
        adapted(x).float().sum().backward()
        gradients = adapted.gradients()
    assert gradients is not None
    report = bank.step(hyper)
    for i, name in enumerate("abc"):
        leaves = [(p, n) for p, own in before[name].items() for n in own]
        parameters = [before[name][p][n].float().requires_grad_() for p, n in leaves]
        for parameter, (p, n) in zip(parameters, leaves, strict=True):
            parameter.grad = gradients[p][n][i].float() / sum(
                t for t, g in zip(tokens, given, strict=True) if g == name
            )
        if most := hyper[name].get("max_norm"):
            norm = torch.nn.utils.clip_grad_norm_(parameters, most)
            torch.testing.assert_close(report[name].norm, float(norm), rtol=1e-3, atol=0)
        defaults = {"lr": 0.5, **({"weight_decay": 1e-2} if make is adamw else {})}
        peer(parameters, **{**defaults, **{k: v for k, v in hyper[name].items() if k == "lr"}}).step()
        close = 1e-5 if dtype is torch.float32 else 2e-2
        for parameter, (p, n) in zip(parameters, leaves, strict=True):
            torch.testing.assert_close(bank.tensors(name)[p][n].float(), parameter.detach(), rtol=close, atol=close)


def test_norms_that_are_not_given_are_taken_at_the_step() -> None:
    bank = Bank(bind(model(), lora(2)), slots=1)
    bank.add("a", lora(2))
    bank.forward_backward(lambda adapted, x: adapted(x).sum(-1), torch.randn(2, 5, dtype=torch.float64), ["a", "a"])
    bank.state.sums.fill_(2.0)
    bank.state.norms.fill_(float("nan"))
    assert bank.step(["a"])["a"].norm == pytest.approx(2 * bank.state.sums.shape[1] ** 0.5)
