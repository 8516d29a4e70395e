"""laplace-torch's posterior over an injected adapter, with Kronecker factors and with the full matrix."""

from side import finish, randomise, record

# isort: split
import torch
from laplace import Laplace
from laplace.curvature import AsdlGGN, CurvlinopsGGN
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

x, labels = torch.randn(8, 4), torch.arange(8) % 3
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), batch_size=4)
model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
inject_adapter_in_model(LoraConfig(r=2, lora_alpha=4, target_modules=["0", "2"]), model)
randomise(model)
for backend in (CurvlinopsGGN, AsdlGGN):
    for structure in ("kron", "full"):
        posterior = Laplace(model, "classification", "all", structure, backend=backend)
        posterior.fit(loader)
        assert posterior.n_params == sum(p.numel() for p in model.parameters() if p.requires_grad)
        record(f"{backend.__name__}.{structure}.logdet", posterior.log_det_posterior_precision)
        record(f"{backend.__name__}.{structure}.probabilities", posterior(x, link_approx="probit"))

trained = {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}
jacobians = torch.func.jacrev(lambda tree: torch.func.functional_call(model, tree, (x,)))(trained)
jacobian = torch.cat([jacobians[name].flatten(2) for name in trained], dim=2)
p = model(x).detach().softmax(1)
hessian = torch.einsum("nci,ncd,ndj->ij", jacobian, torch.diag_embed(p) - p[:, :, None] * p[:, None], jacobian)
torch.testing.assert_close(posterior.H, hessian, rtol=1e-4, atol=1e-5)  # the last one: full
finish()
