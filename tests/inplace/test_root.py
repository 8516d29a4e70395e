"""What a model with injected adapters is asked for and cannot give is an error, or a warning."""

import copy
import pickle
import warnings

import peft
import pytest
import torch
import transformers
from torch import nn

from torchgraft.adapters import LoraConfig, inject_adapter_in_model, merge_and_unload, summary, unload
from torchgraft.functional import bind


class Swallowing(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(4, 4)

    def forward(self, x, **_):
        return self.q(x)


class Strict(Swallowing):
    def forward(self, x):
        return self.q(x)


CONFIG = LoraConfig(r=2, target_modules=["q"])


def test_adapter_names_that_would_be_swallowed():
    model, x = Swallowing(), torch.randn(2, 4)
    inject_adapter_in_model(CONFIG, model, "a")
    inject_adapter_in_model(CONFIG, model, "b")
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(
            ValueError, match=r"forward\(\) of this Swallowing got adapter_names=\['a', 'b'\].*adapter_rows"
        ):
            one(x, adapter_names=["a", "b"])
    torch.testing.assert_close(model(x, adapter_names=None, other=1), model(x))
    assert len(model._forward_pre_hooks) == 1
    torch.compile(model, fullgraph=True, backend="eager")(x)
    unload(model)
    assert not model._forward_pre_hooks and not model._forward_pre_hooks_with_kwargs
    model(x, adapter_names=["a", "b"])


def test_models_that_know_their_arguments_get_no_hook():
    model = inject_adapter_in_model(CONFIG, Strict())
    assert not model._forward_pre_hooks and not model._state_dict_pre_hooks
    with pytest.raises(TypeError, match="adapter_names"):
        model(torch.randn(2, 4), adapter_names=["a", "b"])


def bert(**fields):
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, **fields
    )
    return transformers.BertForSequenceClassification(config)


def test_save_pretrained_of_an_injected_model_warns(tmp_path):
    model = bert()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["query"]), model)
    with pytest.warns(UserWarning, match="starts these layers afresh. Save the adapter with save_adapter"):
        model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.state_dict()
        copy.deepcopy(model).state_dict()
        merge_and_unload(model).save_pretrained(tmp_path)
    assert not model._state_dict_pre_hooks


@pytest.mark.parametrize("start", [bind, lambda model, config: inject_adapter_in_model(config, model)])
@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", peft.TaskType.SEQ_CLS])
def test_a_task_whose_head_stays_frozen_warns(start, task):
    config = LoraConfig(r=2, target_modules=["query"], task_type=task)
    with pytest.warns(UserWarning, match=r"classifier of the model stays frozen.*modules_to_save=\['classifier', 'sc"):
        start(bert(), config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start(bert(), LoraConfig(r=2, target_modules=["query"], task_type=task, modules_to_save=["classifier"]))
        start(bert(), LoraConfig(r=2, target_modules=["query", "classifier"], task_type=task))
        start(bert(), LoraConfig(r=2, target_modules=["query"], task_type="CAUSAL_LM"))
        start(bert(), LoraConfig(r=2, target_modules=["query"], task_type=task, inference_mode=True))


def test_summary_of_another_librarys_adapters_is_an_error():
    theirs = peft.LoraConfig(r=2, target_modules=["q"])
    models = [peft.get_peft_model(Strict(), theirs), peft.inject_adapter_in_model(theirs, Strict())]
    for model in models:
        with pytest.raises(TypeError, match=r"q is a peft\.tuners\.lora.*print_trainable_parameters"):
            summary(model)
    assert summary(inject_adapter_in_model(CONFIG, Strict())).rows[0].sites == 1
