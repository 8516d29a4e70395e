"""torchgraft under the name of PEFT, for libraries that import `peft` by themselves."""

from __future__ import annotations

import importlib.metadata
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from .peft_model import PeftModel
from .peft_modules import make_modules, missing
from .tasks import PeftMixedModel

VERSION = "0.22.0"
"""The version of PEFT that is claimed: the one that transformers 5.24 asks for."""


def as_peft(version: str = VERSION) -> Alias:
    """Make `import peft`, in whatever library, find torchgraft: its configs, calls and layers under PEFT's names.

    From now on, and until the returned object is closed or its `with` block ends, `import peft` and the submodules that
    clients use give torchgraft's classes, and `importlib.metadata.version("peft")` is the given one. So transformers'
    own `model.add_adapter`, `load_adapter` and the rest run on torchgraft, be PEFT installed, too old or absent.
    Nothing is imported or installed. Calls nest: the first one counts, and the last one to be closed ends it.

    A real `peft` that is imported already is put aside, with all its modules, and comes back at the end. Classes belong
    to who imported them, and when: a model that got its adapters from torchgraft keeps torchgraft's layers, and code
    that holds real PEFT's classes goes on with these. So work on a model either inside or outside; a model of real PEFT
    that is used inside, or the reverse, is not recognised. Libraries that look for `peft` once, when they are imported
    (diffusers, trl), have to be imported inside. Names of methods that torchgraft does not have (`PrefixTuningConfig`)
    are there for those that import them, and using one is an error.

    Two limits are transformers' own. Its files have no place for what all layers share (VeRA's projections), which are
    drawn from the config's seed again. And its `enable_adapters` does not reach `modules_to_save`, which
    `torchgraft.adapters.enable_adapter_layers` does.

    The alias is the process's, not the thread's: while it lasts, every thread sees it. Opening and closing is safe from
    several threads; a thread that is just importing the real `peft` should have finished.

    Args:
        version: The version to claim, for clients that ask for a newer one.

    Returns:
        A context manager with `close()`.

    >>> with as_peft():
    ...     from peft import LoraConfig
    >>> LoraConfig.__module__
    'torchgraft.adapters._methods.lora.lora'
    """
    return Alias(version)


class Alias:
    """An opened alias; see `as_peft`.

    >>> alias = as_peft()
    >>> alias.close()
    >>> alias.closed
    True
    """

    def __init__(self, version: str):
        self.closed = False
        _FINDER.open(version)

    def close(self) -> None:
        """End this alias; PEFT's own modules are back when it was the last one. A second call does nothing."""
        if not self.closed:
            self.closed = True
            _FINDER.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<torchgraft as peft, {'closed' if self.closed else 'open'}>"


_Names = list[tuple[ModuleType, str, Any]]
"""Modules, names in them, and what they were, `None` where there was none."""


class Finder(importlib.metadata.DistributionFinder, Loader):
    """Finds torchgraft's modules and a distribution under the name `peft`, from `sys.meta_path` while an alias is open.

    The modules are made once, so that a class that a client has imported stays the one that a later alias gives.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._opened = 0
        self._version = VERSION
        self._aside: dict[str, ModuleType] = {}
        self._made: dict[str, ModuleType] = {}
        self._names: _Names = []

    def open(self, version: str) -> None:
        """Take the place of `peft`, unless it is taken already."""
        with self._lock:
            if not self._opened:
                self._version = version
                self._make()
                sys.meta_path.insert(0, self)
                self._aside = _swap(self._made)
                self._names = _tell_transformers()
            self._opened += 1

    def close(self) -> None:
        """Put back what was there before, when this was the last alias."""
        with self._lock:
            self._opened -= 1
            if not self._opened:
                sys.meta_path.remove(self)
                _swap(self._aside)
                self._aside = {}
                _put_back(self._names)
                _forget_answers()

    def _make(self) -> None:
        if not self._made:
            self._made = make_modules(self._version)
            for name, module in self._made.items():
                module.__spec__ = ModuleSpec(name, self, origin="torchgraft.adapters", is_package=True)
        vars(self._made["peft"])["__version__"] = self._version

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return where `peft` and its submodules are.

        Raises:
            ModuleNotFoundError: A submodule that is not here; lists those that are.
        """
        if fullname.partition(".")[0] != "peft":
            return None
        if fullname in self._made:
            return self._made[fullname].__spec__
        # Named after the parent: `from peft import x` swallows an error that has the name of the submodule it tried.
        raise ModuleNotFoundError(missing(fullname), name=fullname.rpartition(".")[0])

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module, which is made already."""
        return self._made[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to do."""

    def find_distributions(self, context: Any = None) -> Iterator[importlib.metadata.Distribution]:
        """Yield the distribution `peft`, when that one is asked for."""
        if (getattr(context, "name", None) or "").lower() == "peft":
            yield Distribution(self._version)


class Distribution(importlib.metadata.Distribution):
    """What `importlib.metadata` knows of the stand-in: a name and a version, and no files."""

    def __init__(self, version: str):
        self._text = (
            f"Metadata-Version: 2.1\nName: peft\nVersion: {version}\nSummary: torchgraft, standing in for peft\n"
        )

    def read_text(self, filename: str) -> str | None:
        """Return the metadata."""
        return self._text if filename == "METADATA" else None

    def locate_file(self, path: Any) -> Path:
        """Return where a file of it would be."""
        result: Path = Path(__file__).parent / path
        return result


_FINDER = Finder()


def _swap(modules: dict[str, ModuleType]) -> dict[str, ModuleType]:
    """Put these in the place of `peft` and its submodules, which are returned."""
    names = [name for name in list(sys.modules) if name.partition(".")[0] == "peft"]
    found = {name: sys.modules.pop(name) for name in names}
    sys.modules.update(modules)
    return found


def _tell_transformers() -> _Names:
    """Let a transformers that was imported before see the stand-in's models; return what it saw until now."""
    _forget_answers()
    before: _Names = []
    for name in ("transformers.trainer", "transformers.trainer_utils"):
        if (module := sys.modules.get(name)) is not None:
            for cls in (PeftModel, PeftMixedModel):
                before.append((module, cls.__name__, vars(module).get(cls.__name__)))
                setattr(module, cls.__name__, cls)
    return before


def _put_back(before: _Names) -> None:
    """Give modules of transformers the classes that they had; the stand-in's stay where there was none."""
    for module, name, value in before:
        if value is not None:
            setattr(module, name, value)


def _forget_answers() -> None:
    """Have transformers ask again whether there is a `peft`, and which."""
    module = sys.modules.get("transformers.utils.import_utils")
    for name in ("is_peft_available", "is_peft_greater_or_equal"):
        clear = getattr(getattr(module, name, None), "cache_clear", None)
        if clear is not None:
            clear()
