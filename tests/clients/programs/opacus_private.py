"""Opacus on an injected model: per-sample gradients of the adapter, and private steps."""

from side import finish, randomise, record

# isort: split
import torch
from opacus import PrivacyEngine
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
inject_adapter_in_model(LoraConfig(r=2, lora_alpha=4, target_modules=["0", "2"]), model)
randomise(model)
x, labels = torch.randn(8, 4), torch.arange(8) % 3
trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
alone = {name: [] for name in trained}
for row, label in zip(x, labels, strict=True):
    loss = nn.functional.cross_entropy(model(row[None]), label[None])
    for name, grad in zip(trained, torch.autograd.grad(loss, trained.values()), strict=True):
        alone[name].append(grad)

optimizer = torch.optim.SGD(trained.values(), lr=0.5)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), batch_size=4)
private, optimizer, _ = PrivacyEngine().make_private(
    module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=0.0, max_grad_norm=0.1,
    poisson_sampling=False,
)  # fmt: skip
before = {name: parameter.detach().clone() for name, parameter in trained.items()}
nn.functional.cross_entropy(private(x), labels).backward()
norms = torch.stack([torch.stack([g.norm() for g in grads]) for grads in alone.values()]).norm(dim=0)
clipped = (0.1 / (norms + 1e-6)).clamp(max=1)
for name, parameter in trained.items():
    torch.testing.assert_close(parameter.grad_sample, torch.stack(alone[name]), msg=name)
    record(f"{name}.grad_sample", parameter.grad_sample)
optimizer.step()
for name, parameter in trained.items():
    wanted = before[name] - 0.5 * torch.einsum("n,n...->...", clipped, torch.stack(alone[name])) / 4  # expected batch
    torch.testing.assert_close(parameter.detach(), wanted, msg=name)
    record(name, parameter)
finish()
