"""A few steps of trl's trainers with `peft_config=`: losses, and the adapters that come out."""

import tempfile

from side import finish, record  # first: the names below are those of the side

# isort: split
import tokenizers
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, load_peft_weights
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

WORDS = [f"w{i}" for i in range(28)]
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
ARGUMENTS = {
    "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 0.05, "report_to": "none", "use_cpu": True,
    "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "bf16": False, "seed": 0,
}  # fmt: skip


def tokenizer():
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *WORDS])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
        vocab_size=31, pad_token_id=0, eos_token_id=1, bos_token_id=1, max_position_embeddings=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def sentence(start, length=5):
    return " ".join(WORDS[(start + i) % len(WORDS)] for i in range(length))


def train(name, trainer):
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.train()
    record(f"{name}.losses", [entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert isinstance(trainer.model, PeftModel)
    for key, value in get_peft_model_state_dict(trainer.model).items():
        record(f"{name}.{key}", value)
    changed = {key for key, value in trainer.model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if ".lora_" in key and ".default." in key}, changed
    trainer.save_model()
    saved = load_peft_weights(trainer.args.output_dir)
    assert saved.keys() == get_peft_model_state_dict(trainer.model).keys()
    assert all(torch.equal(value, saved[key]) for key, value in get_peft_model_state_dict(trainer.model).items())


def sft(folder):
    data = Dataset.from_dict(
        {"prompt": [sentence(i) for i in range(8)], "completion": [sentence(i + 5) for i in range(8)]}
    )
    return SFTTrainer(
        llama(), SFTConfig(folder, max_length=16, gradient_checkpointing=True, **ARGUMENTS), train_dataset=data,
        processing_class=tokenizer(), peft_config=LoraConfig(**LORA),
    )  # fmt: skip


def preferences():
    return Dataset.from_dict({
        "prompt": [sentence(i) for i in range(8)], "chosen": [sentence(i + 5) for i in range(8)],
        "rejected": [sentence(3 * i + 1) for i in range(8)],
    })  # fmt: skip


def dpo(folder):
    return DPOTrainer(
        llama(), args=DPOConfig(folder, max_length=16, **ARGUMENTS), train_dataset=preferences(),
        processing_class=tokenizer(), peft_config=LoraConfig(**LORA),
    )  # fmt: skip


def dpo_of_an_adapter(folder):
    """From an adapter that was trained before, which trl copies as its reference."""
    model = get_peft_model(llama(), LoraConfig(init_lora_weights=False, **LORA))
    return DPOTrainer(
        model, args=DPOConfig(folder, max_length=16, **ARGUMENTS), train_dataset=preferences(),
        processing_class=tokenizer(),
    )  # fmt: skip


def grpo(folder):
    def reward(completion_ids, **_):
        return [float(sum(token % 5 for token in ids)) for ids in completion_ids]

    return GRPOTrainer(
        llama(), reward, args=GRPOConfig(folder, num_generations=2, max_completion_length=4, beta=0.1, **ARGUMENTS),
        train_dataset=Dataset.from_dict({"prompt": [sentence(i) for i in range(8)]}), processing_class=tokenizer(),
        peft_config=LoraConfig(**LORA),
    )  # fmt: skip


for make in (sft, dpo, dpo_of_an_adapter, grpo):
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        train(make.__name__, make(folder))
finish()
