"""Federated averaging of adapters, in a short run: averages are exact where `lora_A` is shared, and each digit has one
owner.
"""

import pytest
import torch


@pytest.fixture(scope="module")
def federated(load_example):
    return load_example("federated")


def test_clients_are_averaged_and_drawn(federated, folder, capsys):
    result = federated.main(["--quick", "--out", str(folder)])
    assert list(result["curves"]) == list(federated.COLORS)
    assert all(len(curve) == 2 for curve in result["curves"].values())
    assert max(result["gaps"]["lora_B averaged, lora_A shared"]) < 1e-5 < min(result["gaps"]["factors averaged"])
    assert result["gaps"]["never averaged"] == result["gaps"]["all digits in one place"] == []
    assert result["picture"].read_bytes().startswith(b"\x89PNG")
    assert "averages are off by" in capsys.readouterr().out


def test_each_digit_has_one_owner_and_classes_are_uneven(federated):
    labels = torch.arange(10).repeat(100)
    owned = federated.skewed(labels, 8, 0.3)
    assert torch.equal(torch.cat(owned).sort().values, torch.arange(1000)) and all(len(own) for own in owned)
    uneven, even = (
        torch.stack([labels[own].bincount(minlength=10).float() for own in federated.skewed(labels, 8, skew)])
        .std(0)
        .mean()
        for skew in (0.3, 100.0)
    )
    assert uneven > 2 * even


def test_the_average_is_weighted_and_its_products_are_not_the_average_of_products(federated):
    source = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 2, 5, generator=source), torch.randn(3, 4, 2, generator=source)
    many, weights = {"0": {"lora_A": a, "lora_B": b}}, torch.tensor([0.5, 0.3, 0.2])
    mean = federated.averaged(many, weights)["0"]
    torch.testing.assert_close(mean["lora_A"], (0.5 * a[0] + 0.3 * a[1] + 0.2 * a[2]).expand(3, -1, -1))
    exact = sum(w * b[i] @ a[i] for i, w in enumerate(weights.tolist()))
    expected = (mean["lora_B"][0] @ mean["lora_A"][0] - exact).norm() / exact.norm()
    assert federated.gap(many, weights) == pytest.approx(float(expected), rel=1e-5)
    same = {"0": {"lora_A": a[:1].expand(3, -1, -1), "lora_B": b}}
    assert federated.gap(same, weights) < 1e-6


def test_the_lines_of_its_page_run(run_page):
    there = run_page("federated")
    assert there["params"]["0"]["lora_B"].shape == (32, 2) and there["params"]["0"]["lora_B"].abs().max() > 0
