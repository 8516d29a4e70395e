"""Any method as a LoRA: exact, by merging in float64, where its change has the rank; the nearest, elsewhere."""

import pytest
import torch

from tests.contract.cases import KINDS, case
from tests.contract.methods import METHODS
from torchgraft.adapters import to_lora
from torchgraft.functional import UnsupportedConfig, bind, merge

pairs = [(name, site) for name in METHODS for site in KINDS[name]]
OTHER_BIASES = [("lora with bias", "attention (kdim, vdim)"), ("ia3", "linear (registered)")]


def merged_or_skip(graft, params):
    try:
        return merge(graft, params)
    except (ValueError, TypeError) as error:
        pytest.skip(f"has no merged weight: {error}")


@pytest.mark.parametrize(("name", "site"), pairs)
def test_each_method_on_each_kind_of_layer_is_the_same_lora(name, site):
    one = case(name, site)
    params = one.params
    expected = merged_or_skip(one.graft, {**params})
    if (name, site) in OTHER_BIASES:
        with pytest.raises(UnsupportedConfig, match="gets another bias from its adapters, .* names it otherwise"):
            to_lora(one.graft, params, biases="train")
        return
    config, lora, report = to_lora(one.graft, params, biases="train")
    actual = merge(bind(one.model, config), lora)
    assert actual.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(actual[key], expected[key].to(actual[key].dtype), rtol=1e-5, atol=1e-6, msg=key)
    assert report.relative < 1e-6
