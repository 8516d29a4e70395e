"""The serving example, in a short run: rows answer as alone, an adapter comes and goes, and nobody else notices."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from torchgraft.adapters import load_adapter
from torchgraft.functional import unstack

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def serve():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        spec = importlib.util.spec_from_file_location("serve", EXAMPLES / "serve.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "serve", module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def run(serve, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *words: printed.append(" ".join(words)))
        result = serve.main(["--quick", "--out", str(tmp_path_factory.mktemp("serve") / "out")])
    return result, "\n".join(printed)


def test_every_row_says_what_it_says_alone(serve, run):
    result, printed = run
    graft, served = result["server"].graft, result["served"]
    assert result["rows_equal_alone"] and "the same answers" in printed
    assert {request.adapter for request in served} == {None, *serve.REGISTERS}
    for request in served:  # all at once, with neither the keys and values of earlier steps nor route
        ids, start = torch.tensor([request.ids]), len(request.prompt)
        adapter = load_adapter(graft, result["folders"][request.adapter]) if request.adapter else None
        logits = graft(adapter, ids) if adapter else graft.model(ids)
        chosen = (logits[0, start - 1 : -1] + request.noise[: request.length]).argmax(-1)
        assert torch.equal(chosen, ids[0, start:]), (request.adapter, request.prompt)
        assert len(request.answer) == request.length


def test_adapters_differ(run):
    result, _ = run
    prompt = result["served"][0].prompt
    starts = {request.answer[:16] for request in result["served"] if request.prompt == prompt}
    assert len(starts) >= 8


def test_the_guest_was_served_among_others_and_left(serve, run):
    result, printed = run
    server, guest = result["server"], len(serve.REGISTERS) - 1
    assert result["others_kept"] and result["base_unchanged"]
    assert "kept every bit" in printed and "unchanged, bit for bit" in printed
    mixed = [set(step) for step in server.history if guest in step]
    assert mixed and max(len(step) for step in mixed) > 3
    assert guest not in server.history[0] and guest not in server.history[-1]
    assert server.names == list(serve.REGISTERS)[:-1]


def test_adding_and_removing_leave_the_other_adapters_alone(serve, run):
    result, _ = run
    graft, folders = result["server"].graft, result["folders"]
    trees = {name: load_adapter(graft, folder) for name, folder in folders.items()}
    first, second, third = list(trees)[:3]
    server = serve.Server(graft, {first: trees[first], second: trees[second]}, slots=3)
    requests = [serve.Request("The value ", name, 6, seed) for seed, name in enumerate([first, None, second])]
    server.queue.extend(requests)
    server.step()
    before = server.peek()
    server.add(third, trees[third])
    assert torch.equal(server.peek(), before)
    with pytest.raises(ValueError, match=f"{first} still has requests"):
        server.remove(first)
    server.queue.append(late := serve.Request("The value ", third, 6))
    server.serve([*requests, late])
    server.remove(first)
    assert server.names == [second, third]
    for name, tree in zip(server.names, unstack(server.many), strict=True):
        for path, leaves in trees[name].items():
            assert all(torch.equal(tree[path][leaf], value) for leaf, value in leaves.items())
    assert serve.find_differing(graft, trees, [*requests, late]) == []


def test_picture_and_table(serve, run):
    result, printed = run
    assert result["picture"].read_bytes().startswith(b"\x89PNG")
    for name in serve.REGISTERS:
        assert printed.count(f"\n{name:<12}") == 2
    for way, speed in result["speed"].items():
        assert speed > 0 and f"{way:<22}{speed:>8,.0f} tokens/s" in printed


def test_registers_are_kept_by_what_is_written_in_them(serve):
    prose = serve.lm.read_prose()
    assert len(prose) > 300
    for name, register in serve.REGISTERS.items():
        changed = sum(register(paragraph) != paragraph for paragraph in prose)
        assert changed > 0.95 * len(prose), name
        assert all(register(register(paragraph)) == register(paragraph) for paragraph in prose), name
