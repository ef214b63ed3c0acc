"""Kinds by name: what the package brings, and what plugins add."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Generic, Protocol, TypeVar

from spikingbrain_train.config.import_path import import_path_of
from spikingbrain_train.config.sections import add_section
from spikingbrain_train.errors import ConfigurationError


class Named(Protocol):
    """Whatever a registry holds."""

    @property
    def name(self) -> str:
        """How configs call it."""


Kind = TypeVar("Kind", bound=Named)


class Registry(Generic[Kind]):
    """Kinds of one sort, by name.

    Args:
        what: the sort, in the singular, for sentences: ``mixer``.
        setting: where configs name them: ``model.mixers``.
        built_in: modules of the package that register kinds, imported when somebody first asks for one.
        plugins: how the packages of others are named, for sentences.
    """

    def __init__(
        self,
        what: str,
        setting: str,
        built_in: Sequence[str] = (),
        plugins: str = "plugins=[package.module] (--plugins of a tool)",
    ) -> None:
        self.what = what
        self.setting = setting
        self._plugins = plugins
        self._built_in = list(built_in)
        self._registered: dict[str, Kind] = {}

    @property
    def _kinds(self) -> dict[str, Kind]:
        if self._built_in:
            modules, self._built_in = self._built_in, []
            for module in modules:
                import_module(module)
            # Ours come first, in the order that is written here, whatever was imported when.
            places = {module: place for place, module in enumerate(modules)}
            kinds = sorted(
                self._registered.items(),
                key=lambda item: places.get(type(item[1]).__module__, len(places)),
            )
            self._registered = dict(kinds)
        return self._registered

    def register(self, kind: Kind) -> Kind:
        """Add a kind, and its section of settings if it has one.

        Raises:
            ConfigurationError: another kind has its name, or its section is none (:func:`add_section`).
        """
        known = self._registered.setdefault(kind.name, kind)
        if import_path_of(type(known)) != import_path_of(type(kind)):  # a module may be imported again
            raise ConfigurationError(
                f"{self.what} {kind.name} is registered twice, by {type(known).__module__} and "
                f"{type(kind).__module__}; give one of them another name"
            )
        section, section_type = getattr(kind, "section", None), getattr(kind, "section_type", None)
        if section is not None and section_type is not None:
            add_section(section, section_type)
        return known

    def __getitem__(self, name: str) -> Kind:
        """The kind of this name.

        Raises:
            ConfigurationError: there is none; names those that there are.
        """
        if name not in self._kinds:
            near = difflib.get_close_matches(name, self._kinds, n=1)
            hint = f"; did you mean {near[0]}?" if near else ";"
            raise ConfigurationError(
                f"{self.setting} names {name}, which is no {self.what}{hint} known are "
                f"{', '.join(sorted(self._kinds))}; name the package of another in {self._plugins}"
            )
        return self._kinds[name]

    def __contains__(self, name: object) -> bool:
        return name in self._kinds

    def __iter__(self) -> Iterator[Kind]:
        return iter(self._kinds.values())
