"""The tuner of each method, under PEFT's name, and what only AdaLoRA's, AdaMSS's and VB-LoRA's do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchgraft.functional.extending import Tree

from .. import _inplace as inplace
from .._config.base import AdapterConfig
from .._methods.adalora.adalora import AdaLoraConfig
from .._methods.adalora.budget import adalora_state, allocate, orthogonality
from .._methods.adamss.adamss import AdamssConfig
from .._methods.adamss.budget import adamss_state, allocate_subspaces
from .._methods.vblora import VBLoRAConfig
from .tuners import BaseTuner


class MixedModel(BaseTuner):
    """A model with adapters of several methods, as `base_model` of a `PeftMixedModel`."""


class AdaLoraModel(BaseTuner):
    """A model with adapters of type ADALORA: adds their regulariser to its loss, and keeps to their budget.

    >>> from torch import nn
    >>> config = AdaLoraConfig(init_r=2, target_r=1, total_step=2, target_modules=["0"])
    >>> tuner = AdaLoraModel(nn.Sequential(nn.Linear(3, 4)), config)
    >>> for step in range(2):
    ...     tuner(torch.ones(1, 3)).sum().backward()
    ...     tuner.update_and_allocate(step)
    """

    prefix = AdaLoraConfig.form.prefix

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model; a `loss` that it returns gets `orthogonality` of the adapters that are trained."""
        outputs = self.model(*args, **kwargs)
        if isinstance(loss := getattr(outputs, "loss", None), Tensor):
            for name in self._trained():
                loss = loss + orthogonality(self._config(name), inplace.live_params(self.model, name)).to(loss)
            outputs.loss = loss
        return outputs

    def update_and_allocate(self, global_step: int) -> None:
        """Apply `allocate` to the adapters that are trained; call it in each step, before gradients are set to zero.

        Args:
            global_step: Number of the step.

        Raises:
            ValueError: No adapter is trained; a config without `total_step`; parameters without gradients.
        """
        names, model = self._trained(), self._model()
        if not names:
            raise ValueError(f"no adapter of type ADALORA is trained; the model has {list(model.peft_config)}")
        for name in names:
            self._allocate(name, global_step)

    def _allocate(self, name: str, step: int) -> None:
        config, params = self._config(name), inplace.live_params(self.model, name)
        states: dict[str, tuple[AdaLoraConfig, Tree]] = vars(self).setdefault("_budgets", {})
        known, state = states.get(name, (None, {}))
        if known is not config:  # an adapter that is new under this name
            state = adalora_state(config, params)
        grads = {path: {leaf: _grad(p, path, leaf) for leaf, p in leaves.items()} for path, leaves in params.items()}
        with torch.no_grad():
            masked, state = allocate(config, params, grads, state, step)
            for path, leaves in params.items():
                if "lora_E" in leaves:
                    leaves["lora_E"].copy_(masked[path]["lora_E"])
        states[name] = config, state

    def _config(self, name: str) -> AdaLoraConfig:
        config: AdaLoraConfig = self._model().peft_config[name]
        return config

    def _model(self) -> Any:
        return self.model

    def _trained(self) -> list[str]:
        """Return the active adapters of this method with parameters that require gradients."""
        active = [name for name in self.active_adapters if isinstance(self._config(name), AdaLoraConfig)]
        found = inplace.layers(self.model).values()
        return [
            name
            for name in active
            if any(one.requires_grad for layer in found if name in layer.entries for one in layer.tensors_of(name))
        ]


class AdamssModel(BaseTuner):
    """A model with adapters of type ADAMSS: keeps to their budget of clusters, where they have one (`use_asa`).

    >>> from torch import nn
    >>> config = AdamssConfig(r=2, num_subspaces=2, init_weights=None, use_asa=True, asa_target_subspaces=1,
    ...                       init_warmup=0, final_warmup=1, mask_interval=1, target_modules=["0"])
    >>> tuner = AdamssModel(nn.Sequential(nn.Linear(3, 4)), config)
    >>> for step in range(2):
    ...     tuner(torch.ones(1, 3)).sum().backward()
    ...     tuner.update_and_allocate(step)
    >>> [p.requires_grad for p in tuner.model[0].adamss_A["default"].values()].count(True)
    1
    """

    prefix = AdamssConfig.form.prefix

    def update_and_allocate(self, global_step: int) -> None:
        """Apply `allocate_subspaces` to the active adapters with a budget, and freeze what it does not keep.

        Call it in each step, before gradients are set to zero.

        Args:
            global_step: Number of the step.
        """
        model: Any = self.model
        for name in self.active_adapters:
            config = model.peft_config[name]
            if isinstance(config, AdamssConfig) and config.use_asa:
                self._allocate(name, config, global_step)

    def _allocate(self, name: str, config: AdamssConfig, step: int) -> None:
        params = inplace.live_params(self.model, name)
        states: dict[str, tuple[AdamssConfig, Tree]] = vars(self).setdefault("_budgets", {})
        known, state = states.get(name, (None, {}))
        if known is not config:  # an adapter that is new under this name
            state = adamss_state(config, params)
        grads = {
            path: {leaf: torch.zeros_like(p) if p.grad is None else p.grad for leaf, p in leaves.items()}
            for path, leaves in params.items()
        }
        with torch.no_grad():
            state = allocate_subspaces(config, params, grads, state, step)
        for path, numbers in state["kept"].items():
            for number in (number for number, kept in numbers.items() if not kept):
                for leaf in (params[path][f"adamss_A.{number}"], params[path][f"adamss_B.{number}"]):
                    leaf.grad = None
                    leaf.requires_grad_(False)
        states[name] = config, state


