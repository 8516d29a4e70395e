"""A bank in use: kinds of adapters, many of them, threads, and what joins adapters."""

import gc
import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from torchgraft.adapters import Bank, LoraConfig, sgd
from torchgraft.functional import bind

from .alone import Alone, distance, lora, model
from .subjects import trained


def test_adapters_of_several_ranks_are_cut_to_the_largest_that_is_there() -> None:
    bank = Bank(bind(model(), lora(32)), slots=3)
    for r in (1, 3, 32):
        bank.add(f"r{r}", lora(r))
    for given, r in ((["r1"], 1), (["r1", "r3", "r1"], 4), (["r1", "r32"], 32)):
        with bank.rows(given) as adapted:
            assert adapted._stack is not None
            assert adapted._stack.tree["0"]["lora_A"].shape == (len({*given}), r, 5)


@pytest.mark.slow
def test_compiled_calls_meet_other_mixes_adapters_and_batch_sizes_without_compiling_anew(tmp_path: Path) -> None:
    bank = Bank(bind(model(), lora(8)), slots=8)
    compiled = CompileCounter()
    f = torch.compile(lambda adapted, x: adapted(x), backend=compiled, fullgraph=True)
    draw = random.Random(0)
    for i in range(8):
        bank.add(str(i), lora(3 + i % 2))

    def compare(batch: int, several: int) -> None:
        present = draw.sample(bank.names, several)
        given = [*present, *draw.choices(present, k=batch - several)]
        x = torch.randn(batch, 5, dtype=torch.float64)
        torch._dynamo.maybe_mark_dynamic(x, 0)  # else the first other size compiles once more
        found = []
        for call in (lambda adapted: adapted(x), lambda adapted: f(adapted, x)):
            with bank.rows(given) as adapted:
                y = call(adapted)
                y.square().sum().backward()
                found.append((y.detach(), adapted.gradients()))
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)

    for i, (batch, several) in enumerate(((8, 4), (8, 4), (8, 3), (12, 8), (5, 2), (9, 5), (4, 4))):
        compare(batch, several)
        bank.remove(bank.names[0])  # and other adapters, of other ranks and sites
        bank.add(f"new {i}", lora(draw.randint(3, 4), draw.randint(0, 2)))
        bank.save(bank.names[0], tmp_path)
        bank.remove(bank.names[0])
        bank.load(tmp_path, f"loaded {i}")
        assert compiled.frame_count == 1, batch
    for name in bank.names:
        bank.remove(name)
    for i in range(4):
        bank.add(str(i), lora(1 + i % 2))
    for batch, several in ((6, 3), (3, 2)):
        compare(batch, several)
        assert compiled.frame_count == 2  # the largest rank is in another bucket


def test_tokens_of_packed_rows_have_adapters_of_their_own() -> None:
    base = model()
    bank = Bank(bind(base, lora(2)), slots=2, optimizer=sgd(lr=0.1))
    alone = {name: Alone(base, lora(2), (torch.optim.SGD, {"lr": 0.1}), seed) for seed, name in enumerate("ab")}
    for seed, name in enumerate("ab"):
        bank.add(name, lora(2), generator=torch.Generator().manual_seed(seed))
    given = [["a", "a", "b"], ["b", None, "a"]]
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    with bank.rows(given) as adapted:
        adapted(x).square().sum().backward()
    bank.step(["a", "b"])
    for name, own in alone.items():
        mine = torch.tensor([[one == name for one in row] for row in given])
        own.backward(x[mine], torch.ones(int(mine.sum()), dtype=torch.float64), 1)
        own.step({}, False)
        assert distance(bank, name, own) < 1e-12


def test_a_view_keeps_what_the_adapters_were() -> None:
    bank = Bank(bind(model(), lora(2)), slots=2)
    for name in "ab":
        bank.add(name, lora(2))
    x = torch.randn(3, 5, dtype=torch.float64)
    view = bank.view(["b", None, "a"])
    expected = torch.stack([bind(bank.graft.model, lora(2))(bank.tensors(n), x[i]) for i, n in ((0, "b"), (2, "a"))])
    bank.remove("a")
    bank.add("c", lora(1))
    torch.testing.assert_close(view(x)[[0, 2]], expected)


def test_what_joins_adapters_is_found() -> None:
    bank = Bank(bind(model(), lora(2)), slots=3)
    for name, r in (("poems", 1), ("code", 2), ("verse", 2)):
        bank.add(name, lora(r))
    x, given = torch.randn(4, 5, dtype=torch.float64), ["poems", "code", None, "poems"]
    before = {name: buffer.clone() for name, buffer in bank.state.buffers().items()}
    bank.check(given, lambda adapted: adapted(x).square().sum())
    bank.forward_backward(lambda adapted, x: adapted(x).sum(-1), x, given, check=True)
    bank.step(["poems"])
    with pytest.raises(ValueError, match="check: the gradients of 'code' change with the parameters of 'poems'"):
        bank.check(given, lambda adapted: torch.logsumexp(adapted(x).sum(-1), 0))
    with pytest.raises(ValueError, match="gradients of 'code' change"):
        bank.forward_backward(lambda adapted, x: adapted(x) / adapted(x).std(0), x, given, check=True)
    assert torch.equal(bank.state.parameters[1:], before["parameters"][1:])


