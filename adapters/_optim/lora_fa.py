"""LoRA-FA: `A` stays, and `B` gets the gradient whose product with `A` is nearest to the gradient of the weight.

    G <- G (A A^T)^-1 / s^2

Zhang et al., *LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning*, 2023,
arXiv:2308.03303; Wang et al., *LoRA-Pro*, 2024, arXiv:2407.18242; PEFT's `optimizers/lorafa.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import optree
import torch
from torch import Tensor, nn

from torchgraft.functional import Graft, PerAdapter, Site, Tree

from .._config.messages import names_of
from .._inplace.layer.tuner_layer import BaseTunerLayer
from .._inplace.walk import layers, unwrap

_RIDGE = 1e-8
"""What PEFT adds to the diagonal of `A A^T`."""


def lora_fa_gradients(graft: Graft, params: Tree, grads: Tree) -> Tree:
    """LoRA-FA's gradients from those of the loss: of `B` corrected by its `A`, of `A` zero, all others as they are.

    A pure function, for any optimizer; leave `A` out of weight decay. Works under `torch.func`, `torch.compile` and for
    stacks.

    Args:
        graft: The graft; adapters of other methods beside LoRA keep their gradients.
        params: Its parameters, of one adapter or a stack.
        grads: Gradients, a tree like `params`.

    Returns:
        A tree like `grads`.

    Raises:
        ValueError: No LoRA adapter; an embedding, whose `A` starts at zero; a convolution in groups; a `B` that is not
            trained.
        KeyError, TypeError: Trees that do not fit each other.

    >>> from torchgraft.adapters import LoraConfig
    >>> from torchgraft.functional import bind, value_and_grad
    >>> graft = bind(nn.Linear(4, 3), LoraConfig(r=2, target_modules="all-linear"))
    >>> params, x = graft.init(), torch.ones(5, 4)
    >>> _, grads = value_and_grad(lambda params: graft(params, x).sum())(params)
    >>> corrected = lora_fa_gradients(graft, params, grads)[""]
    >>> corrected["lora_A"].any().item(), corrected["lora_B"].shape
    (False, torch.Size([3, 2]))
    """
    if not isinstance(graft, Graft):
        raise TypeError(f"lora_fa_gradients: graft is of type {type(graft).__name__}, expected what bind returned")
    if optree.tree_structure(params) != optree.tree_structure(grads):
        raise KeyError("lora_fa_gradients: grads has other sites or leaves than params, expected a tree like it")
    if not any(config.method.name == "LORA" for config in graft.configs.values()):
        raise ValueError("lora_fa_gradients: the graft has no LoRA adapter; bind a LoraConfig")
    if not graft.binding.named:
        return _corrected_tree(graft.sites[""], params, grads)
    return {
        name: _corrected_tree(graft.sites[name], params[name], own)
        if graft.configs[name].method.name == "LORA"
        else own
        for name, own in grads.items()
    }


def _corrected_tree(sites: Mapping[str, Site], params: Tree, grads: Tree) -> Tree:
    corrected = {path: dict(leaves) for path, leaves in grads.items()}
    for path, site in sites.items():
        if path not in params:
            raise KeyError(f"lora_fa_gradients: params lacks the site {path!r}; it has {names_of(params)}")
        _check_site(site, "lora_B" in params[path])
        a, scaling = params[path]["lora_A"], site.constants.scaling
        corrected[path]["lora_A"] = torch.zeros_like(grads[path]["lora_A"])
        corrected[path]["lora_B"] = _corrected(site, a, grads[path]["lora_B"], scaling)
    return corrected


def _check_site(site: Site, has_b: bool) -> None:
    if site.kind == "embedding":
        raise ValueError(
            f"{site.path}: LoRA-FA trains B with the A there is, and an embedding's A starts at zero, so nothing would "
            "be learned; leave it out of target_modules"
        )
    if site.groups > 1:
        raise ValueError(
            f"{site.path}: LoRA-FA has no correction for a convolution with {site.groups} groups; leave it out of "
            "target_modules"
        )
    if not has_b:
        raise ValueError(f"{site.path}: LoRA-FA trains B, and this adapter's B is fixed (mica); train it as it is")


def _corrected(site: Site, a: Tensor, grad: Tensor, scaling: float | Tensor | PerAdapter) -> Tensor:
    """`G (A A^T)^-1 / s^2`, in float32 or wider; `a` and `grad` may have leading axes."""
    wide = torch.promote_types(torch.promote_types(a.dtype, grad.dtype), torch.float32)
    if isinstance(scaling, PerAdapter):
        scaling = scaling.values.to(wide).view(-1, 1, 1)
    axes = len(site.kernel_size)
    with torch.autocast(a.device.type, enabled=False):
        rows = a.detach().to(wide).flatten(a.ndim - 1 - axes)
        gram = rows @ rows.mT + _RIDGE * torch.eye(rows.shape[-2], dtype=wide, device=rows.device)
        flat = grad.to(wide).flatten(grad.ndim - 1 - axes)
        result: Tensor = (
            (flat @ torch.linalg.pinv(gram, hermitian=True) / scaling**2).reshape(grad.shape).to(grad.dtype)
        )
        return result


class LoraFA(torch.optim.Optimizer):
    """LoRA-FA for a model with injected adapters, as PEFT's `create_lorafa_optimizer` makes it: Adam with decay.

    Freezes every trained `A`. The scaling factor of each layer is the one that it has at the step. A `B` without
    gradient stays; so does everything frozen.

    Args:
        model: A model with injected LoRA adapters.
        lr: Learning rate.
        betas: Decay of the averages of the gradient and of its square.
        eps: Added to the root of the average square, before bias correction.
        weight_decay: Decay, after the step and times the learning rate.
        correct_bias: Whether the averages are corrected for starting at zero.

    Raises:
        ValueError: Nothing that LoRA-FA trains; numbers out of range; sites as in `lora_fa_gradients`.
        TypeError: No model.

    >>> from torchgraft.adapters import LoraConfig, inject_adapter_in_model
    >>> model = inject_adapter_in_model(LoraConfig(target_modules=["0"]), nn.Sequential(nn.Linear(4, 3)))
    >>> optimizer = LoraFA(model, lr=1e-3)
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.lora_B.default.weight']
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ):
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if value < 0:
                raise ValueError(f"LoraFA: {name} is {value}, expected 0 or more")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"LoraFA: betas is {betas}, expected two numbers of at least 0 and less than 1")
        model = unwrap(model)
        self._products = _products(model)
        if not self._products:
            raise ValueError(
                "LoraFA: the model has no trained LoRA adapter; inject a LoraConfig, not in inference mode"
            )
        for layer, adapter in self._products.values():
            layer.leaves(adapter)["lora_A"].requires_grad_(False)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(trained, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Computes the loss anew; its value is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(group, parameter)
        return loss

    def _update(self, group: dict[str, Any], parameter: Tensor) -> None:
        grad, state = parameter.grad, self.state[parameter]
        assert grad is not None
        if parameter in self._products:
            layer, adapter = self._products[parameter]
            site = layer.entries[adapter].site
            grad = _corrected(site, layer.leaves(adapter)["lora_A"], grad, site.constants.scaling)
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        state["step"] += 1
        (beta1, beta2), lr, step = group["betas"], group["lr"], state["step"]
        state["exp_avg"].mul_(beta1).add_(grad, alpha=1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        size = lr * (1 - beta2**step) ** 0.5 / (1 - beta1**step) if group["correct_bias"] else lr
        parameter.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-size)
        if group["weight_decay"]:
            parameter.mul_(1 - lr * group["weight_decay"])


def _products(model: nn.Module) -> dict[Tensor, tuple[BaseTunerLayer, str]]:
    """Return where each trained `B` hangs."""
    found: dict[Tensor, tuple[BaseTunerLayer, str]] = {}
    for layer in layers(model).values():
        for adapter, entry in layer.entries.items():
            if entry.config.method.name != "LORA":
                continue
            leaves = layer.leaves(adapter)
            if any(leaf.requires_grad for leaf in leaves.values()):
                _check_site(entry.site, "lora_B" not in layer.fixed(adapter))
                found[leaves["lora_B"]] = layer, adapter
    return found
