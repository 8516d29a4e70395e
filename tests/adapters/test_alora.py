"""aLoRA: rows found from ids give PEFT's outputs, and what is before the invocation is the base's bit for bit."""

import copy
import re

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from torchgraft.adapters import LoraConfig, activated_positions
from torchgraft.functional import bind, route, stack

IDS = torch.tensor([[3, 9, 7, 8, 5, 4], [7, 8, 2, 7, 8, 1], [1, 2, 3, 8, 7, 4]])
FIELDS = {"r": 2, "init_lora_weights": False, "target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=11, **sizes)).eval()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated:FutureWarning")
def test_outputs_are_pefts(llama):
    theirs = peft.get_peft_model(
        copy.deepcopy(llama), peft.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[7, 8], **FIELDS)
    ).eval()
    graft = bind(llama, LoraConfig(**FIELDS))
    state = {key.removeprefix("base_model.model."): t for key, t in peft.get_peft_model_state_dict(theirs).items()}
    params = {path: {leaf: state[f"{path}.{leaf}.weight"] for leaf in ("lora_A", "lora_B")} for path in graft.sites[""]}
    rows = activated_positions(IDS, [7, 8])
    assert rows.tolist() == [[-1, -1, 0, 0, 0, 0], [-1, -1, -1, 0, 0, 0], [-1] * 6]
    y, base = graft(route(stack([params]), rows), IDS).logits, llama(IDS).logits
    torch.testing.assert_close(y, theirs(input_ids=IDS).logits)
    torch.testing.assert_close(y[rows < 0], base[rows < 0])
    assert not torch.allclose(y[rows == 0], base[rows == 0], atol=1e-3)
    found = peft.tuners.lora.variants.calculate_alora_offsets(theirs.peft_config, "default", IDS)
    assert found == [int(active) or None for active in (rows == 0).sum(1)]


def test_prompts_that_are_too_short_have_no_invocation():
    assert activated_positions(torch.tensor([[7], [8]]), [7, 8]).tolist() == [[-1], [-1]]
    assert activated_positions(torch.tensor([[8], [7]]), [7]).tolist() == [[-1], [0]]


def test_it_is_a_pure_function_under_vmap():
    given = torch.vmap(lambda ids: activated_positions(ids[None], [7, 8])[0])(IDS)
    assert torch.equal(given, activated_positions(IDS, [7, 8]))


def test_what_cannot_be_looked_for_is_an_error_that_says_so():
    words = "activated_positions: input_ids has the shape (6,), expected (batch, tokens)"
    with pytest.raises(ValueError, match=re.escape(words)):
        activated_positions(IDS[0], [7])
    with pytest.raises(ValueError, match="invocation_tokens is empty, expected the ids of the invocation"):
        activated_positions(IDS, [])


def test_a_config_that_speaks_of_an_invocation_says_what_to_do():
    words = r"alora_invocation_tokens is \[7, 8\], which is not supported .*; and route calls .* activated_positions\("
    with pytest.raises(ValueError, match=words):
        LoraConfig(alora_invocation_tokens=[7, 8])