def test_a_base_that_draws_is_an_error_unless_declared() -> None:
    base = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.Linear(7, 3))
    config = LoraConfig(r=2, target_modules=["0", "2"])
    bank = Bank(bind(base, config), slots=1)
    bank.add("a", config)
    with pytest.raises(RuntimeError, match="the model draws random numbers in training.*random_base=True"):
        bank.forward_backward(lambda adapted, x: adapted(x), torch.randn(2, 5), ["a", "a"])
    with pytest.raises(RuntimeError, match="has no gradients"):
        bank.step(["a"])
    base.eval()
    bank.forward_backward(lambda adapted, x: adapted(x), torch.randn(2, 5), ["a", "a"])
    declared = Bank(bind(base.train(), config), slots=1, random_base=True)
    declared.add("a", config)
    declared.forward_backward(lambda adapted, x: adapted(x), torch.randn(2, 5), ["a", "a"])


@pytest.mark.slow
def test_comings_and_goings_leave_nothing_behind() -> None:
    bank = Bank(bind(model(), lora(4)), slots=3)
    pointers = {name: buffer.data_ptr() for name, buffer in bank.state.buffers().items()}
    trees = {(r, t): bind(bank.graft.model, lora(r, t)).init() for r in range(1, 5) for t in range(3)}
    bank.add("always", lora(2))
    sizes, objects = [], []
    for i in range(10_000):
        r, t = 1 + i % 4, i % 3
        bank.add(f"{i}", lora(r, t), params=trees[r, t])
        if i % 1000 == 500:
            with bank.rows([f"{i}", "always"]) as adapted:
                adapted(torch.ones(2, 5, dtype=torch.float64)).sum().backward()
            bank.step([f"{i}"])
            sizes.append((len(bank._slots.kinds._known), len(bank._slots.free), len(bank.state.moments), len(bank)))
            gc.collect()
            objects.append(len(gc.get_objects()))
        bank.remove(f"{i}")
    assert len({*sizes}) == 1
    assert max(objects[1:]) - min(objects[1:]) < 100, "adapters that are gone leave objects behind"
    assert pointers == {name: buffer.data_ptr() for name, buffer in bank.state.buffers().items()}


@pytest.mark.slow
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_four_thousand_adapters_take_turns_in_sixty_four_slots(where: str, tmp_path: Path) -> None:
    count = 4096 if where == "memory" else 512
    bank = Bank(bind(model(), lora(4)), slots=64, resting=where if where == "memory" else tmp_path, optimizer=sgd(lr=1))
    params = bind(bank.graft.model, lora(2)).init()
    x = torch.randn(64, 5, dtype=torch.float64)
    for i in range(count):
        bank.add(str(i), lora(2), params=params)
    for start in range(0, count, 64):
        given = [str((start + i) * 31 % count) for i in range(64)]
        with bank.rows(given) as adapted:
            (adapted(x) * torch.arange(start, start + 64).view(-1, 1)).sum().backward()
        bank.step({name: {"lr": 1e-3} for name in given})
    assert {bank.steps(str(i)) for i in range(count)} == {1}
    graft = bind(bank.graft.model, lora(2))
    for position in (0, 1, count - 65, count - 1):
        own = trained(params)
        (graft(own, x[position % 64 : position % 64 + 1]) * position).sum().backward()
        for path, leaves in bank.tensors(str(position * 31 % count)).items():
            for name, value in leaves.items():
                leaf = own[path][name]
                assert leaf.grad is not None
                torch.testing.assert_close(value, (leaf - 1e-3 * leaf.grad).detach())


def test_threads_share_a_bank() -> None:
    base = model()
    bank = Bank(bind(base, lora(2)), slots=3, resting="memory", optimizer=sgd(lr=0.01))
    names, failed = [f"{i}{j}" for i in range(3) for j in range(2)], []
    alone = {name: Alone(base, lora(2), (torch.optim.SGD, {"lr": 0.01}), i) for i, name in enumerate(names)}
    for i, name in enumerate(names):
        bank.add(name, lora(2), generator=torch.Generator().manual_seed(i))
    x = torch.randn(8, 2, 5, dtype=torch.float64)

    def again(act: Any) -> None:
        while True:
            try:
                return act()
            except RuntimeError as error:  # three slots, and three others are in batches
                if "in use" not in str(error):
                    raise

    def train(name: str) -> None:
        def loss(adapted: Any, x: torch.Tensor) -> torch.Tensor:
            return adapted(x).square().sum(-1)

        try:
            for one in x:
                again(lambda one=one: bank.forward_backward(loss, one, [name] * 2))
                again(lambda: bank.step([name]))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=train, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not failed
    assert not any(thread.is_alive() for thread in threads)
    for name in names:
        for one in x:
            alone[name].backward(one, torch.ones(2, dtype=torch.float64), 1)
            alone[name].step({}, False)
        assert distance(bank, name, alone[name]) < 1e-10
