"""Classes that a setting names, to make an object of each.

Written as ``package.module.Class``, or with arguments of its constructor as
``{path: package.module.Class, settings: {every: 10}}``.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from spikingbrain_train.config.import_path import find_in_current_folder, object_at, reason_of
from spikingbrain_train.config.require import require
from spikingbrain_train.errors import ConfigurationError

Made = TypeVar("Made")


@dataclass(frozen=True)
class NamedClass:
    """A class and the arguments of its constructor."""

    setting: str
    """Which setting names it, for sentences."""
    path: str
    settings: dict[str, Any] = field(default_factory=dict)

    def load(self, base: type[Made]) -> type[Made]:
        """Import the class.

        Args:
            base: what it has to be a subclass of.

        Raises:
            ConfigurationError: it cannot be imported, is no subclass of ``base``, or takes other settings.
        """
        find_in_current_folder()
        try:
            found = object_at(self.path)
        except Exception as error:  # a module may fail in any way
            raise ConfigurationError(
                f"{self.setting} names {self.path}, which cannot be imported: {reason_of(error)}; write it "
                "as package.module.Class, with its folder on PYTHONPATH"
            ) from error
        require(
            isinstance(found, type) and issubclass(found, base),
            f"{self.setting} names {self.path}, which is no subclass of {base.__module__}.{base.__name__}",
        )
        require(
            not inspect.isabstract(found),
            f"{self.setting} names {self.path}, which does not define "
            f"{' and '.join(sorted(getattr(found, '__abstractmethods__', ())))}",
        )
        try:
            inspect.signature(found).bind(**self.settings)
        except TypeError as error:
            raise ConfigurationError(
                f"{self.setting}: the settings of {self.path} do not fit: {error}"
            ) from error
        return found

    def make(self, base: type[Made]) -> Made:
        """An object of the class. Raises ConfigurationError as :meth:`load` does."""
        return self.load(base)(**self.settings)


def named_classes(setting: str, entries: Sequence[Any]) -> list[NamedClass]:
    """The classes that a setting lists, none of them imported.

    Raises:
        ConfigurationError: an entry has another form, or a class is named twice.
    """
    found = []
    for index, entry in enumerate(entries):
        place = f"{setting}[{index}]"
        given: Any = {"path": entry} if isinstance(entry, str) else entry
        is_well_formed = (
            isinstance(given, dict)
            and set(given) in ({"path"}, {"path", "settings"})
            and isinstance(given["path"], str)
            and isinstance(given.get("settings", {}), dict)
        )
        require(
            is_well_formed,
            f"{place}={entry} does not fit: {place} takes package.module.Class, or "
            "{path: package.module.Class, settings: {name: value}}",
        )
        found.append(NamedClass(setting, given["path"], given.get("settings", {})))
    paths = [each.path for each in found]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    require(twice is None, f"{setting} names {twice} more than once; name each class once")
    return found
