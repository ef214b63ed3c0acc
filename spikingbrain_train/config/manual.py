"""Everything that is said beside settings, as data: what `--help` prints and docs/settings.md holds.

Read from the dataclasses, so that plugins' sections are there as our own.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, cast

from omegaconf import MISSING

from spikingbrain_train.config.docstrings import docstring_of, field_docstrings, member_docstrings
from spikingbrain_train.config.schema import Schema, what_it_takes, without_none
from spikingbrain_train.config.setting import OnChange, Role, Setting, beside
from spikingbrain_train.config.shown import shown


@dataclass(frozen=True)
class SettingEntry:
    """One setting."""

    name: str
    """Dotted: ``optimizer.lr``."""
    takes: str
    """Type and bounds in words: ``a number, greater than 0``."""
    default: str
    """As a command line has it; ``???`` where a value has to be given."""
    said: Setting
    """Its bounds, and what resuming makes of a change."""
    text: str
    """Its docstring, a line a paragraph."""
    choices: dict[str, str]
    """What each value means, where it is one of an enum's."""

    @property
    def on_resume(self) -> str | None:
        """What a run that goes on makes of another value, in words; None outside of runs."""
        if self.said.resume is None:
            return None
        rule, note, role = self.said.resume.rule, self.said.resume.note, self.said.resume.role
        if role is Role.weights:
            return "refused, and a checkpoint to start from must agree: it decides the weights"
        if role is Role.function:
            return f"refused: {note}; a run that starts from a checkpoint may have another value"
        return f"{_RULES[rule]}: {note}" if note else _RULES[rule]


_RULES = {
    OnChange.free: "takes effect",
    OnChange.said: "takes effect, and the run says so",
    OnChange.refused: "refused",
    OnChange.by_tokens: "refused if other tokens would be read next; another path to the same ones is taken",
}


@dataclass(frozen=True)
class SectionEntry:
    """A group of settings."""

    name: str
    """Dotted; empty for a run, or a recipe, itself."""
    text: str
    """The docstrings of the field and of its dataclass."""
    settings: list[SettingEntry]
    """Those directly in it."""
    sections: list[str]
    """Names of the sections in it."""


def sections_of(schema: Schema, name: str = "", text: str | None = None) -> Iterator[SectionEntry]:
    """Every section of a config, each before those in it.

    Args:
        schema: a dataclass such as RunConfig.
        name: what its settings begin with, without the dot.
        text: what is said where the section is a field.
    """
    annotations, said = typing.get_type_hints(schema), field_docstrings(schema)
    own = docstring_of(schema)
    settings: list[SettingEntry] = []
    below: list[tuple[Schema, str, str]] = []
    for field in dataclasses.fields(schema):
        dotted = f"{name}.{field.name}" if name else field.name
        annotation = annotations[field.name]
        if dataclasses.is_dataclass(annotation):
            below.append((cast(Schema, annotation), dotted, said.get(field.name, "")))
        else:
            settings.append(_setting_entry(dotted, annotation, field, said.get(field.name, "")))
    yield SectionEntry(
        name, "\n\n".join(part for part in (text, own) if part), settings, [dotted for _, dotted, _ in below]
    )
    for annotation, dotted, words in below:
        yield from sections_of(annotation, dotted, words)


def _setting_entry(name: str, annotation: Any, field: dataclasses.Field[Any], text: str) -> SettingEntry:
    said = beside(field)
    bounds = said.bounds()
    single, optional = without_none(annotation)
    return SettingEntry(
        name=name,
        takes=what_it_takes(single) + (f", {bounds}" if bounds else "") + (", or null" if optional else ""),
        default=_default_of(field),
        said=said,
        text=text,
        choices=_choices_of(single),
    )


def _default_of(field: dataclasses.Field[Any]) -> str:
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    return "???" if value in (MISSING, dataclasses.MISSING) else shown(value)


def _choices_of(annotation: Any) -> dict[str, str]:
    for candidate in (annotation, *typing.get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Enum):
            return member_docstrings(candidate)
    return {}
