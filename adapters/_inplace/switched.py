"""Which adapters are active on a thing that adapters have in a model, and whether they are switched off there."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING


class Switched:
    """What all things that adapters have in a model do alike when adapters are switched."""

    _active: list[str]
    _disabled: bool

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters; some may have nothing here."""
        return self._active

    @property
    def active_adapter(self) -> list[str]:
        """The same as `active_adapters`."""
        return self._active

    @property
    def disable_adapters(self) -> bool:
        """Whether what the user had is there alone."""
        return self._disabled

    @property
    def _active_adapter(self) -> list[str]:
        return self._active

    @property
    def _disable_adapters(self) -> bool:
        return self._disabled

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones, and trainable unless `inference_mode`; all others are frozen.

        Raises:
            ValueError: Adapters that cannot be active together here.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.check_active(names)
        self.freeze_others(names)
        self.activate(names, not inference_mode)

    def check_active(self, names: Iterable[str]) -> None:
        """Refuse adapters that cannot be active together; any can, where a class does not say otherwise."""

    def freeze_others(self, names: list[str]) -> None:
        """Freeze what adapters other than these have here."""

    if TYPE_CHECKING:

        def activate(self, names: Iterable[str], trained: bool) -> None:
            """Make these the active adapters, trained or not; others stay as frozen as they are."""
