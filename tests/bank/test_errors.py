"""What a bank refuses, in which words, and that nothing has changed then."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from torchgraft.adapters import Bank, IA3Config, LoraConfig, adamw, muon, sgd
from torchgraft.functional import bind, stack

from .alone import lora, model

X = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def bank() -> Bank:
    made = Bank(bind(model(), lora(4)), slots=2)
    made.add("poems", lora(2), generator=torch.Generator().manual_seed(0))
    with made.rows(["poems"] * 3) as adapted:
        adapted(X).sum().backward()
    return made


def everything(bank: Bank) -> dict[str, torch.Tensor]:
    numbers = {name: buffer.clone() for name, buffer in bank.state.buffers().items()}
    return numbers | {name: rows.clone() for name, rows in bank.state.constants.items()}


def enter(bank: Bank, *arguments: Any, **named: Any) -> None:
    bank.rows(*arguments, **named).__enter__()


def wrong_batch(bank: Bank) -> None:
    with bank.rows(["poems"] * 2) as adapted:
        adapted(X).sum().backward()


def late_backward(bank: Bank) -> None:
    with bank.rows(["poems"] * 3) as adapted:
        loss = adapted(X).sum()
    loss.backward()


def late_call(bank: Bank) -> None:
    with bank.rows(["poems"] * 3) as adapted:
        pass
    adapted(X)


def failing_block(bank: Bank) -> None:
    with bank.rows(["poems"] * 3) as adapted:
        adapted(X).sum().backward()
        raise ZeroDivisionError


def removed_within(bank: Bank) -> None:
    with bank.rows(["poems"] * 3):
        bank.remove("poems")


def step_within(bank: Bank) -> None:
    bank.step(["poems"])
    with bank.rows(["poems"] * 3) as adapted:
        adapted(X).sum().backward()
        bank.step(["poems"])


def full(bank: Bank) -> None:
    bank.add("code", lora(1))
    before = everything(bank)
    try:
        bank.add("verse", lora(1))
    finally:
        assert bank.names == ["poems", "code"]
        assert all(torch.equal(value, before[name]) for name, value in everything(bank).items())
        bank.remove("code")


CASES: list[tuple[Callable[[Bank], Any], type[Exception], str]] = [
    (lambda b: b.add("poems", lora(1)), ValueError, "add: the name 'poems' is taken; remove that adapter first"),
    (lambda b: b.add("", lora(1)), TypeError, "add: name is '', expected a string"),
    (
        lambda b: b.add("code", lora(8)),
        ValueError,
        r"add: the config of 'code' does not fit the bank: it has lora_A of shape \(8, 5\) at '0', and a slot has room "
        r"for \(4, 5\); make it smaller, or the bank with a config that is as large \(r is 8, there 4, ",
    ),
    (
        lambda b: b.add("code", IA3Config(target_modules=["0"])),
        TypeError,
        "'code' does not fit the bank: it is of type IA3Config, and this bank has adapters of LoraConfig; make another",
    ),
    (
        lambda b: b.add("code", lora(2, dropout=0.5)),
        ValueError,
        "'code' .*: lora_dropout is 0.5, and all adapters of this bank share 0.0.*; set lora_dropout=0.0, or make",
    ),
    (
        lambda b: b.add("code", {"r": 2}),
        TypeError,
        "'code' does not fit the bank: it is of type dict, expected a LoraConfig",
    ),
    (lambda b: b.add("code", lora(2), params={}), KeyError, "lacks site '0'"),
    (lambda b: b.add("code", lora(2), params=bind(b.graft.model, lora(1)).init()), ValueError, "expected \\(2, 5\\)"),
    (full, RuntimeError, "add: all 2 slots are taken; remove an adapter first.*resting="),
    (lambda b: b.remove("poem"), KeyError, "remove: no adapter has the name 'poem'; did you mean 'poems'"),
    (removed_within, RuntimeError, "remove: rows of 'poems' are in a batch that is not over"),
    (lambda b: enter(b, ["poems", "code"]), KeyError, "rows: no adapter has the name 'code'"),
    (lambda b: enter(b, "poems"), TypeError, "rows: names is 'poems', expected a list with a name for each row"),
    (lambda b: enter(b, []), TypeError, "rows: names is \\[\\]"),
    (
        lambda b: enter(b, [["poems", None], ["poems"]]),
        ValueError,
        "rows: packed rows differ in their number of tokens",
    ),
    (
        lambda b: enter(b, ["poems"], tokens=[3]),
        ValueError,
        "tokens are given, and were not given for the grad.* 'poems' has",
    ),
    (wrong_batch, ValueError, "rows"),
    (late_backward, RuntimeError, "backward: the block of bank.rows is over"),
    (late_call, RuntimeError, "the block of bank.rows is over; call what it gave within"),
    (lambda b: b.step("poems"), TypeError, "step: hyper is 'poems', expected a dict by name, or a list"),
    (
        lambda b: b.step({"poems": 1e-3}),
        TypeError,
        "the hyper-parameters of 'poems' are of type float, expected a dict",
    ),
    (lambda b: b.step({"poems": {"rate": 1}}), TypeError, "adamw has no hyper-parameter 'rate'.*betas, eps, lr"),
    (lambda b: b.step({"poems": {"lr": -1}}), ValueError, "lr is -1, expected a finite number, 0 or more"),
    (lambda b: b.step({"poems": {"lr": float("nan")}}), ValueError, "lr is nan, expected a finite number"),
    (lambda b: b.step({"poems": {"eps": 0}}), ValueError, "eps is 0, expected a number above 0, for padding"),
    (lambda b: b.step({"poems": {"betas": (0.9, 1)}}), ValueError, "expected two numbers from 0 to below 1"),
    (lambda b: b.step({"poems": {"max_norm": 0}}), ValueError, "max_norm is 0, expected a number above 0, or None"),
    (lambda b: b.step(["code"]), KeyError, "step: no adapter has the name 'code'"),
    (lambda b: b.save("code", "x"), KeyError, "save: no adapter has the name 'code'"),
    (lambda b: b.load("nowhere", "poems"), ValueError, "load: the name 'poems' is taken"),
    (lambda b: b.load("nowhere", "code"), FileNotFoundError, "nowhere: no such directory"),
]


@pytest.mark.parametrize(("act", "error", "words"), CASES, ids=[words[:40] for _, _, words in CASES])
def test_what_is_wrong_is_refused_before_anything_changes(
    bank: Bank, act: Callable[[Bank], Any], error: type[Exception], words: str
) -> None:
    before = everything(bank)
    with pytest.raises(error, match=words):
        act(bank)
    assert bank.names == ["poems"]
    assert all(torch.equal(value, before[name]) for name, value in everything(bank).items())
    assert not bank.step(["poems"])["poems"].skipped


def test_sites_that_slots_have_not_are_refused_in_words_of_the_config() -> None:
    bank = Bank(bind(model(), lora(4, 1)), slots=2)
    words = (
        r"'code' .*: it has lora_A of shape \(4, 7\) at '2', where the slots of this bank have none; leave that out "
        r"of its config.*\(target_modules is \['0', '2'\], there \['0'\]\)"
    )
    with pytest.raises(ValueError, match=words):
        bank.add("code", lora(4))


def test_a_step_needs_gradients_that_are_counted(bank: Bank) -> None:
    with pytest.raises(RuntimeError, match="'poems' has no gradients since its last step; call backward in a block"):
        step_within(bank)
    assert bank.steps("poems") == 1


def test_one_wrong_name_steps_nobody(bank: Bank) -> None:
    bank.add("code", lora(2))
    before = everything(bank)
    with pytest.raises(RuntimeError, match="'code' has no gradients"):
        bank.step(["poems", "code"])
    assert all(torch.equal(value, before[name]) for name, value in everything(bank).items())


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda g: Bank(g.model), TypeError, "Bank: graft is of type Sequential, expected what bind"),
        (lambda g: Bank(bind(g.model, {"a": lora(1)})), TypeError, "adapters by name, \\['a'\\], which add up"),
        (lambda g: Bank(g, slots=0), ValueError, "Bank: slots is 0, expected how many"),
        (lambda g: Bank(g, optimizer=adamw(lr=-1)), ValueError, "adamw: lr is -1"),
        (lambda g: Bank(g, dtype=torch.complex64), ValueError, "complex64.*one real dtype"),
        (lambda g: Bank(bind(g.model, LoraConfig(target_modules=["0"], bias="lora_only")), optimizer=muon()),
         ValueError, "muon: bias of '0' has shape.*Muon is for matrices"),
    ],
)  # fmt: skip
def test_what_is_no_bank_is_refused(make: Callable[[Any], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make(bind(model(), lora(4)))


def test_an_exception_in_the_block_adds_nothing(bank: Bank) -> None:
    before = everything(bank)
    with pytest.raises(ZeroDivisionError):
        failing_block(bank)
    assert all(torch.equal(value, before[name]) for name, value in everything(bank).items())
    bank.remove("poems")


def test_the_state_of_another_optimizer_is_refused(bank: Bank, tmp_path: Any) -> None:
    bank.save("poems", tmp_path)
    with pytest.raises(ValueError, match="trained by 'adamw', and optimizer is 'sgd'; leave optimizer out"):
        bank.load(tmp_path, "code", optimizer=sgd())
    assert bank.names == ["poems"]
    (state,) = tmp_path.glob("bank_state.*")
    state.write_bytes(state.read_bytes()[:-9])
    with pytest.raises(ValueError, match="bank_state.*: is damaged"):
        bank.load(tmp_path, "code")


def test_pefts_files_alone_begin_at_step_zero(bank: Bank, tmp_path: Any) -> None:
    bank.step(["poems"])
    bank.save("poems", tmp_path)
    next(tmp_path.glob("bank_state.*")).unlink()
    bank.load(tmp_path, "code")
    assert (bank.steps("poems"), bank.steps("code")) == (1, 0)
    assert torch.equal(bank.tensors("code")["0"]["lora_A"], bank.tensors("poems")["0"]["lora_A"])


def test_a_stack_of_one_config_is_no_bank_of_trees() -> None:
    graft = bind(nn.Linear(4, 3), LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(TypeError, match="Bank: graft is"):
        Bank(stack([graft.init()]))  # type: ignore[arg-type]