class AdamssAsaCallback:
    """A callback of transformers' `Trainer` that calls `update_and_allocate` after each step of the optimizer.

    It has no base class, so that nothing of transformers is imported here: all other events are passed over.

    >>> AdamssAsaCallback().on_train_begin(None, None, None)
    """

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Freeze what the budgets of the model's adapters do not keep, by the gradients of this step."""
        tuner = getattr(model, "base_model", model)
        if hasattr(tuner, "update_and_allocate"):
            tuner.update_and_allocate(state.global_step)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("on_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return _pass_over


def _pass_over(*args: Any, **kwargs: Any) -> None:
    """Do nothing at an event."""


class VBLoRAModel(BaseTuner):
    """A model with adapters of type VBLORA, which knows how much a file of them holds.

    >>> from torch import nn
    >>> config = VBLoRAConfig(r=1, num_vectors=4, vector_length=2, topk=2, target_modules=["0"])
    >>> VBLoRAModel(nn.Sequential(nn.Linear(2, 2)), config).print_savable_parameters()
    VB-LoRA params to-be-saved (float32-equivalent): 16 || total params to-be-saved: 16
    """

    prefix = VBLoRAConfig.form.prefix
    shared_names = frozenset(VBLoRAConfig.form.shared_leaves)

    def get_nb_savable_parameters(self, adapter: str = "default") -> tuple[int, int]:
        """Return how many numbers an adapter's file has, integers by their size, and how many others are trained."""
        state = inplace.get_peft_model_state_dict(self.model, adapter_name=adapter)
        sizes = {
            key: one.numel() * (1 if one.is_floating_point() else one.element_size() / 4) for key, one in state.items()
        }
        trained = {name: one.numel() for name, one in self.named_parameters() if one.requires_grad}
        return (
            int(sum(size for key, size in sizes.items() if self.prefix in key)),
            sum(size for name, size in trained.items() if self.prefix not in name),
        )

    def print_savable_parameters(self) -> None:
        """Print how many numbers the file of adapter "default" has."""
        own, others = self.get_nb_savable_parameters()
        print(
            f"VB-LoRA params to-be-saved (float32-equivalent): {own:,d} || total params to-be-saved: {own + others:,d}"
        )


def _grad(parameter: Tensor, path: str, leaf: str) -> Tensor:
    if parameter.grad is None and parameter.requires_grad:
        raise ValueError(
            f"{path}: {leaf} has no gradient; call update_and_allocate after loss.backward() and before zero_grad()"
        )
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


_PREFIXES = {"VERA": "vera_lambda_"}
"""What PEFT takes for prefixes of trained parameters, where those of all tensors are shorter."""
_CLASSES: dict[str, type[BaseTuner]] = {
    "AdaLoraModel": AdaLoraModel,
    "AdamssModel": AdamssModel,
    "VBLoRAModel": VBLoRAModel,
}


def tuner_class(config: type[AdapterConfig]) -> type[BaseTuner]:
    """Return the tuner of a method under PEFT's name, always the same class.

    >>> from torchgraft.adapters import LoraConfig
    >>> tuner_class(LoraConfig).__name__, tuner_class(LoraConfig).prefix
    ('LoraModel', 'lora_')
    """
    name = config.__name__.removesuffix("Config") + "Model"
    if name not in _CLASSES:
        doc = f"A model with adapters of type {config.method.name}."
        prefix = _PREFIXES.get(config.method.name, config.form.prefix)
        shared = frozenset((*config.form.shared, *config.form.shared_leaves))
        fields = {"__doc__": doc, "__module__": __name__, "prefix": prefix, "shared_names": shared}
        _CLASSES[name] = globals()[name] = type(name, (BaseTuner,), fields)  # where pickles look for it
    return _CLASSES[name]
