"""Grafts: a model bound to adapter configs, as a pure function of (params, inputs)."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from ._binding.binding import Binding
from ._execution.bound_model import BoundModel
from ._execution.run import call
from ._execution.trial import remember
from ._execution.views import make_view
from ._execution.watched import watched_base
from ._locating.finder import Declared
from ._messages import did_you_mean
from ._method import Config, Tree
from ._routing.route import Routed
from ._sites.site import Site
from ._trees import stack, unstack


class Graft:
    """A model and the adapters bound to it; made by `bind`.

    Holds no parameters: `graft(params, *inputs)` is a pure function. The user's model is only read.

    Args:
        model: The user's model.
        binding: Configs bound to it.
        allow_unreached: Accept forwards that run past a site.

    Attributes:
        binding: What follows from model and configs: sites, replaced tensors, ties, shapes, constants.
    """

    def __init__(self, model: nn.Module, binding: Binding, *, allow_unreached: bool = False):
        if not isinstance(binding, Binding):
            raise TypeError(
                f"Graft: binding is of type {type(binding).__name__}, expected a Binding; bind(model, config) makes a "
                "graft of a config"
            )
        self.binding = binding.on(model)
        self.bound = BoundModel(self.binding, allow_unreached)

    @property
    def model(self) -> nn.Module:
        """The user's model, or one that shares its tensors and has more layers (`layer_replication`)."""
        return self.binding.model

    @property
    def configs(self) -> Mapping[str, Config]:
        """The configs, by adapter name (`""` for an unnamed one)."""
        return self.binding.configs

    @property
    def sites(self) -> Mapping[str, Mapping[str, Site]]:
        """The adapted modules, by adapter name and path."""
        return self.binding.sites

    def init(
        self,
        generator: torch.Generator | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Tree:
        """Make fresh parameters.

        Args:
            generator: Source of randomness; one generator state gives one tree. `None` takes torch's global one.
            dtype: Dtype of the leaves; by default float32, or the base's where that is wider.
            device: Device of the leaves; by default each site's own.

        Returns:
            `{path: {leaf: tensor}}`, or `{name: {path: {leaf: tensor}}}` for named adapters; keys are sorted.

        Raises:
            TypeError: A `generator` or a `dtype` of another type, or no floating-point one.

        >>> from torchgraft.adapters import LoraConfig
        >>> from torchgraft.functional import bind
        >>> graft = bind(torch.nn.Linear(4, 3), LoraConfig(r=2, target_modules="all-linear"))
        >>> {leaf: tuple(t.shape) for leaf, t in graft.init()[""].items()}
        {'lora_A': (2, 4), 'lora_B': (3, 2)}
        """
        return self.binding.init(generator, dtype, device)

    def stack(self, adapters: Sequence[Tree]) -> Tree:
        """Stack trees along a new leading axis, the adapter, as `stack` does; each has to fit this graft.

        Raises:
            KeyError, TypeError, ValueError: A tree that does not fit, or none.
        """
        adapters = list(adapters)
        for tree in adapters:
            self.binding.active(tree)
        return stack(adapters)

    def unstack(self, stacked: Tree) -> list[Tree]:
        """Split a stack of this graft into its adapters' own trees; their leaves are views.

        Right for both kinds of stacks: without the padding where ranks differ (`bind(model, [config, ...])`).

        Raises:
            KeyError, TypeError, ValueError: A stack that does not fit.

        >>> from torchgraft.adapters import LoraConfig
        >>> from torchgraft.functional import bind
        >>> graft = bind(torch.nn.Linear(4, 3), LoraConfig(r=2, target_modules="all-linear"))
        >>> [tree[""]["lora_A"].shape for tree in graft.unstack(graft.stack([graft.init(), graft.init()]))]
        [torch.Size([2, 4]), torch.Size([2, 4])]
        """
        trees = unstack(stacked)
        self.binding.active(trees[0])
        return trees

    def __call__(self, params: Tree | Routed, *args: Any, **kwargs: Any) -> Any:
        """Run the model with the adapters in `params`; the same as `functional_call(graft, params, args, kwargs)`."""

        return call(self.bound, params, args, kwargs)

    def view(
        self, params: Tree | Routed | tuple[Mapping[str, Tensor], Tree | Routed], *, constant: bool = False
    ) -> nn.Module:
        """Make a module like the user's, with the adapter in and the base shared.

        It has the class, the attributes and the methods of the user's model (`generate`, properties, submodules
        by name), shares the base parameters, has its own buffers and keeps `params` as they are, so gradients flow to
        them. Any number of views live side by side; each is its own module, so flags set on one (`eval()`) stay there,
        and later changes of the model's structure are not followed: take a new view. A call after a parameter of the
        model was replaced or moved is an error.

        Its `state_dict` is the adapted model's, as `merge` gives it. Its `parameters()` are the base's, frozen, since
        code asks them for dtypes and devices; what is trained is `params`. Nothing can be loaded into it.

        Args:
            params: A parameter tree, or `(base_params, params)`, as for a call.
            constant: Promise that the base and the leaves are not written to, in any way, as long as the view is used.
                What a method computes from them alone (DoRA's norms) is then computed here, once; writing to them
                makes the view wrong, and nothing notices. Without it every call sees what is written.

        Raises:
            KeyError, TypeError, ValueError: As a call does, for a tree that does not fit; with `constant` also for
                leaves that require gradients.
            RuntimeError: In calls of the view, where a parameter of the model was replaced or moved.

        >>> from torchgraft.adapters import LoraConfig
        >>> from torchgraft.functional import bind
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> graft = bind(model, LoraConfig(target_modules=["0"]))
        >>> type(graft.view(graft.init())).__name__
        'Sequential'
        """
        return make_view(self.bound, params, constant)

    def look(
        self,
        *args: Any,
        rows: int | None = None,
        tokens: int = 1,
        batch_dim: int | Mapping[str, int] | None = None,
        tokens_dim: int | Mapping[str, int] | None = None,
        mixed: Sequence[str] = (),
        rearranged: tuple[Any, ...] | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Find out where the rows of a kind of call are before it is made; calls of that kind then know it.

        A routed call does so by itself. It cannot under `torch.compile`, `torch.vmap` and export, nor where its inputs
        cannot be cut by rows or copied; a small sample of the same kind (arguments given, numbers of axes, modes) can.

        Args:
            *args: Positional arguments of the model's forward, with at least two rows.
            rows: Number of rows in them; by default the length of the first tensor.
            tokens: Number of tokens in each row, for calls that route by tokens: rows of shape `(batch, tokens)`.
            batch_dim: As for `route`.
            tokens_dim: As for `route`.
            mixed: As for `route`.
            rearranged: For inputs that cannot be cut by rows (packed images, lists): the arguments of the same call
                with its rows in the order 1, 0, 2, ..., n-1, n-1, positional ones or a dict of keyword arguments. Then
                `rows` has to be given.
            **kwargs: Keyword arguments of the forward.

        Raises:
            ValueError: The rows cannot be followed; names the first site or output that does not.

        >>> from torchgraft.adapters import LoraConfig
        >>> from torchgraft.functional import bind
        >>> graft = bind(nn.Sequential(nn.Linear(4, 3)), LoraConfig(target_modules=["0"]))
        >>> graft.look(torch.randn(3, 4))
        """
        other = (rearranged, {}) if isinstance(rearranged, tuple) else ((), dict(rearranged or {}))
        if tokens < 1:
            raise ValueError(f"look: tokens is {tokens}, expected the number of tokens in each row")
        declared = Declared(batch_dim, tokens_dim, tuple(mixed))
        remember(self.bound, (args, kwargs), rows, declared, None if rearranged is None else other, tokens)

    def without_looks(self) -> Self:
        """Return this graft for routed calls of kinds that `look` knows; it runs the model for no other reason.

        A model that is sharded over processes has to be called as often in each, also to find out where rows are. With
        this, all of them call `look`, on the same sample, and a kind of call that it did not show is an error.

        >>> from torchgraft.adapters import LoraConfig
        >>> from torchgraft.functional import bind, route, stack
        >>> graft = bind(nn.Sequential(nn.Linear(4, 3)), LoraConfig(target_modules=["0"])).without_looks()
        >>> graft.look(torch.randn(3, 4))
        >>> graft(route(stack([graft.init(), graft.init()]), torch.tensor([1, 0])), torch.randn(2, 4)).shape
        torch.Size([2, 3])
        """
        graft = copy.copy(self)
        graft.bound = self.bound.but(may_look=False)
        return graft

    def looking(self, see: Callable[[str, Tensor], None]) -> contextlib.AbstractContextManager[nn.Module]:
        """Run the base alone, in evaluation mode and without autograd, calling `see(path, x)` at each site.

        Args:
            see: `(path, input)`, called at each call of a site's module.

        Returns:
            A context manager whose value is a module like the user's, to be called within the `with` block.

        >>> from torchgraft.adapters import LoraConfig
        >>> from torchgraft.functional import bind
        >>> graft = bind(nn.Sequential(nn.Linear(4, 3)), LoraConfig(target_modules=["0"]))
        >>> with graft.looking(lambda path, x: print(path, tuple(x.shape))) as base:
        ...     _ = base(torch.ones(2, 4))
        0 (2, 4)
        """
        return watched_base(self.bound, see)

    def in_mode(self, training: bool) -> Self:
        """Return this graft with the whole model in training or in evaluation mode, whatever modes the model is in.

        The model's own flags stay as they are, so one call can have dropout beside another that has none.

        >>> from torchgraft.adapters import LoraConfig
        >>> from torchgraft.functional import bind
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Dropout())
        >>> graft = bind(model, LoraConfig(target_modules=["0"]))
        >>> params, x = graft.init(), torch.ones(2, 4)
        >>> torch.equal(graft.in_mode(training=False)(params, x), model[0](x)), model.training
        (True, True)
        """
        if not isinstance(training, bool):
            raise TypeError(f"in_mode: training is {training!r}, expected True for training mode, False for evaluation")
        graft = copy.copy(self)
        graft.bound = self.bound.but(training=training)
        return graft

    def unchanging(self) -> Self:
        """Return this graft for a model that stays as it is, whose calls do not look for changes first.

        You promise that no tensor of the model is replaced, moved or resized, no module exchanged, no hook added or
        removed, no mode or other attribute set, and that its forward writes to no attribute of its modules. Values of
        tensors may change, in any way: calls read the model's own tensors. A broken promise makes calls wrong. Two
        things are checked: the model's mode in each call, and what the forward wrote in calls 1, 2, 4, 8 and so on.

        Raises:
            RuntimeError: In calls, where one of these looks sees that the promise is broken.

        >>> from torchgraft.adapters import LoraConfig
        >>> from torchgraft.functional import bind
        >>> graft = bind(nn.Sequential(nn.Linear(4, 3)), LoraConfig(target_modules=["0"]))
        >>> fixed, params, x = graft.unchanging(), graft.init(), torch.ones(2, 4)
        >>> torch.equal(fixed(params, x), graft(params, x))
        True
        """
        graft = copy.copy(self)
        graft.bound = self.bound.but(unchanging=True)
        return graft

    if not TYPE_CHECKING:  # or else type checkers would take any name

        def __getattr__(self, name: str) -> Any:
            """Say where what a graft does not have is to be found."""
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{_elsewhere(self, name)}")

    def __repr__(self) -> str:
        adapters = ", ".join(
            f"{name + ': ' if name else ''}{config.method.name} on {len(self.sites[name])} sites"
            for name, config in self.configs.items()
        )
        return f"Graft({type(self.model).__name__}, {adapters})"


def _elsewhere(graft: Graft, name: str) -> str:
    """Return where an attribute is that a graft does not have."""
    model = vars(graft)["binding"].model if "binding" in vars(graft) else None
    if name in ("parameters", "named_parameters", "state_dict", "params"):
        return "; a graft holds no parameters: graft.init(generator) makes them, and each call is given them"
    if name in ("merge", "stack", "unstack", "route", "functional_call"):
        return f"; it is a function: torchgraft.functional.{name}"
    if name in ("train", "eval", "to", "half", "float", "double", "cuda", "cpu", "requires_grad_"):
        return f"; call graft.model.{name}(...), which every call sees"
    if not name.startswith("_") and hasattr(model, name):
        return f"; graft.view(params).{name} is the adapted model's, graft.model.{name} the model's own"
    return did_you_mean(name, [one for one in dir(type(graft)) if not one.startswith("_")])
