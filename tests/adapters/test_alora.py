"""aLoRA: rows found from ids give PEFT's outputs, and what is before the invocation is the base's bit for bit."""

import copy
import re

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from torchgraft import adapters
from torchgraft.adapters import (
    LoraConfig,
    activated_positions,
    adapter_rows,
    combine,
    inject_adapter_in_model,
    load_adapter,
    load_config,
    save_adapter,
)
from torchgraft.functional import UnsupportedCall, UnsupportedConfig, bind, merge, route, stack

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.* is deprecated:FutureWarning")
IDS = torch.tensor([[3, 9, 7, 8, 5, 4], [7, 8, 2, 7, 8, 1], [1, 2, 3, 8, 7, 4]])
FIELDS = {"r": 2, "init_lora_weights": False, "target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=11, **sizes)).eval()


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


def test_calls_that_do_not_say_the_positions_and_merging_are_errors_that_say_what_to_do(llama):
    graft = bind(llama, LoraConfig(alora_invocation_tokens=[7, 8], **FIELDS))
    params = graft.init()
    words = r"q_proj: the adapter has alora_invocation_tokens=\[7, 8\], and the call does not say .* positions"
    for call in (
        lambda: graft(params, IDS),
        lambda: graft(route(stack([params]), torch.zeros(3, dtype=torch.long), batch_dim=0), IDS),
        lambda: inject_adapter_in_model(graft.configs[""], copy.deepcopy(llama))(IDS),
    ):
        with pytest.raises(UnsupportedCall, match=words):
            call()
    with pytest.raises(UnsupportedConfig, match="q_proj: an activated LoRA .* no weight does, so there is nothing to"):
        merge(graft, params)
    with pytest.raises(UnsupportedConfig, match="has alora_invocation_tokens, and adapts a prompt only from"):
        combine([(graft.configs[""], params)] * 2, [0.5, 0.5])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"alora_invocation_tokens": []}, r"alora_invocation_tokens is \[\], expected the ids of the invocation"),
        ({"use_dora": True}, r"alora_invocation_tokens is \[7\] and use_dora is True; set one of them"),
        ({"init_lora_weights": "pissa"}, r"alora_invocation_tokens is \[7\] and init_lora_weights 'pissa', expected"),
    ],
)
def test_what_an_activated_lora_cannot_have_is_an_error(fields, words):
    with pytest.raises(ValueError, match=words):
        LoraConfig(**{"alora_invocation_tokens": [7], **fields})


def test_folders_go_both_ways_and_outputs_are_pefts(llama, tmp_path):
    config = peft.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[7, 8], **FIELDS)
    theirs = peft.get_peft_model(copy.deepcopy(llama), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    expected = theirs(input_ids=IDS).logits
    config = load_config(tmp_path / "theirs")
    assert config.alora_invocation_tokens == [7, 8]
    graft = bind(llama, config)
    params = load_adapter(graft, tmp_path / "theirs")
    rows = activated_positions(IDS, config.alora_invocation_tokens)
    torch.testing.assert_close(graft(route(stack([params]), rows), IDS).logits, expected)
    save_adapter(graft, tmp_path / "mine", params=params)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path / "mine").eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, expected)
    model = load_adapter(copy.deepcopy(llama), tmp_path / "theirs").eval()
    torch.testing.assert_close(adapter_rows(model, ["default"] * 3, positions=rows)(IDS).logits, expected)


@pytest.fixture(params=[1, 4], ids=["small", "large"])
def pair(llama, request):
    """PEFT's model and one of the shim's, each with two activated adapters and one other, of the same numbers."""
    models = []
    for lib in (peft, adapters):
        torch.manual_seed(3)
        alora = {"task_type": "CAUSAL_LM", "alora_invocation_tokens": [7, 8]}
        one = lib.get_peft_model(copy.deepcopy(llama), lib.LoraConfig(**alora, **FIELDS))
        one.add_adapter("plain", lib.LoraConfig(task_type="CAUSAL_LM", **FIELDS))
        one.add_adapter("other", lib.LoraConfig(**alora | {"alora_invocation_tokens": [8]}, **FIELDS))
        for name, parameter in one.named_parameters():
            parameter.data.mul_(request.param if "lora_" in name else 1)
        models.append(one.eval())
    return models


