"""A LightningModule around an injected model: training, its checkpoint, and resuming from it."""

import tempfile

from side import finish, record

# isort: split
import lightning
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from torch import nn


class Adapted(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        self.model = inject_adapter_in_model(LoraConfig(r=2, lora_dropout=0.1, target_modules=["0", "2"]), model)

    def training_step(self, batch, index):
        x, labels = batch
        loss = nn.functional.cross_entropy(self.model(x), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.1)


def fit(module, steps, folder, resume=None):
    trainer = lightning.Trainer(
        max_steps=steps, default_root_dir=folder, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    torch.manual_seed(steps)
    trainer.fit(module, loader, ckpt_path=resume)
    return trainer


data = torch.utils.data.TensorDataset(torch.randn(16, 4), torch.arange(16) % 3)
loader = torch.utils.data.DataLoader(data, batch_size=4)
with tempfile.TemporaryDirectory() as folder:
    module = Adapted()
    base = {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}
    fit(module, 4, folder).save_checkpoint(f"{folder}/four.ckpt")
    assert all(torch.equal(p, base[name]) for name, p in module.named_parameters() if name in base)
    for name, tensor in get_peft_model_state_dict(module.model).items():
        record(f"four.{name}", tensor)
    again = Adapted()
    fit(again, 8, folder, f"{folder}/four.ckpt")
    fit(module, 8, folder, f"{folder}/four.ckpt")
for name, tensor in get_peft_model_state_dict(module.model).items():
    torch.testing.assert_close(get_peft_model_state_dict(again.model)[name], tensor, msg=name)
    record(f"eight.{name}", tensor)
finish()
