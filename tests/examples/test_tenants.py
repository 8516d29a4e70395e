"""The tenants, in a tiny run: each ends as it would alone, in any mix, and whenever the house is interrupted."""

import contextlib
import importlib.util
import io
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from torchgraft.adapters import load_adapter
from torchgraft.functional import bind

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def example():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        spec = importlib.util.spec_from_file_location("tenants", EXAMPLES / "tenants.py")
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "tenants", module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def whole(example, tmp_path_factory):
    """A run that nothing interrupted: its folder, its result, what it printed."""
    out, printed = tmp_path_factory.mktemp("whole"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        result = example.main(["--quick", "--out", str(out)])
    return out, result, printed.getvalue()


def weights(folder, tenants):
    return {tenant.name: load_file(folder / tenant.name / "adapter_model.safetensors") for tenant in tenants}


def test_each_tenant_is_what_it_would_be_alone(example, whole):
    out, result, printed = whole
    house, tenants = result["house"], result["tenants"]
    assert len({tenant.rank for tenant in tenants}) == 5 and len({tenant.steps for tenant in tenants}) == 6
    assert result["difference"] < 1e-4 and f"differs by at most {result['difference']:.1e}" in printed
    for tenant in tenants:
        assert len(house.losses[tenant.name]) == len(result["alone"][tenant.name]) == tenant.steps
    alone = example.Alone(result["model"], tenants[-1])
    losses = [alone.train(step) for step in range(tenants[-1].steps)]
    assert losses == pytest.approx(result["alone"][tenants[-1].name], abs=1e-5)
    loaded = load_adapter(bind(result["model"], tenants[-1].config()), out / tenants[-1].name)
    for path, leaves in loaded.items():
        for name, leaf in leaves.items():
            torch.testing.assert_close(leaf, alone.params[path][name].detach(), rtol=1e-4, atol=1e-5)


def test_they_share_batches_and_wait_for_slots(whole):
    _, result, printed = whole
    house, tenants = result["house"], result["tenants"]
    assert max(map(len, house.log)) > 1 and len({tuple(names) for names in house.log}) > 3
    for names in house.log:
        assert len(set(names)) == len(names)
    for batch in range(len(house.log)):
        inside = [name for name, (start, end) in house.spans.items() if start <= batch < end]
        assert len(inside) <= 3
        assert set(house.log[batch]) <= set(inside)
    assert len(house.bank) == 0 and house.bits.keys() == {tenant.name for tenant in tenants}
    assert any(house.spans[tenant.name][0] > tenant.arrives for tenant in tenants)
    assert "in 3 slots" in printed and result["picture"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("stop", [2, 9, 17])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(example, whole, tmp_path, monkeypatch, stop):
    folder, result, _ = whole
    run, calls = example.Scheduler.run, itertools.count(1)

    def interrupted(*args):
        if next(calls) > stop:
            raise KeyboardInterrupt
        return run(*args)

    with monkeypatch.context() as patch:
        patch.setattr(example.Scheduler, "run", interrupted)
        with pytest.raises(SystemExit, match="Interrupted. The same command goes on"):
            example.main(["--quick", "--out", str(tmp_path / "parts")])
    assert (tmp_path / "parts" / "house.json").exists() == (stop >= 3)
    parts = example.main(["--quick", "--out", str(tmp_path / "parts")])
    for name, losses in result["house"].losses.items():
        assert parts["house"].losses[name] == pytest.approx(losses, abs=1e-3)
    one, other = weights(folder, result["tenants"]), weights(tmp_path / "parts", result["tenants"])
    torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-3)
    assert not list(tmp_path.rglob("*.new"))


def test_who_was_stepped_and_not_written_down_steps_again(example, whole, tmp_path):
    """A process may die between the losses and an adapter's files; the files say how far it is."""
    _, result, _ = whole
    tenant = result["tenants"][0]
    house = example.House(result["model"], [tenant], 1, 4, tmp_path)
    house.enter(tenant)
    house.bank.save(tenant.name, tmp_path / tenant.name)
    (tmp_path / "house.json").write_text(
        json.dumps({"losses": {tenant.name: [1.0, 2.0]}, "bits": {}, "log": [[tenant.name]] * 2, "spans": {}})
    )
    again = example.House(result["model"], [tenant], 1, 4, tmp_path)
    again.run(save_every=100)
    assert again.losses[tenant.name] == pytest.approx(result["alone"][tenant.name], abs=1e-4)


def test_an_error_of_a_tenant_is_raised_and_others_end_as_alone(example, whole, tmp_path):
    _, result, _ = whole
    first, second = result["tenants"][:2]
    (tmp_path / first.name).mkdir()
    (tmp_path / first.name / "adapter_config.json").write_text("{}")
    house = example.House(result["model"], [first, second], 2, 4, tmp_path)
    with pytest.raises((KeyError, ValueError, FileNotFoundError)):
        house.run(save_every=100)
    assert house.losses[second.name] == pytest.approx(result["alone"][second.name], abs=1e-4)


def test_a_run_of_other_settings_is_refused(example, whole):
    with pytest.raises(SystemExit, match="has tenants with other settings: .*dim was 32 and is 128"):
        example.main(["--out", str(whole[0])])


def test_numbers_that_make_no_run_are_refused(example, capsys):
    for wrong, words in [(["--tenants", "25"], "expected 1 to 24"), (["--slots", "0"], "at least 1")]:
        with pytest.raises(SystemExit):
            example.main(wrong)
        assert words in capsys.readouterr().err


def test_tenants_differ(example):
    tenants = example.tenants_of(24, 120, 12)
    assert len({tenant.name for tenant in tenants}) == 24
    assert {tenant.rank for tenant in tenants} == set(example.RANKS)
    assert len({tenant.steps for tenant in tenants}) == 24 and all(60 <= tenant.steps < 180 for tenant in tenants)
    for tenant in tenants:
        learnt, held_out = tenant.texts
        assert len(learnt) > 5 * len(held_out) > 0
        assert torch.equal(tenant.draw(3), tenant.draw(3)) and not torch.equal(tenant.draw(3), tenant.draw(4))
