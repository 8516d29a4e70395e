"""Bound models: a binding and the skeletons that run it."""

from __future__ import annotations

import threading
from collections.abc import Collection
from typing import Any

from .._binding.binding import Binding
from .._routing.owners import mark_owners
from .._sites.parameters import Key
from .._skeleton.context import CallContext
from .._skeleton.parameters import check_apart
from .._skeleton.reach import is_plain
from .._skeleton.references import check_references
from .._skeleton.skeleton import Skeleton
from .._skeleton.swaps import tensor_swaps
from .._tensors.wrappers import modules_of
from .pool import Pool
from .traced import Traced

_RECENT = 4
"""Pools kept for states of the model that come back, such as train() and eval()."""


class BoundModel:
    """A binding, and skeletons for the states that its model is in.

    Attributes:
        binding: The binding.
        allow_unreached: Whether a forward may run past a site.
        training: The mode that the whole model runs in; `None` for its own.
        unchanging: Whether the user promised that nothing in the model changes.
        may_look: Whether calls find out by themselves where their rows are.
        pools: Skeletons of the states that the model was in, the last one first.
        compiled: Those that compiled calls run through.
    """

    def __init__(
        self,
        binding: Binding,
        allow_unreached: bool = False,
        training: bool | None = None,
        unchanging: bool = False,
        may_look: bool = True,
    ):
        self.binding, self.allow_unreached, self.training = binding, allow_unreached, training
        self.unchanging, self.may_look, self._mode = unchanging, may_look, binding.model.training
        self.pools: list[Pool] = []
        self._lock = threading.RLock()
        self.compiled = Traced()
        plans = (*binding.sites.values(), *binding.replaced.values())
        check_references(binding.model, {path for plan in plans for path in plan})
        if not self._can_wait():
            self.pool()

    def pool(self) -> Pool:
        """Return the skeletons that fit the model as it is now."""
        if self.unchanging and self.pools:
            self._check_mode()
            return self.pools[0]
        known = self._known()
        if known is not None:
            return known
        with self._lock:  # or calls of several threads would each make one, and know what another has seen
            known = self._known()
            if known is None:
                known = Pool(self.build, self.unchanging)
                self.pools = [known, *(old for old in self.pools if old.watch.same_tensors())][:_RECENT]
            return known

    def _known(self) -> Pool | None:
        """Return the skeletons made for the state that the model is in, if there are any."""
        return next((pool for pool in self.pools if pool.watch.same()), None)

    def _can_wait(self) -> bool:
        """Return whether no copy of the model can fail, so that the first call may make it instead of binding."""
        alone = len(self.binding.configs) == 1 and not any(self.binding.replaced.values())
        modules = not any(site.is_parameter for sites in self.binding.sites.values() for site in sites.values())
        return alone and modules and is_plain(self.binding.model)

    def but(self, **changes: bool) -> BoundModel:
        """Return the same binding, bound otherwise; it knows nothing yet."""
        options = {name: getattr(self, name) for name in ("allow_unreached", "training", "unchanging", "may_look")}
        return BoundModel(self.binding, **{**options, **changes})

    def _check_mode(self) -> None:
        if self.training is None and self.binding.model.training is not self._mode:
            before, after = ("training", "evaluation") if self._mode else ("evaluation", "training")
            raise RuntimeError(
                f"unchanging: the model was in {before} mode then and is in {after} mode now; call unchanging() again, "
                f"or graft.in_mode(training={self._mode}) before it"
            )

    def build(self, context: CallContext | None = None) -> Skeleton:
        """Make a skeleton of the model as it is now.

        Args:
            context: What its sites ask about the call in progress.

        Raises:
            ValueError: A module at a site was replaced by one that the site's parameters do not fit.
        """
        binding = self.binding
        modules = modules_of(binding.model)
        adapters, paths = binding.adapters_by_key(binding.configs, modules)
        check_apart(adapters, paths)
        skeleton = Skeleton(binding.model, adapters, paths, context, self.training)
        skeleton.swaps = tensor_swaps(skeleton, modules, binding.replaced)
        mark_owners(skeleton.context, skeleton.modules, skeleton.swaps, {id(m): name for name, m in modules.items()})
        skeleton.in_steps = not (self.allow_unreached or skeleton.swaps) and _in_steps(skeleton, adapters)
        return skeleton

    def __getstate__(self) -> dict[str, Any]:
        state = {key: value for key, value in vars(self).items() if key != "_lock"}
        return {**state, "pools": [], "compiled": Traced()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.RLock())


def _in_steps(skeleton: Skeleton, adapters: Collection[Key]) -> bool:
    """Return whether each site of a skeleton takes one step, if the call allows it."""
    copies = {id(original): copied for original, copied in skeleton.modules}
    runtimes = [vars(copies[module]).get("_runtime") for module, leaf in adapters if not leaf and module in copies]
    return len(runtimes) == len(adapters) and all(runtime is not None and runtime.step for runtime in runtimes)
