"""Errors for combinations that are refused, as against values that are wrong.

`except Unsupported` meets them all; each is also one of Python's own, as such errors are elsewhere.
"""


class Unsupported(Exception):
    """A combination that is not supported: a method or an option on a kind of layer, or a way to call it.

    >>> import torch
    >>> from torchgraft.adapters import VeraConfig
    >>> from torchgraft.functional import bind
    >>> try:
    ...     bind(torch.nn.Conv1d(2, 2, 1), VeraConfig(target_modules=[""]))
    ... except Unsupported as error:
    ...     print(type(error).__name__, isinstance(error, ValueError))
    UnsupportedConfig True
    """


class UnsupportedConfig(Unsupported, ValueError):
    """A config that asks for something that a layer does not support.

    >>> issubclass(UnsupportedConfig, ValueError)
    True
    """


class UnsupportedCall(Unsupported, RuntimeError):
    """A call that is not supported for a model with these adapters.

    >>> issubclass(UnsupportedCall, RuntimeError)
    True
    """
