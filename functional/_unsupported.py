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
    """A config that asks for what does not exist for a layer.

    >>> issubclass(UnsupportedConfig, ValueError)
    True
    """


class UnsupportedCall(Unsupported, RuntimeError):
    """A call that a model which is adapted like this cannot have.

    >>> issubclass(UnsupportedCall, RuntimeError)
    True
    """
