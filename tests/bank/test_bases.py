"""A bank on other bases, and used in other ways, than most tests have: each adapter is still what it is alone."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from torchgraft.adapters import Bank, LoraConfig, adamw, sgd
from torchgraft.functional import bind

ALL = {"target_modules": ["0", "2"], "init_lora_weights": False}


def base(dtype: torch.dtype = torch.float32) -> nn.Module:
    made = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8)).to(dtype)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(int(parameter.numel())))
    return made


def bank_of(model: nn.Module, ranks: dict[str, int], **options: Any) -> Bank:
    bank = Bank(bind(model, LoraConfig(r=8, **ALL)), slots=4, optimizer=sgd(lr=0.1), **options)
    for seed, (name, r) in enumerate(ranks.items()):
        bank.add(name, LoraConfig(r=r, **ALL), generator=torch.Generator().manual_seed(seed))
    return bank


def alone(bank: Bank, name: str, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, dict[str, torch.Tensor]]]:
    """Return the output of rows of one adapter without a bank, and its parameters after a step of SGD."""
    params = {p: {n: t.requires_grad_() for n, t in leaves.items()} for p, leaves in bank.tensors(name).items()}
    y = bind(bank.graft.model, bank.config(name))(params, x)
    y.float().square().sum().backward()
    with torch.no_grad():
        return y.detach(), {p: {n: t - 0.1 * t.grad for n, t in own.items()} for p, own in params.items()}  # type: ignore[operator]


def compare(bank: Bank, given: list[str], x: torch.Tensor, call: Any = lambda adapted, x: adapted(x)) -> None:
    """Train one step of a batch, and compare each adapter with the same rows alone."""
    runs = {name: alone(bank, name, x[[one == name for one in given]]) for name in {*given}}
    with bank.rows(given) as adapted:
        y = call(adapted, x)
        y.float().square().sum().backward()
    bank.step([*runs])
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if x.dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    for name, (own, params) in runs.items():
        torch.testing.assert_close(y.detach()[[one == name for one in given]], own, **tolerance)
        torch.testing.assert_close(bank.tensors(name), params, **tolerance)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped product")
@pytest.mark.parametrize("ranks", [(8, 4), (4, 4)])
def test_gathered_rows_take_the_grouped_product_as_a_stack_does(
    ranks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, grouped = [], F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda *args, **kwargs: calls.append(args) or grouped(*args, **kwargs))
    bank = bank_of(base(), {"a": ranks[0], "b": ranks[1]})
    compare(bank, ["a", "b", "a", "a", "a", "a", "a"], torch.randn(7, 16))
    assert len(calls) == 4, "two for each of two layers"


@pytest.mark.parametrize("given", ["abab", "aaaaaab", "aabb"])
def test_half_precision_bases(given: str) -> None:
    compare(bank_of(base(torch.bfloat16), {"a": 8, "b": 2}), [*given], torch.randn(len(given), 16).bfloat16())


def test_gradients_pass_through_recomputed_layers() -> None:
    class Recomputed(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = checkpoint(super().forward, x, use_reentrant=False)
            return y

    compare(bank_of(Recomputed(*base()), {"a": 8, "b": 3}), [*"abba"], torch.randn(4, 16))


def test_a_whole_call_is_recomputed_once_its_rows_are_known() -> None:
    bank, x = bank_of(base(), {"a": 8, "b": 3}), torch.randn(4, 16)
    with bank.rows([*"abba"]) as adapted:
        adapted(x)  # the first call of a kind proves where rows are, which later ones do not do again
    compare(bank, [*"abba"], x, lambda f, x: checkpoint(f, x, use_reentrant=False))


def test_two_batches_may_be_open_at_once() -> None:
    one, two = (bank_of(base(), {"a": 8, "b": 3}) for _ in range(2))
    x, z = torch.randn(2, 16), torch.randn(3, 16)
    with one.rows(["a", "b"]) as first, one.rows(["b", "b", "a"]) as second:
        y, w = first(x), second(z)
        w.square().sum().backward()
        y.square().sum().backward()
    for given, inputs in ((["a", "b"], x), (["b", "b", "a"], z)):
        with two.rows(given) as adapted:
            adapted(inputs).square().sum().backward()
    for bank in (one, two):
        bank.step(["a", "b"])
    for name in "ab":
        torch.testing.assert_close(one.tensors(name), two.tensors(name))


def test_an_open_batch_keeps_the_parameters_that_it_began_with() -> None:
    bank, other = (bank_of(base(), {"a": 8}) for _ in range(2))
    x = torch.randn(2, 16)
    for one in (bank, other):
        with one.rows(["a", "a"]) as adapted:
            adapted(x).square().sum().backward()
    with bank.rows(["a", "a"]) as adapted:
        y = adapted(x)
        bank.step(["a"])  # writes to the slot in place
        y.square().sum().backward()
    with other.rows(["a", "a"]) as adapted:
        adapted(x).square().sum().backward()
        gradients = adapted.gradients()
    other.step(["a"])  # both gradients at once
    for path, leaves in bank._slots.layout.views(bank.state.sums[bank._roster.get("a", "").place]).items():
        for name, leaf in leaves.items():
            torch.testing.assert_close(leaf, gradients[path][name][0])


def test_an_optimizer_that_fails_drops_the_gradients_of_its_adapter_alone() -> None:
    bank = bank_of(base(), {"a": 8, "b": 8})

    class Failing:
        def __getattr__(self, name: str) -> Any:
            return getattr(bank._optimizer, name)

        family = "failing"

        def update(self, rows: Any, hypers: Any) -> None:
            raise OSError("no more memory")

    bank.add("c", LoraConfig(r=8, **ALL), optimizer=Failing())
    bank.add("d", LoraConfig(r=8, **ALL), optimizer=adamw())
    with bank.rows(["a", "c", "d", "b"], tokens=[2] * 4) as adapted:
        adapted(torch.randn(4, 16)).square().sum().backward()
    with pytest.raises(OSError, match="no more memory"):
        bank.step(["a", "c", "d", "b"])  # those of one optimizer at once
    assert [bank.steps(name) for name in "abcd"] == [1, 1, 0, 0]
    slots = [bank._roster.get(name, "").place for name in "abcd"]
    assert bank.state.steps[slots].tolist() == [1, 1, 0, 0]
    assert bank.state.tokens[slots].tolist() == [0, 0, 0, 2]
    with pytest.raises(RuntimeError, match="'c' has no gradients"):
        bank.step(["c"])
    assert bank.step(["d"])["d"].steps == 1


def test_an_adapter_added_in_inference_mode_trains() -> None:
    bank = Bank(bind(base(), LoraConfig(r=8, **ALL)), slots=4, optimizer=sgd(lr=0.1))
    with torch.inference_mode():
        bank.add("a", LoraConfig(r=8, **ALL))
    compare(bank, ["a", "a"], torch.randn(2, 16))
