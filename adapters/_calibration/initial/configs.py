"""Configs of the initialisations, with PEFT's names, fields and defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

C = TypeVar("C")


def _check(config: Any, name: str, fits: bool, expected: str) -> None:
    if not fits:
        raise ValueError(f"{type(config).__name__}: {name} is {getattr(config, name)!r}, expected {expected}")


@dataclasses.dataclass(frozen=True)
class EvaConfig:
    """Settings of EVA's initialisation from data.

    Attributes:
        rho: Most rank of a module, relative to its own; 1 for no redistribution of ranks between modules.
        tau: Cosine similarity to the last step from which on a direction counts as found.
        use_label_mask: Leave out tokens whose label is `label_mask_value`.
        label_mask_value: The label of tokens that are not trained on.
        whiten: Divide each direction by the root of its singular value.
        adjust_scaling_factors: Change `lora_alpha` with the rank, so that scaling factors stay.

    >>> EvaConfig(rho=1.0).tau
    0.99
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        _check(self, "rho", _is_number(self.rho) and self.rho >= 1, "a number of at least 1")
        _check(self, "tau", _is_number(self.tau) and 0 <= self.tau <= 1, "0 <= tau <= 1")


@dataclasses.dataclass(frozen=True)
class CordaConfig:
    """Settings of CorDA.

    Attributes:
        cache_file: A file for the decompositions, which `preprocess_corda` writes, or reads where it is there;
            safetensors, where PEFT has a pickle.
        covariance_file: The same for the covariances.
        corda_method: `"ipm"` adapts what the data uses most, `"kpm"` what it uses least.
        verbose: Has no effect; a progress bar is an argument of `fit_corda`.
        use_float16_for_covariance: Sum up covariances in half precision.
        prune_temporary_fields: Has no effect; nothing is written to the model.

    >>> CordaConfig().corda_method
    'ipm'
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: str = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True

    def __post_init__(self) -> None:
        _check(self, "corda_method", self.corda_method in ("ipm", "kpm"), "'ipm' or 'kpm'")


@dataclasses.dataclass(frozen=True)
class LoftQConfig:
    """Settings of LoftQ's quantisation.

    Attributes:
        loftq_bits: 4 for NF4, 8 for int8.
        loftq_iter: Number of turns of quantising and fitting.

    >>> LoftQConfig().loftq_bits
    4
    """

    loftq_bits: int = 4
    loftq_iter: int = 1

    def __post_init__(self) -> None:
        _check(self, "loftq_bits", self.loftq_bits in (4, 8), "4 or 8")
        _check(self, "loftq_iter", isinstance(self.loftq_iter, int) and self.loftq_iter > 0, "a positive integer")


@dataclasses.dataclass(frozen=True)
class LoraGAConfig:
    """Settings of LoRA-GA's initialisation from gradients.

    Attributes:
        direction: Singular vectors of `A` and `B`: `"ArBr"` every other one, `"A2rBr"` the second half and the first,
            `"ArB2r"` the first half and the second, `"random"` the same random ones.
        scale: Size of the factors: `"stable"` by the width and `stable_gamma`, `"weight_svd"` by the weight,
            `"gd_scale"` by the scaling factor, `"unit"` as they are.
        stable_gamma: Makes the factors of `"stable"` smaller.

    >>> LoraGAConfig().direction
    'ArB2r'
    """

    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: int = 16

    def __post_init__(self) -> None:
        directions, scales = ("ArBr", "A2rBr", "ArB2r", "random"), ("stable", "weight_svd", "gd_scale", "unit")
        _check(self, "direction", self.direction in directions, f"one of {directions}")
        _check(self, "scale", self.scale in scales, f"one of {scales}")
        _check(self, "stable_gamma", _is_number(self.stable_gamma) and self.stable_gamma > 0, "a positive number")


CONFIGS: Mapping[str, type] = {
    "loftq_config": LoftQConfig,
    "eva_config": EvaConfig,
    "corda_config": CordaConfig,
    "lora_ga_config": LoraGAConfig,
}
"""The fields of a LoRA config that hold one."""

PLAIN: Mapping[str, Any] = {
    "init_lora_weights": True,
    "statistics": None,
    **dict.fromkeys(CONFIGS),
    "loftq_config": {},
}
"""Fields of a LoRA config that starts as plain LoRA does."""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def made(cls: type[C], value: Any, field: str) -> C:
    """Return a config from one, from a dict as JSON has it, or from `None` for the defaults.

    Raises:
        ValueError: Something else, or a field that the config does not have.

    >>> made(LoftQConfig, {"loftq_bits": 8}, "loftq_config")
    LoftQConfig(loftq_bits=8, loftq_iter=1)
    """
    if isinstance(value, cls):
        return value
    fields = dict(value) if isinstance(value, Mapping) else {} if value is None else None
    known = [one.name for one in dataclasses.fields(cls)]  # type: ignore[arg-type]
    if fields is None or not fields.keys() <= set(known):
        raise ValueError(
            f"{field} is {value!r:.200}, expected a {cls.__name__}, or a dict with fields among {', '.join(known)}"
        )
    return cls(**fields)
