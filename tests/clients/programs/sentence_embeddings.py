"""sentence-transformers: `add_adapter` on a model, a few steps of its trainer, saving and loading."""

import tempfile

from side import finish, record

# isort: split
import sentence_transformers as st
import tokenizers
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, TaskType
from sentence_transformers.sentence_transformer import losses, modules

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(26))]
core = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
texts = [" ".join(WORDS[5 + (i * j) % 26] for j in range(1, 5)) for i in range(8)]

with tempfile.TemporaryDirectory() as folder:
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, vocab_size=31
    )
    transformers.BertModel(config).save_pretrained(f"{folder}/bert")
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, **names).save_pretrained(f"{folder}/bert")
    words = modules.Transformer(f"{folder}/bert", max_seq_length=16)
    model = st.SentenceTransformer(modules=[words, modules.Pooling(words.get_word_embedding_dimension())], device="cpu")
    base = model.encode(texts, convert_to_tensor=True)
    record("base", base)
    lora = LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, r=2, lora_alpha=4, target_modules=["query", "value"])
    model.add_adapter(lora)
    assert torch.equal(model.encode(texts, convert_to_tensor=True), base)
    assert model.active_adapters() == ["default"]
    data = Dataset.from_dict({"a": texts[:4], "b": texts[4:]})
    arguments = st.SentenceTransformerTrainingArguments(
        f"{folder}/out", max_steps=3, per_device_train_batch_size=2, learning_rate=0.1, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    loss = losses.MultipleNegativesRankingLoss(model)
    st.SentenceTransformerTrainer(model, arguments, train_dataset=data, loss=loss).train()
    trained = model.encode(texts, convert_to_tensor=True)
    record("trained", trained)
    assert not torch.allclose(trained, base, atol=1e-3)
    model.save_pretrained(f"{folder}/adapted")
    again = st.SentenceTransformer(f"{folder}/adapted", device="cpu")
    torch.testing.assert_close(again.encode(texts, convert_to_tensor=True), trained)
    model.disable_adapters()
    assert torch.equal(model.encode(texts, convert_to_tensor=True), base)
    model.enable_adapters()
    model.delete_adapter("default")
    assert torch.equal(model.encode(texts, convert_to_tensor=True), base)
finish()