@pytest.mark.parametrize("names", [None, ["other", "plain", "default"], ["default", "__base__", "other"]])
def test_what_is_generated_is_pefts_token_by_token(pair, names):
    said = {"return_dict_in_generate": True, "output_logits": True, "attention_mask": torch.ones_like(IDS)}
    fields = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "adapter_names": names, **said}
    theirs, mine = (one.generate(input_ids=IDS, **fields) for one in pair)
    assert torch.equal(mine.sequences, theirs.sequences)
    torch.testing.assert_close(mine.logits, theirs.logits)
    again = pair[1].generate(input_ids=IDS, use_cache=False, **fields)
    torch.testing.assert_close(again.logits, mine.logits)  # PEFT has the base for what was new in other steps
    padded = torch.nn.functional.pad(IDS, (2, 0))
    masked = fields | {"attention_mask": (padded > 0).long()}
    torch.testing.assert_close(pair[1].generate(input_ids=padded, **masked).logits, mine.logits)


def test_beams_have_the_adapter_of_their_prompt_and_hooks_of_the_model_run_once_a_step(pair):
    model, seen = pair[1].get_base_model(), []
    model.register_forward_pre_hook(lambda *_: seen.append(1))
    fields = {
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "num_beams": 2,
        "num_return_sequences": 2,
        "pad_token_id": 0,
        "do_sample": False,
    }
    found = pair[1].generate(input_ids=IDS, **fields, output_scores=True, return_dict_in_generate=True)
    steps = len(seen)
    uncached = pair[1].generate(input_ids=IDS, **fields, use_cache=False)
    assert torch.equal(found.sequences, uncached) and len(found.sequences) == 6 and steps >= 4
    scores = []
    for row, sequence in enumerate(found.sequences):
        positions = activated_positions(IDS[row // 2][None], [7, 8])
        positions = torch.cat([positions, positions[:, -1:].expand(-1, 4)], 1)
        logits = adapter_rows(model, ["default"], positions=positions)(sequence[None]).logits.log_softmax(-1)
        scores.append(logits[0, 5:-1].gather(1, sequence[6:, None]).mean())
    torch.testing.assert_close(torch.stack(scores), found.sequences_scores)


def test_a_peft_model_finds_the_positions_of_each_rows_adapter(llama, pair):
    theirs, mine = pair
    torch.testing.assert_close(mine(input_ids=IDS).logits, theirs(input_ids=IDS).logits)
    names = ["other", "plain", "default"]
    y, expected = (one(input_ids=IDS, adapter_names=names).logits for one in (mine, theirs))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        mine(input_ids=IDS, alora_offsets=[2, None, 6]).logits, theirs(input_ids=IDS, alora_offsets=[2, None, 6]).logits
    )
    mine(input_ids=IDS, labels=IDS).loss.backward()
    theirs(input_ids=IDS, labels=IDS).loss.backward()
    grads = [{key: p.grad for key, p in one.named_parameters() if p.grad is not None} for one in (mine, theirs)]
    torch.testing.assert_close(grads[0], grads[1])
    with mine.disable_adapter():
        torch.testing.assert_close(mine(input_ids=IDS).logits, llama(IDS).logits)
    for call, words in (
        (
            lambda: mine.generate(inputs_embeds=torch.zeros(1, 2, 16)),
            r"the call has no input_ids, \(batch, tokens\), in",
        ),
        (lambda: mine(inputs_embeds=torch.zeros(1, 2, 16)), r"the call has no input_ids, \(batch, tokens\), in which"),
    ):
        with pytest.raises(UnsupportedCall, match=words):
            call()
