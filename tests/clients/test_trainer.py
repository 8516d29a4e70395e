"""transformers' Trainer on models with injected adapters, with and without the alias."""

import copy
import dataclasses

import pytest
import torch
import transformers
from safetensors.torch import load_file

from torchgraft.adapters import (
    IA3Config,
    LoraConfig,
    PeftModel,
    as_peft,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)

CONFIGS = {
    "lora": LoraConfig(r=4, lora_alpha=16, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "down_proj"]),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
}
TOKENS = torch.arange(8 * 6).view(8, 6) % 5 + 3
DATA = [{"input_ids": row, "labels": row} for row in TOKENS]


def trainer(model, folder, save_steps=None):
    saving = {"save_strategy": "steps", "save_steps": save_steps} if save_steps else {"save_strategy": "no"}
    arguments = transformers.TrainingArguments(
        folder, max_steps=8, per_device_train_batch_size=4, learning_rate=0.05, report_to=[], use_cpu=True,
        logging_steps=1, disable_tqdm=True, **saving,
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=DATA)


def loss_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS, labels=TOKENS).loss


def check_training(llama, model, run, before):
    assert len([entry for entry in run.state.log_history if "loss" in entry]) == 8
    assert loss_of(model) < loss_of(llama.model())
    base = get_base_model_state_dict(model)
    for name, tensor in llama.model().state_dict().items():
        assert torch.equal(base[name], tensor), name
    adapter = get_peft_model_state_dict(model)
    changed = {key for key in adapter if not torch.equal(adapter[key], before[key])}
    assert changed == set(before)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {
        id(p) for group in run.optimizer.param_groups for p in group["params"]
    }


@pytest.mark.parametrize("way", ["inject", "alias"])
@pytest.mark.parametrize("method", CONFIGS)
def test_trains_the_adapter_and_nothing_else(llama, method, way, tmp_path):
    model = llama.model()
    if way == "inject":
        inject_adapter_in_model(CONFIGS[method], model)
        before = copy.deepcopy(get_peft_model_state_dict(model))
        run = trainer(model, tmp_path)
        run.train()
    else:
        with as_peft():
            model.add_adapter(copy.deepcopy(CONFIGS[method]))
            before = copy.deepcopy(model.get_adapter_state_dict())
            run = trainer(model, tmp_path)
            run.train()
    check_training(llama, model, run, before)


@pytest.mark.filterwarnings("ignore:save_pretrained of a LlamaForCausalLM with injected adapters:UserWarning")
def test_checkpoints_of_an_injected_model_resume(llama, tmp_path):
    models = [inject_adapter_in_model(CONFIGS["lora"], llama.model()) for _ in range(2)]
    trainer(models[0], tmp_path).train()
    trainer(models[1], tmp_path, save_steps=4).train()
    again = inject_adapter_in_model(CONFIGS["lora"], llama.model())
    trainer(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for name, tensor in models[0].state_dict().items():
        torch.testing.assert_close(models[1].state_dict()[name], tensor, msg=name)
        torch.testing.assert_close(again.state_dict()[name], tensor, msg=name)


@pytest.mark.usefixtures("alias")
def test_checkpoints_through_the_alias_are_adapters_and_need_loading_by_hand(llama, tmp_path):
    """Trainer saves an added adapter like `save_pretrained`, but resumes from one only for a `PeftModel`."""
    model = llama.model()
    model.add_adapter(CONFIGS["lora"])
    trainer(model, tmp_path, save_steps=8).train()
    checkpoint = tmp_path / "checkpoint-8"
    assert (checkpoint / "adapter_config.json").exists()
    assert not (checkpoint / "model.safetensors").exists()
    again = llama.model()
    again.add_adapter(CONFIGS["lora"])
    with pytest.raises(ValueError, match="Can't find a checkpoint index"):
        trainer(again, tmp_path).train(resume_from_checkpoint=str(checkpoint))
    found = set_peft_model_state_dict(again, load_file(checkpoint / "adapter_model.safetensors"))
    assert found == ([], [])
    torch.testing.assert_close(llama.logits(again.eval()), llama.logits(model.eval()))


@pytest.mark.usefixtures("alias")
@pytest.mark.parametrize("best", [False, True], ids=["resumed", "best"])
def test_checkpoints_of_a_peft_model_resume(llama, best, tmp_path):
    config = dataclasses.replace(CONFIGS["lora"], lora_dropout=0.0, task_type="CAUSAL_LM")

    def made():
        torch.manual_seed(0)
        return get_peft_model(llama.model(), config)

    whole, model, again = made(), made(), made()
    trainer(whole, tmp_path / "whole").train()
    run = trainer(model, tmp_path, save_steps=4)
    run.train()
    checkpoint = tmp_path / "checkpoint-4"
    assert sorted(file.name for file in checkpoint.glob("*.safetensors")) == ["adapter_model.safetensors"]
    if best:  # as `load_best_model_at_end` does
        run.state.best_model_checkpoint = str(checkpoint)
        run._load_best_model()
        found = PeftModel.from_pretrained(llama.model(), checkpoint)
        return torch.testing.assert_close(llama.logits(model.eval()), llama.logits(found))
    trainer(again, tmp_path).train(resume_from_checkpoint=str(checkpoint))
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, msg=name)
        torch.testing.assert_close(again.state_dict()[name], tensor, msg=name)
