"""Population-based training, in a short run: copies go on as what they are copies of, twins are equal until then."""

import pytest
import torch

from torchgraft.adapters import Bank
from torchgraft.functional import bind


@pytest.fixture(scope="module")
def population(load_example):
    return load_example("population")


def test_populations_are_trained_and_drawn(population, folder, capsys):
    result = population.main(["--quick", "--out", str(folder)])
    ways = result["ways"]
    assert list(ways) == ["copied", "each by itself"] and len(result["copies"]) == 2 * 2
    for copied, alone in zip(*ways.values(), strict=True):
        assert [one.losses[0] for one in copied] == pytest.approx([one.losses[0] for one in alone], rel=1e-4)
        assert [one.rates[0] for one in copied] == [one.rates[0] for one in alone]
        assert all(len(set(one.rates)) == 1 for one in alone) and any(len(set(one.rates)) > 1 for one in copied)
    assert all(result["bank"].steps(name) == 9 for name in result["bank"].names)
    assert result["picture"].read_bytes().startswith(b"\x89PNG")
    assert "copies        4," in capsys.readouterr().out


def test_a_copy_goes_on_as_the_other_with_its_moments(population, load_example):
    torch.manual_seed(0)
    model = load_example("digits").VisionTransformer(dim=8, heads=2, depth=1).requires_grad_(False)
    bank = Bank(bind(model, population.CONFIG), slots=2)
    members = [population.Member(name, i, {"lr": 1e-2}) for i, name in enumerate("ab")]
    for i, member in enumerate(members):
        bank.add(member.name, population.CONFIG, generator=torch.Generator().manual_seed(i))
    images, labels = torch.rand(20, 32, 32), torch.randint(10, (20,))
    population.train(bank, members, images, labels, range(3))
    members[0].losses, members[1].losses = [1.0], [2.0]
    copies = population.evolve(bank, members, 0.5, torch.Generator().manual_seed(0))
    assert copies == [("a", "b")] and bank.steps("b") == 3
    assert members[1].hyper["lr"] in (5e-3, 2e-2) and members[0].hyper == {"lr": 1e-2}
    members[1].hyper, members[1].twin = members[0].hyper, members[0].twin
    population.train(bank, members, images, labels, range(3, 5))
    one, other = bank.tensors("a"), bank.tensors("b")
    for path, leaves in one.items():
        for name, leaf in leaves.items():
            torch.testing.assert_close(other[path][name], leaf, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrong", [["--size", "1"], ["--share", "0.7"], ["--rounds", "0"]])
def test_numbers_that_make_no_population_are_refused(population, wrong, capsys):
    with pytest.raises(SystemExit):
        population.parse(wrong)
    assert "at least 1, --size 2, and --share is from 0 to 0.5" in capsys.readouterr().err


def test_the_lines_of_its_page_run(run_page):
    there = run_page("population")
    assert there["bank"].steps("b") == there["bank"].steps("a") == 5
    assert there["bank"].tensors("b")["0"]["lora_A"].equal(there["bank"].tensors("a")["0"]["lora_A"])
