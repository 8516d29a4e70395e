"""PEFT's ways to look at data before LoRA starts from it: the user's own program runs the model, and hooks look on."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from torchgraft.functional.extending import modules_of, weights_of

from .._calibration.initial import Statistics
from .._calibration.initial.corda import covariance, oriented
from .._calibration.observing import check_reached, looked_at, wide
from .._files.disk.headers import open_weights
from .._methods.lora.lora import LoraConfig


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], Any] | None = None,
    hooked_model: nn.Module | None = None,
) -> None:
    """Compute CorDA's statistics while `run_model` runs the model, and keep them in the config.

    `fit_corda` does the same with batches, and returns a config. Files are those of the config's `corda_config`; they
    are safetensors, and what is there is read instead of looked at.

    Args:
        model: The model that is to get the adapter. It stays as it is.
        lora_config: A config with `init_lora_weights="corda"`; its `statistics` are set, and it is the one to inject.
        run_model: Runs the model on data, in evaluation mode and without gradients.
        hooked_model: The model that `run_model` runs, if it is another one with modules of the same names.

    Raises:
        ValueError: Another initialisation, no `run_model` where no file is there, modules that were not reached, inputs
            or files that do not fit.

    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> config = LoraConfig(r=2, init_lora_weights="corda", target_modules=["0"])
    >>> preprocess_corda(model, config, lambda: model(torch.randn(64, 4)))
    >>> config.statistics
    Statistics('corda', 1 modules)
    """
    _, sites = looked_at(model, lora_config, "corda")
    how: Any = lora_config.corda_config
    found = _read(how.cache_file, sites, ("U", "S", "V"), "eigens.{}_WC")
    if found is None:
        read = _read(how.covariance_file, sites, ("covariance",), "")
        if read is None:
            read = _covariances(
                model if hooked_model is None else hooked_model, sites, run_model, how.use_float16_for_covariance
            )
            _write(how.covariance_file, read, "")
        weights = weights_of(sites, modules_of(model))
        found = {
            path: oriented(wide(weights(path)), read[path]["covariance"], site.constants.r, how.corda_method)
            for path, site in sites.items()
        }
        _write(how.cache_file, found, "eigens.{}_WC")
    for path, site in sites.items():
        shapes = {"U": (site.out_features, site.constants.r), "S": (site.constants.r,)}
        shapes["V"] = (site.in_features, site.constants.r)
        _check_shapes(how.cache_file, path, found[path], shapes)
    lora_config.statistics = Statistics("corda", found)


def _covariances(
    model: nn.Module, sites: Mapping[str, Any], run_model: Callable[[], Any] | None, half: bool
) -> dict[str, dict[str, Tensor]]:
    """Return the mean covariance of the inputs of each module, over its calls."""
    if run_model is None:
        raise ValueError("preprocess_corda: run_model is None, and corda_config has no file that is there; give one")
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(sites, 0)

    def see(path: str, x: Tensor) -> None:
        rows = x.detach().flatten(0, -2)
        added = covariance(rows.half() if half else wide(rows))
        if not added.isfinite().all():
            raise ValueError(f"preprocess_corda: the covariance of the inputs of {path} is not finite")
        sums[path] = sums[path] + added if path in sums else added
        counts[path] += 1

    modes = [(module, module.training) for module in model.modules()]
    with _seeing(model, sites, see):
        model.eval()
        try:
            run_model()
        finally:
            for module, mode in modes:
                module.training = mode
    check_reached(sites, sums, "preprocess_corda")
    return {path: {"covariance": sums[path] / counts[path]} for path in sites}


@contextmanager
def _seeing(model: nn.Module, paths: Mapping[str, Any], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Have the inputs of modules be seen, by path."""
    modules = modules_of(model)
    if missing := [path for path in paths if path not in modules]:
        raise ValueError(f"preprocess_corda: hooked_model has no module {missing[0]!r}, which is targeted")

    def hook(path: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: see(path, args[0])

    handles = [modules[path].register_forward_pre_hook(hook(path)) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def preprocess_loraga(
    model: nn.Module,
    lora_config: LoraConfig,
    train_step: Callable[[], Any],
    cache_file: str | os.PathLike[str] | None = None,
) -> None:
    """Compute LoRA-GA's statistics while `train_step` runs forward and backward, and keep them in the config.

    What is put there is the mean gradient of each targeted weight over the backward passes. `fit_lora_ga` does the same
    with batches, and returns a config.

    Args:
        model: The model that is to get the adapter, in training mode for the time. No gradient is left in it.
        lora_config: A config with `init_lora_weights="lora_ga"`; its `statistics` are set, and it is the one to inject.
        train_step: Runs the model on data and calls `backward`, as often as it likes.
        cache_file: A file for the gradients, as safetensors; if it is there, it is read and nothing is run.

    Raises:
        ValueError: Another initialisation, weights without a gradient, a file that does not fit.

    >>> model = nn.Sequential(nn.Linear(4, 4))
    >>> config = LoraConfig(r=2, init_lora_weights="lora_ga", target_modules=["0"])
    >>> preprocess_loraga(model, config, lambda: model(torch.ones(2, 4)).square().sum().backward())
    >>> config.statistics
    Statistics('lora_ga', 1 modules)
    """
    _, sites = looked_at(model, lora_config, "lora_ga")
    found = _read(cache_file, sites, ("gradient",), "_peft_loraga_grad")
    if found is None:
        modules = modules_of(model)
        means = _mean_gradients(model, {path: modules[path].weight for path in sites}, train_step)
        found = {path: {"gradient": site.canonical(means[path])} for path, site in sites.items()}
        _write(cache_file, found, "_peft_loraga_grad")
    for path, site in sites.items():
        _check_shapes(cache_file, path, found[path], {"gradient": (site.out_features, site.in_features)})
    lora_config.statistics = Statistics("lora_ga", found)


def _mean_gradients(model: nn.Module, weights: Mapping[str, Any], train_step: Callable[[], Any]) -> dict[str, Tensor]:
    """Return the mean of what backward passes say of weights; gradients, flags and modes are as before."""
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(weights, 0)
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]

    def take(path: str) -> Callable[[Tensor], None]:
        def hook(weight: Tensor) -> None:
            added = wide(weight.grad)  # type: ignore[arg-type]
            sums[path] = sums[path] + added if path in sums else added.clone()
            counts[path] += 1
            weight.grad = None

        return hook

    handles = []
    try:
        for parameter, *_ in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        for path, weight in weights.items():
            handles.append(weight.requires_grad_().register_post_accumulate_grad_hook(take(path)))
        model.train()
        with torch.enable_grad():
            train_step()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, requires_grad, grad in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for module, mode in modes:
            module.training = mode
    check_reached(weights, sums, "preprocess_loraga")
    return {path: sums[path] / counts[path] for path in weights}


def _key(path: str, name: str, form: str) -> str:
    return ".".join(part for part in (path, form.format(name)) if part)


def _read(
    file: str | os.PathLike[str] | None, paths: Mapping[str, Any], names: tuple[str, ...], form: str
) -> dict[str, dict[str, Tensor]] | None:
    """Return the tensors of each module from a file, `None` where there is none.

    Raises:
        ValueError: A pickle, as PEFT writes it, or a file that lacks a module.
    """
    if file is None or not Path(file).is_file() or not Path(file).stat().st_size:
        return None
    with Path(file).open("rb") as handle:
        tensors = open_weights(handle, Path(file)).read()
    if lacking := [key for path in paths for key in (_key(path, name, form) for name in names) if key not in tensors]:
        raise ValueError(f"{file}: lacks {lacking[0]!r}; it was made for other targets, delete it or name another file")
    return {path: {name: tensors[_key(path, name, form)] for name in names} for path in paths}


def _write(file: str | os.PathLike[str] | None, found: Mapping[str, Mapping[str, Tensor]], form: str) -> None:
    """Write the tensors of each module to a file, as a whole or not at all."""
    if file is None:
        return
    tensors = {_key(path, name, form): one.contiguous() for path, own in found.items() for name, one in own.items()}
    folder = Path(file).absolute().parent
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, delete=False) as handle:
        handle.write(safetensors.torch.save(tensors))
    os.replace(handle.name, file)


def _check_shapes(
    file: str | os.PathLike[str] | None, path: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(
                f"{file}: {name} of {path} has shape {tuple(tensors[name].shape)}, expected {shape}; it was made for "
                "another model or rank, delete it or name another file"
            )
