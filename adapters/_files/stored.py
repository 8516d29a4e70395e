"""What is in an adapter's files, and what of it is not what a target has."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchgraft.functional import Binding, Graft
from torchgraft.functional.extending import (
    Plan,
    Site,
    given_type,
    tensor_at,
    whole,
)

from .._config.base import AdapterConfig
from .._config.messages import names_of
from .._config.targets import find_targets
from .._inplace.walk import original_base
from .disk.headers import Weights
from .fit import Parts, found_leaves


@dataclasses.dataclass(frozen=True)
class Stored:
    """An adapter's opened files, and how to read them.

    Attributes:
        config: The config.
        weights: The opened weights.
        check_finite: Whether to refuse values that are not finite.
        dtype: Dtype for the parameters, or `None` for the rule of the target.
        device: Device for the parameters, or `None` for that of the base.
    """

    config: AdapterConfig
    weights: Weights
    check_finite: bool
    dtype: torch.dtype | None
    device: torch.device | str | None

    def bind(self, modules: Mapping[str, nn.Module], model: nn.Module) -> Binding:
        """Return what the config means on this model."""
        found = found_leaves(self.config, self.weights)
        if not found and self.config.form.leaves:
            raise KeyError(
                f"{self.weights.file}: has no tensor of {self.config.method.name}, the method of the config; it has "
                f"{names_of(self.weights.specs)}"
            )
        self.config.form.check(self.config, found)
        paths = {"": find_targets(self.config, modules, model)}
        return Binding.of_modules(model, {"": self.config}, modules, paths=paths, base=original_base(model))

    def read(self) -> dict[str, Tensor]:
        """Return the tensors by key, on the CPU."""
        tensors = self.weights.read()
        for key, tensor in tensors.items() if self.check_finite else ():
            if key in self.weights.made:
                continue
            tensor = tensor.float() if tensor.is_floating_point() else tensor
            if (tensor.is_floating_point() or tensor.is_complex()) and not tensor.isfinite().all():
                raise ValueError(f"{self.weights.file}: {key!r} has values that are NaN or infinite")
        return tensors

    def check_tied(self, parts: Parts, tensors: Mapping[str, Tensor]) -> None:
        """Refuse copies of a leaf that differ from it: tensors that are one here and were not where the file is from.

        Raises:
            ValueError: Names both keys.
        """
        for key, (*at, transposed) in parts.tied.items():
            where = (at[0], at[1])
            given = tensors[key].mT if transposed else tensors[key]
            if where in parts.leaves and not torch.equal(given, tensors[parts.leaves[where]]):
                raise ValueError(
                    f"{self.weights.file}: {key!r} differs from {parts.leaves[where]!r}, and the two are one tensor of "
                    "the model; untie them, or set ensure_weight_tying to false"
                )

    def leaf(self, key: str, tensor: Tensor, base: Tensor, dtype: torch.dtype) -> Tensor:
        """One parameter where it belongs, in memory of its own.

        Raises:
            ValueError: Values that the dtype cannot hold.
        """
        device = self.device or ("cpu" if base.is_meta else base.device)
        if not (dtype.is_floating_point or dtype.is_complex):
            return tensor.to(device, dtype)
        if tensor.is_complex() and not (self.dtype or dtype).is_complex:
            raise ValueError(
                f"{self.weights.file}: {key!r} is complex, {tensor.dtype}, and the model takes {self.dtype or dtype}, "
                "which has no imaginary part; load it into a complex model"
            )
        made = tensor.to(self.dtype or dtype)
        if made.itemsize < tensor.itemsize and (made.isinf() & ~tensor.isinf()).any():
            raise ValueError(
                f"{self.weights.file}: {key!r} has values of up to {tensor.abs().max():.3g}, more than {made.dtype} "
                f"can hold; pass dtype={tensor.dtype}"
            )
        return made.to(device)


def base_of(
    path: str, leaf: str, modules: Mapping[str, nn.Module], sites: Mapping[str, Site], replaced: Plan
) -> Tensor:
    """Return the tensor of the base that says where a leaf belongs."""
    if leaf in replaced.get(path, {}):
        return tensor_at(modules, replaced[path][leaf].names[0])
    site = sites[path] if path in sites else next(one for one in sites.values() if leaf in one.shared.values())
    return site.like(modules[site.owner])


def fixed_leaves(config: AdapterConfig, site: Site) -> tuple[str, ...]:
    return config.form.fixed(config, site)


def other_shared(
    config: AdapterConfig, sites: Mapping[str, Site], parts: Parts, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the file's shared constants that are not the planned ones up to the file's precision, in their dtype."""
    planned = config.form.shared_tensors(sites.values())
    given = {name: (planned[name], tensors[key]) for name, key in parts.shared.items()}
    return {name: file.to(own) for name, (own, file) in given.items() if not torch.equal(own.to(file), file)}


def other_fixed(
    config: AdapterConfig, sites: Mapping[str, Site], parts: Parts, tensors: Mapping[str, Tensor]
) -> list[tuple[str, str]]:
    """Return leaves that are not trained and differ from those of the file by more than the file's precision."""
    found = []
    for path, site in sites.items():
        for leaf, own in config.form.fixed_tensors(config, site).items():
            given = tensors[parts.leaves[path, leaf]]
            if own.is_meta or not _near(own.cpu(), given):
                found.append((path, leaf))
    return found


def _near(own: Tensor, given: Tensor) -> bool:
    """Return whether two tensors are equal up to the precision of the second, which is none for integers."""
    if not own.is_floating_point():
        return torch.equal(own.to(given.dtype), given)
    step = 4 * torch.finfo(given.dtype).eps
    return torch.allclose(own.double(), given.double(), rtol=step, atol=max(step, 1e-5))


def other_base(base: Mapping[str, Tensor], parts: Parts, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return names of the base's tensors that are not those of the file."""
    return [
        name
        for name, key in parts.base.items()
        if base[name].is_meta or not torch.equal(whole(base[name]).cpu(), tensors[key].to(base[name].dtype))
    ]


def check_target(target: Any, path: Any, call: str) -> None:
    """Refuse a model in the place of a path.

    Raises:
        TypeError: The two are swapped; `call` shows their order.
    """
    if isinstance(path, (nn.Module, Graft)) and not isinstance(target, (nn.Module, Graft)):
        raise TypeError(
            f"model is {given_type(target)}, expected a torch.nn.Module or a graft; are the arguments swapped? {call}"
        )
