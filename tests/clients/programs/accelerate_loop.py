"""A training loop with accelerate: `prepare`, accumulated gradients, `save_state`, and the adapter out of it."""

import tempfile

from side import finish, record

# isort: split
import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn


def made():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    return get_peft_model(model, LoraConfig(r=2, target_modules=["0", "2"]))


def batches(model, optimizer, loader, accelerator):
    for x, labels in loader:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(x), labels))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


data = torch.utils.data.TensorDataset(torch.randn(16, 4), torch.arange(16) % 3)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model = made()
assert is_peft_model(model)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
model, optimizer, loader = accelerator.prepare(model, optimizer, torch.utils.data.DataLoader(data, batch_size=4))
with tempfile.TemporaryDirectory() as folder:
    batches(model, optimizer, loader, accelerator)
    accelerator.save_state(f"{folder}/state")
    outputs = []
    for _ in range(2):
        accelerator.load_state(f"{folder}/state")
        batches(model, optimizer, loader, accelerator)
        outputs.append(model(data.tensors[0]).detach())
    assert torch.equal(*outputs)
    record("trained", outputs[0])
    unwrapped = accelerator.unwrap_model(model)
    state = accelerator.get_state_dict(model)
    unwrapped.save_pretrained(f"{folder}/adapter", is_main_process=accelerator.is_main_process, state_dict=state)
    again = PeftModel.from_pretrained(made().unload(), f"{folder}/adapter")
    torch.testing.assert_close(again(data.tensors[0]), outputs[0])
finish()
