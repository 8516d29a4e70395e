"""Errors and warnings under PEFT's names, for programs that catch them by these."""

from __future__ import annotations


class PeftError(Exception):
    """An error about adapters for which no built-in class fits alone.

    >>> issubclass(NoMatchingPeftModuleError, PeftError)
    True
    """


class NoMatchingPeftModuleError(PeftError, ValueError):
    """A config that matches no module of the model.

    >>> from torch import nn
    >>> from torchgraft.adapters import LoraConfig, inject_adapter_in_model
    >>> try:
    ...     inject_adapter_in_model(LoraConfig(target_modules=["q"]), nn.Sequential(nn.Linear(2, 2)))
    ... except NoMatchingPeftModuleError as error:
    ...     print(str(error).partition(";")[0])
    LoraConfig: target_modules=['q'] matches no module
    """


class PeftWarning(UserWarning):
    """The class of some warnings, as in PEFT; most are `UserWarning` or `RuntimeWarning`.

    >>> issubclass(PeftWarning, UserWarning)
    True
    """
